"""Test a cache without a model and without libllama.

pytest examples/test_my_cache.py
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from erllama.cache import Block, Cache, SaveReason, namespace_key, token_bytes
from erllama.testing import CacheMachine

NAMESPACE = namespace_key({"model": "my model", "quantization": "f16", "n_ctx": 4096})


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    with Cache(ram=0, disk=tmp_path / "kv") as cache:
        yield cache


def test_round_trip(cache: Cache) -> None:
    block = Block.following(NAMESPACE, NAMESPACE, 0, token_bytes([1, 2, 3]), SaveReason.COLD)
    assert cache.save(block, b"data")
    cache.flush()
    loaded = cache.load(block)
    assert loaded is not None
    assert (loaded.tier, bytes(loaded.payload)) == ("disk", b"data")


class Everything(CacheMachine):
    """Random sequences of operations: the cache never returns wrong data."""

    def make_cache(self, directory: Path) -> Cache:
        # The machine changes files itself. With a watch, the cache would react to that at random moments.
        return Cache(ram=1000, disk=directory, disk_quota=9000, block_size=16, watch=False)


TestEverything = Everything.TestCase
