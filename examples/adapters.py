"""Adapters: loaded beside a model, scaled, unloaded; the cache keeps what each set computed.

python examples/adapters.py [model.gguf lora.gguf]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import erllama
from erllama.testing.models import TINY, write_llama, write_lora


@contextmanager
def files() -> Iterator[tuple[Path, Path]]:
    """A model and an adapter: those named on the command line, or random ones."""
    if len(sys.argv) > 2:
        yield Path(sys.argv[1]), Path(sys.argv[2])
        return
    with tempfile.TemporaryDirectory() as place:
        yield write_llama(Path(place) / "model.gguf", TINY), write_lora(Path(place) / "lora.gguf", TINY)


def main() -> None:
    prompt = "Once upon a time, in a village by the sea, " * 4
    with files() as (file, lora), erllama.load_model(file, cache=erllama.Cache()) as model:

        def ask(what: str) -> str:
            reply = model.complete(prompt, max_tokens=8, temperature=0.0)
            print(f"{what + ':':24} {reply.text!r}; {reply.cache.kind}")
            return reply.text

        plain = ask("without")
        adapter = model.load_adapter(lora)
        adapted = ask("with")
        adapter.scale = 0.5
        ask("by half")
        adapter.scale = 0.0
        assert ask("not at all") == plain
        adapter.scale = 1.0
        assert ask("with, again") == adapted
        adapter.unload()
        assert ask("without, again") == plain


if __name__ == "__main__":
    main()
