"""Use the cache alone: no model, no libllama. Takes some seconds.

python examples/smoke_test.py
"""

import tempfile

from erllama.cache import Block, Cache, SaveReason, namespace_key, token_bytes

namespace = namespace_key({"model": "none", "quantization": "f16"})
tokens = [1, 2, 3]

with tempfile.TemporaryDirectory() as place, Cache(ram=0, disk=f"{place}/edemo") as cache:
    assert cache.lookup(namespace, tokens).n_tokens == 0

    block = Block.following(namespace, namespace, 0, token_bytes(tokens), SaveReason.COLD)
    cache.save(block, b"hi")
    cache.flush()

    with cache.lookup(namespace, tokens) as match:
        loaded = cache.load(match.blocks[0])
        assert loaded is not None
        print(f"{match.n_tokens} tokens from {loaded.tier}: {bytes(loaded.payload)!r}")

    counters = cache.counters()
    for name in ("saves_cold", "misses", "hits_exact", "bytes_written"):
        print(f"{name}: {counters[name]}")
