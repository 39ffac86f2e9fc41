"""The model of an example: the GGUF file on its command line, the demo model, or a generated one."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import erllama
from erllama.testing.models import LlamaShape, write_llama
from erllama.testing.scripted import write_scripted

# Small, so that it is generated quickly. The large vocabulary makes an early end token unlikely.
_SHAPE = LlamaShape(n_layer=4, n_embd=256, n_ff=512, n_head=4, n_head_kv=2, n_vocab=4096)


def model_or_demo() -> Path:
    """Return the first argument as a path, or the path of the demo model."""
    return Path(sys.argv[1]) if len(sys.argv) > 1 else erllama.demo_model()


@contextmanager
def model_file(argument: int = 1) -> Iterator[Path]:
    """Yield the path in an argument, or a generated model with random weights."""
    if len(sys.argv) > argument:
        yield Path(sys.argv[argument])
        return
    with tempfile.TemporaryDirectory() as place:
        yield write_llama(Path(place) / "random.gguf", _SHAPE, seed=argument)


@contextmanager
def counting_model_file(argument: int = 1) -> Iterator[Path]:
    """Yield the path in an argument, or a generated model that repeats the alphabet without end."""
    if len(sys.argv) > argument:
        yield Path(sys.argv[argument])
        return
    letters = "abcdefghijklmnopqrstuvwxyz"
    follows = dict(zip(letters, letters[1:] + letters[0], strict=True))
    with tempfile.TemporaryDirectory() as place:
        yield write_scripted(Path(place) / "alphabet.gguf", follows)
