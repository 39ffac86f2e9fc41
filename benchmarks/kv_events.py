"""What KV events cost: bytes on the wire, time and memory of the publisher, and time under the cache's lock.

    python -m benchmarks.kv_events

Uses no model: blocks of 256 tokens with random ids of a vocabulary of 128,256, in events of 16, 64 and 256 tokens.
"""

from __future__ import annotations

import time
import tracemalloc

import numpy as np

import erllama
from erllama.cache import Block, BlockChange, SaveReason, namespace_key, token_bytes
from erllama.events.published import PublishedBlocks
from erllama.events.wire import EventBatch, encode

_N_CHAINS, _BLOCKS = 250, 16  # prompts, and blocks of each: 4,000 blocks, about a million tokens
_TOKENS = 256


def chains() -> list[Block]:
    """Return the blocks of prompts that share nothing."""
    random = np.random.default_rng(0)
    namespace = namespace_key({"model": "benchmark"})
    blocks: list[Block] = []
    for _ in range(_N_CHAINS):
        tokens = token_bytes(random.integers(0, 128_256, _BLOCKS * _TOKENS))
        blocks += Block.chain(tokens, namespace, _TOKENS, SaveReason.COLD)
    return blocks


def measure_events(blocks: list[Block], block_size: int) -> None:
    """Print what the events of the blocks cost."""
    stored = [BlockChange("ram", block, stored=True) for block in blocks]
    tracemalloc.start()
    published = PublishedBlocks(block_size)
    before = tracemalloc.get_traced_memory()[0]
    published.apply(stored)
    memory = (tracemalloc.get_traced_memory()[0] - before) / len(blocks)
    tracemalloc.stop()
    published = PublishedBlocks(block_size)
    began = time.process_time()
    payload = encode(EventBatch(0.0, published.apply(stored)))
    seconds = time.process_time() - began
    removed = encode(EventBatch(0.0, published.apply([change._replace(stored=False) for change in stored])))
    n = len(blocks)
    print(
        f"events of {block_size:3} tokens: {len(payload) / n:6.0f} bytes to store a block, {len(removed) / n:4.0f} "
        f"to remove it; {seconds / n * 1e6:4.0f} us of CPU time and {memory:5.0f} bytes of memory a block"
    )


def measure_saves(blocks: list[Block], *, logged: bool) -> float:
    """Return the microseconds of a save in RAM, with or without a log of the changes."""
    with erllama.Cache(ram="1GiB") as cache:
        log = cache.open_block_log(blocks[0].namespace, limit=100_000, wake=lambda: None) if logged else None
        if log is not None:
            cache.read_block_log(log)
        began = time.process_time()
        for block in blocks:
            cache.save(block, b"x")
        return (time.process_time() - began) / len(blocks) * 1e6


def main() -> None:
    blocks = chains()
    for block_size in (16, 64, 256):
        measure_events(blocks, block_size)
    with_log = min(measure_saves(blocks, logged=True) for _ in range(5))
    without = min(measure_saves(blocks, logged=False) for _ in range(5))
    print(f"a save in RAM: {without:.1f} us of CPU time without events, {with_log:.1f} with them")


if __name__ == "__main__":
    main()
