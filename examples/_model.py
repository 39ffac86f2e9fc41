"""The model of an example: the GGUF file named on its command line, or a tiny one made for the occasion."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from erllama.testing.models import LlamaShape, write_llama

# Small enough to be written in a moment; so many words that hardly any reply meets the end token early.
_SHAPE = LlamaShape(n_layer=4, n_embd=256, n_ff=512, n_head=4, n_head_kv=2, n_vocab=4096)


@contextmanager
def model_file(argument: int = 1) -> Iterator[Path]:
    """The path of a model: the argument of that number, or, without one, a file of random weights."""
    if len(sys.argv) > argument:
        yield Path(sys.argv[argument])
        return
    with tempfile.TemporaryDirectory() as place:
        yield write_llama(Path(place) / "random.gguf", _SHAPE, seed=argument)
