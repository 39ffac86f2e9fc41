"""Inspect the contents and counters of a cache, and shrink it.

python examples/inspect_cache.py
"""

import tempfile

import erllama
from erllama.engine.backends.stub import StubBackend

with (
    tempfile.TemporaryDirectory() as place,
    erllama.Cache(ram="64MiB", disk=place, disk_quota="1GiB") as cache,
    erllama.load_backend(StubBackend(), cache=cache) as model,
):
    model.complete("You are a helpful assistant. " * 30 + "Why is the sky blue?", max_tokens=20)
    model.complete("You are a helpful assistant. " * 30 + "How deep is the sea?", max_tokens=20)
    cache.flush()

    for name, value in cache.counters().items():
        if value:
            print(f"{name}: {value:.6f}" if isinstance(value, float) else f"{name}: {value}")

    for row in cache.rows():
        print(f"{row.key.hex()[:12]} tier={row.tier} {row.n_tokens} tokens size={row.n_bytes} pins={row.pins}")

    freed = cache.evict_bytes("256MiB", ("ram", "ram_file"))  # frees at least this much, if the tiers hold it
    print(f"evicted {freed} bytes; gc freed {cache.gc()}; verify: {cache.verify() or 'no problems'}")
