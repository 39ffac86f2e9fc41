"""What the cache costs and gives, each number a ratio of two things measured in turn in this one run.

    python benchmarks/cache.py lookup
    python benchmarks/cache.py restore --model model.gguf
    python benchmarks/cache.py decode --model model.gguf
    python benchmarks/cache.py turns

`lookup` needs no model. Models of a size are written by `python -m erllama.testing.models`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import erllama
from erllama.cache import Block, Cache, SaveReason, namespace_key, token_bytes
from erllama.cache.index import FileStamp, Index
from erllama.engine.backends.stub import StubBackend

NAMESPACE = namespace_key({"benchmark": 1})


def chain(tokens: np.ndarray, size: int) -> list[Block]:
    blocks: list[Block] = []
    for start in range(0, len(tokens), size):
        parent = blocks[-1].key if blocks else NAMESPACE
        raw = token_bytes(tokens[start : start + size])
        blocks.append(Block.following(parent, NAMESPACE, start, raw, SaveReason.COLD))
    return blocks


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def spread(values: list[float], unit: float = 1e3) -> str:
    return f"{statistics.median(values) * unit:.3f} ({min(values) * unit:.3f} to {max(values) * unit:.3f})"


def lookup(runs: int) -> None:
    """A prompt of 32,768 tokens among 10,000 and among 100,000 blocks; and starting with them."""
    dice = np.random.default_rng(1)
    medians = {}
    for n_blocks in (10_000, 100_000):
        with tempfile.TemporaryDirectory() as place:
            root = Path(place) / "kv"
            Cache(disk=root, watch=False).close()
            prompt = dice.integers(0, 100_000, 32_768)
            rows = chain(prompt, 256)
            while len(rows) < n_blocks:
                rows += chain(dice.integers(0, 100_000, 256 * 100), 256)
            index = Index(root / "index.db")
            with index.transaction():
                for block in rows[:n_blocks]:
                    index.put(block, FileStamp(1, 1), 1)
                    (root / "blocks" / f"{block.key.hex()}.kvc").touch()
            index.close()
            opened: list[float] = []
            for _ in range(3):
                began = time.perf_counter()
                cache = Cache(disk=root, watch=False)
                opened.append(time.perf_counter() - began)
                if len(opened) < 3:
                    cache.close()

            def look(cache: Cache = cache, prompt: np.ndarray = prompt) -> None:
                with cache.lookup(NAMESPACE, prompt) as match:
                    assert match.n_tokens == 32_768, match.n_tokens

            found = [seconds(look) for _ in range(20 * runs)]
            medians[n_blocks] = statistics.median(found)
            print(f"{n_blocks} blocks: lookup {spread(found)} ms; start {spread(opened)} ms")
            cache.close()
    print(f"growth from 10,000 to 100,000 blocks: {medians[100_000] / medians[10_000]:.2f}")


def restore(model_path: Path, n_tokens: int, runs: int) -> None:
    """Restoring from files in the page cache, against reading and copying the same bytes."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "kv"
        prompt = np.random.default_rng(1).integers(5, 2000, n_tokens).tolist()
        options = {"n_ctx": n_tokens + 512}
        with Cache(disk=root) as cache, erllama.load_model(model_path, cache=cache, **options) as model:
            model.prefill(prompt)
        files = sorted((root / "blocks").iterdir())
        n_bytes = sum(path.stat().st_size for path in files)
        target = np.zeros(max(path.stat().st_size for path in files), np.uint8)

        def plain() -> None:
            for path in files:
                content = path.read_bytes()
                target[: len(content)] = np.frombuffer(content, np.uint8)

        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(runs):
            with Cache(disk=root, ram=0) as cache, erllama.load_model(model_path, cache=cache, **options) as model:
                for _ in range(3):
                    theirs.append(seconds(plain))
                    done = model.prefill(prompt)
                    assert done.cache.kind == "exact", done.cache
                    ours.append(done.timings.restore)
        print(f"{n_tokens} tokens, {n_bytes / 1e6:.1f} MB in {len(files)} files")
        print(f"restore {spread(ours)} ms; reading and copying {spread(theirs)} ms")
        print(f"speed: {statistics.median(theirs) / statistics.median(ours):.2f} of reading and copying")


def decode(model_path: Path, n_tokens: int, runs: int, threads: int | None) -> None:
    """Decoding while the prompts of before are written behind, against decoding alone."""
    with tempfile.TemporaryDirectory() as place:
        alone: list[float] = []
        beside: list[float] = []
        dice = np.random.default_rng(1)
        with (
            Cache(ram=0) as none,
            Cache(disk=Path(place) / "kv", ram="1GiB", write_queue="4GiB") as cache,
            erllama.load_model(model_path, cache=none, n_ctx=2048, n_threads=threads, id="alone") as quiet,
            erllama.load_model(model_path, cache=cache, n_ctx=2048, n_threads=threads, id="beside") as busy,
        ):
            written = cache.counters()["bytes_written"]
            for run in range(runs):
                # Long enough for its blocks to be written while the reply is.
                prompt = dice.integers(5, 2000, n_tokens).tolist()
                order = [(quiet, alone), (busy, beside)]
                for model, speeds in order if run % 2 else order[::-1]:
                    done = model.complete(prompt, max_tokens=128, temperature=0.8, seed=1)
                    speeds.append(done.timings.decode_tokens / done.timings.decode)
                cache.flush()
            written = cache.counters()["bytes_written"] - written
        print(
            f"decode alone {spread(alone, 1)} tokens/s; {spread(beside, 1)} while {written / 1e6:.0f} MB go to disk"
        )
        ratios = [b / a for a, b in zip(alone, beside, strict=True)]
        print(
            f"throughput while saving: {statistics.median(ratios):.3f} of throughput without (median of pairs); "
            f"{statistics.median(beside) / statistics.median(alone):.3f} (of medians)"
        )


def turns(n_turns: int) -> None:
    """Bytes written in a conversation, against the bytes of its distinct tokens."""
    with tempfile.TemporaryDirectory() as place:
        with (
            Cache(disk=Path(place) / "kv") as cache,
            erllama.load_backend(StubBackend(n_ctx=32_768, eog_bias=-100), cache=cache) as model,
        ):
            history = [ord("s")] * 700
            for _ in range(n_turns):
                history += [ord("q")] * 90
                history = list(model.complete(history, max_tokens=120).context_tokens)
            cache.flush()
            counters = cache.counters()
        with (
            Cache(disk=Path(place) / "once") as cache,
            erllama.load_backend(StubBackend(n_ctx=32_768), cache=cache) as model,
        ):
            model.prefill(history)
            cache.flush()
            once = cache.counters()["bytes_written"]
        print(
            f"{n_turns} turns, {len(history)} tokens: "
            f"{counters['bytes_written'] / once:.3f} times the bytes of its distinct tokens"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["lookup", "restore", "decode", "turns"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of decoding; all processors if left out")
    given = parser.parse_args()
    if given.what in ("restore", "decode") and given.model is None:
        parser.error(f"{given.what} needs --model")
    print(f"erllama {erllama.__version__}, {os.cpu_count()} processors")
    match given.what:
        case "lookup":
            lookup(given.runs)
        case "restore":
            restore(given.model, given.tokens, given.runs)
        case "decode":
            decode(given.model, min(given.tokens, 1024), given.runs, given.threads)
        case "turns":
            turns(20)


if __name__ == "__main__":
    main()
