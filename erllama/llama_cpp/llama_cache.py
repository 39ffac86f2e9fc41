"""Caches for `Llama.set_cache`: erllama's cache with llama-cpp-python's names and sizes.

llama-cpp-python stores whole states, one per prompt. erllama stores each block of KV once, and prompts share the
blocks of their common prefixes, so the caches here hold more prompts in the same number of bytes.
"""

from __future__ import annotations

from typing import Never

from erllama.cache import Cache
from erllama.checks import integer
from erllama.errors import Unsupported


class BaseLlamaCache:
    """The base of both caches.

    Args:
        cache: erllama's cache.
        capacity_bytes: its budget in bytes.

    Attributes:
        cache: erllama's cache.
    """

    def __init__(self, cache: Cache, capacity_bytes: int) -> None:
        self.cache, self.capacity_bytes = cache, capacity_bytes

    @property
    def cache_size(self) -> int:
        """Bytes of the stored KV."""
        raise NotImplementedError

    def close(self) -> None:
        """Write what is queued, and close the cache. Unload the models that use it first."""
        self.cache.close()

    def __getitem__(self, key: object) -> Never:
        raise Unsupported("erllama's cache stores blocks, not states by prompt; use Llama.save_state for a state")

    def __setitem__(self, key: object, value: object) -> Never:
        raise Unsupported("erllama's cache saves prompts by itself; set_cache is enough")


class LlamaRAMCache(BaseLlamaCache):
    """A cache in memory. Several `Llama` of the same model may share it."""

    def __init__(self, capacity_bytes: int = 2 << 30) -> None:
        super().__init__(Cache(ram=integer("capacity_bytes", capacity_bytes, 0)), capacity_bytes)

    @property
    def cache_size(self) -> int:
        return _size(self.cache, "ram")


# The older name of the cache in memory.
LlamaCache = LlamaRAMCache


class LlamaDiskCache(BaseLlamaCache):
    """A cache in a directory, which survives the process and may be shared with other processes."""

    def __init__(self, cache_dir: str = ".cache/llama_cache", capacity_bytes: int = 2 << 30) -> None:
        quota = integer("capacity_bytes", capacity_bytes, 0)
        super().__init__(Cache(disk=cache_dir, disk_quota=quota), capacity_bytes)

    @property
    def cache_size(self) -> int:
        return _size(self.cache, "disk")


def _size(cache: Cache, tier: str) -> int:
    return sum(status.n_bytes for status in cache.tiers() if status.tier == tier)
