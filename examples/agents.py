"""Run eight agents on one system prompt, which is computed once: with threads, and with asyncio.

python examples/agents.py [model.gguf]
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from _model import model_file

import erllama

SYSTEM = "You are a helpful assistant. Answer in plain words, and keep to what you know.\n" * 5
PROMPTS = [f"{SYSTEM}{name} asks: what is new?" for name in ("Ada", "Bo", "Cy", "Di", "Eve", "Flo", "Gus", "Hal")]


def by_threads(model: erllama.Model) -> list[erllama.Completion]:
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(lambda prompt: model.complete(prompt, max_tokens=20, temperature=0), PROMPTS))


def by_asyncio(model: erllama.Model) -> list[erllama.Completion]:
    async def ask_all() -> list[erllama.Completion]:
        return await asyncio.gather(*(model.acomplete(p, max_tokens=20, temperature=0) for p in PROMPTS))

    return asyncio.run(ask_all())


def show(name: str, path: Path, ask: Callable[[erllama.Model], list[erllama.Completion]]) -> None:
    # A new cache, so that both ways start cold.
    with erllama.Cache() as cache, erllama.load_model(path, cache=cache, n_seq_max=8) as model:
        replies = ask(model)
        counts = model.metrics
        print(
            f"{name}: {len(replies)} prompts, {counts.prompt_tokens} tokens; "
            f"{counts.prefilled_tokens} computed, {counts.shared_tokens} shared; "
            f"{len(model.tokenize(SYSTEM))} in the system prompt"
        )


def main() -> None:
    with model_file() as path:
        show("threads", path, by_threads)
        show("asyncio", path, by_asyncio)


if __name__ == "__main__":
    main()
