"""Load, scale and unload LoRA adapters while requests run. The cache separates their KV.

python examples/adapters.py [model.gguf lora.gguf]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import erllama
from erllama.testing.models import write_llama, write_lora

PROMPT = "The same words, read with other weights, are other numbers. " * 4


@contextmanager
def files() -> Iterator[tuple[Path, Path]]:
    """Yield a model and an adapter: those of the command line, or generated ones with random weights."""
    if len(sys.argv) > 2:
        yield Path(sys.argv[1]), Path(sys.argv[2])
        return
    with tempfile.TemporaryDirectory() as place:
        yield write_llama(Path(place) / "model.gguf"), write_lora(Path(place) / "lora.gguf", seed=1)


def ask(model: erllama.Model, how: str) -> None:
    reply = model.complete(PROMPT, max_tokens=8, temperature=0.0)
    print(f"{how}: {reply.cache.kind}; {reply.text!r}")


def main() -> None:
    with files() as (path, lora), erllama.Cache() as cache, erllama.load_model(path, cache=cache) as model:
        ask(model, "without")
        adapter = model.load_adapter(lora, scale=0.5)
        ask(model, "half")
        adapter.scale = 1.0
        ask(model, "whole")

        stream = model.stream(PROMPT, max_tokens=40, temperature=0.0)
        adapter.scale = 0.5  # a running stream keeps the scale it started with
        ask(model, "half")
        print(f"loaded: {[(adapter.path.name, adapter.scale) for adapter in model.adapters]}")
        adapter.unload()
        ask(model, "without")
        print(f"started before the change: {stream.result().cache.kind}")

        try:
            model.load_adapter(path)
        except erllama.AdapterLoadError as error:
            print(f"refused: {error}")


if __name__ == "__main__":
    main()
