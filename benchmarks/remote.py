"""Measures the remote tier: what a request pays while the bucket is gone, and what many machines cost.

`make test-remote` runs it, after the tests of the remote tier. It needs the packages of the `dev` extra: moto's
server is the bucket. All numbers of docs/fleet/remote-tier.md are from here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import numpy as np

import erllama
from erllama.cache import Block, Cache, SaveReason, namespace_key, token_bytes
from erllama.cache.blocks.key_file import SecretKeys, create_key_file, read_key_file
from erllama.cache.remote import manifest
from erllama.cache.remote.block_list import BlockList
from erllama.cache.remote.daemon_threads import DaemonThreads
from erllama.cache.remote.manifest import Entry, Event
from erllama.cache.remote.manifest_log import ManifestLog
from erllama.cache.remote.object_codec import NO_KEY, ObjectCodec
from erllama.cache.remote.options import open_store
from erllama.cache.remote.stores import Stored, do_nothing
from erllama.cache.remote.tier import READS_PER_POLL, RemoteTier

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.storage.network import bucket_server, environment, proxied

N_TOKENS = 900
BLOCK_SIZE = 256
T = TypeVar("T")
# Prices of S3 in us-east-1 in dollars. Traffic within the region is free.
PUT_PRICE, GET_PRICE = 0.005 / 1000, 0.0004 / 1000
MONTH = 30 * 86400


def prompt(number: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(number).integers(5, 200, N_TOKENS)]


def open_model(directory: Path, tier: RemoteTier | None) -> tuple[Cache, erllama.Model]:
    cache = Cache(ram=0, disk=None, tiers=[tier] if tier else [], block_size=BLOCK_SIZE)
    model = erllama.load_model(
        erllama.demo_model(), cache=cache, n_ctx=1024, n_threads=1, id="remote" if tier else "cold"
    )
    return cache, model


def measure_outage(seconds: float) -> None:
    """Compare requests during an outage with requests without a remote tier, in turn, on one machine."""
    with bucket_server() as port, proxied(("127.0.0.1", port)) as proxy, tempfile.TemporaryDirectory() as place:
        os.environ.update(environment(proxy.port))
        directory = Path(place)
        create_key_file(directory / "key")

        def tier() -> RemoteTier:
            keys = read_key_file(directory / "key")
            return RemoteTier(open_store("s3://bucket/a"), "s3://bucket/a", keys, 10**12)

        n_prompts = 18
        cache, model = open_model(directory, tier())
        with cache, model:
            for number in range(n_prompts):
                model.complete(prompt(number), max_tokens=1)
            cache.flush()
        cache, model = open_model(directory, tier())
        cold_cache, cold = open_model(directory, None)
        with cache, model, cold_cache, cold:
            hit = [model.complete(prompt(number), max_tokens=1) for number in range(3)]
            print(f"before: {[completion.cache.tokens for completion in hit]} of {N_TOKENS} tokens from the bucket")
            for kind in ("gone", "black_hole"):
                setattr(proxy, kind, True)
                ends = time.monotonic() + seconds / 2
                shares: list[float] = []
                ratios: list[float] = []
                number = 2 if kind == "gone" else 9
                while time.monotonic() < ends and len(shares) < 7:
                    number += 1
                    began = time.perf_counter()
                    cold.complete(prompt(1000 + number), max_tokens=1)
                    computing = time.perf_counter() - began
                    began = time.perf_counter()
                    timings = model.complete(prompt(number), max_tokens=1).timings
                    ratios.append((time.perf_counter() - began) / computing)
                    shares.append((timings.queued + timings.restore) / computing)
                    time.sleep(max(seconds / 2 / 7 - 2 * computing, 0))
                print(
                    f"{kind}: {len(shares)} requests in {seconds / 2:g} s; wait for the tier, by the cold "
                    f"request beside it: largest {max(shares):.3f}, median {statistics.median(shares):.4f}; "
                    f"whole request, ratio of medians: {statistics.median(ratios):.3f}"
                )
                print(f"  tier: {cache.disk_error}"[:160])
                setattr(proxy, kind, False)
                while cache.disk_error is not None:
                    time.sleep(0.2)
            again = model.complete(prompt(17), max_tokens=1)
            counters = cache.counters()
            print(f"after: {again.cache.tokens} tokens from the bucket")
            print({name: n for name, n in counters.items() if name.startswith("remote") and n})


def manifest_bytes_per_block(n_blocks: int = 1024) -> float:
    """Return the bytes of a manifest per block of 256 random tokens, the worst case for its compression."""
    codec = ObjectCodec(_some_keys())
    namespace = namespace_key({"model": "a"})
    dice = np.random.default_rng(0)
    entries = []
    parent = namespace
    for i in range(n_blocks):
        tokens = token_bytes(dice.integers(0, 128_000, BLOCK_SIZE))
        block = Block.following(parent, namespace, i * BLOCK_SIZE, tokens, SaveReason.COLD)
        entries.append(
            Entry(Event.STORED, time.time_ns(), block.key, block, 1 << 22, dice.bytes(8), time.time_ns())
        )
        parent = block.key
    return sum(map(len, manifest.encode(entries, codec))) / n_blocks


def _some_keys() -> SecretKeys:
    with tempfile.TemporaryDirectory() as place:
        return create_key_file(Path(place) / "key")


class CountingStore:
    """Objects in memory. Counts the requests that S3 would bill."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.counts: Counter[str] = Counter()

    def create(self) -> None:
        pass

    def get(self, name: str, limit: int, on_response: Callable[[], None] = do_nothing) -> memoryview:
        self.counts["gets"] += 1
        if name not in self.objects:
            raise FileNotFoundError(name)
        self.counts["bytes"] += len(self.objects[name])
        return memoryview(self.objects[name])

    def put(self, name: str, parts: Sequence[bytes | memoryview], *, replace: bool = False) -> bool:
        self.counts["puts"] += 1
        self.objects[name] = b"".join(parts)
        return True

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            self.objects.pop(name, None)

    def list(self, prefix: str) -> Iterator[Stored]:
        found = [Stored(name, len(content), 0.0) for name, content in self.objects.items()]
        self.counts["lists"] += max(1, -(-len(found) // 1000))
        return iter(found)


class InPlace(DaemonThreads):
    """Reads segments at once, and decodes each only once for all machines."""

    def __init__(self, store: CountingStore) -> None:
        super().__init__(1, "inline")
        self._store = store
        self._decoded: dict[str, object] = {}

    def submit(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        name = str(getattr(call, "name", ""))
        try:
            if name in self._decoded and name in self._store.objects:
                self._store.get(name, 0)
            else:
                self._decoded[name] = call()
            future.set_result(self._decoded[name])  # type: ignore[arg-type]
        except Exception as error:
            future.set_exception(error)
        return future


def simulate(n_machines: int, minutes: int, kv_bytes_per_token: int) -> None:
    """Let machines exchange manifests, each with a new block and a poll every minute, and count the requests."""
    payload = kv_bytes_per_token * BLOCK_SIZE
    codec, store, namespace = ObjectCodec(_some_keys()), CountingStore(), namespace_key({"model": "a"})
    machines: list[tuple[BlockList, ManifestLog]] = []
    threads = InPlace(store)
    for _ in range(n_machines):
        blocks = BlockList()
        log = ManifestLog(store, codec, blocks, threads, lambda name, n: None, lambda entries: None)
        machines.append((blocks, log))
    dice, n_stored = np.random.default_rng(0), 0
    for minute in range(minutes):
        if minute == minutes // 2:  # the second half is the steady state
            store.counts.clear()
            known_before = statistics.mean(len(blocks) for blocks, _ in machines)
        for blocks, log in machines:
            tokens = token_bytes(dice.integers(0, 128_000, BLOCK_SIZE))
            block = Block.following(namespace, namespace, 0, tokens, SaveReason.COLD)
            version = dice.bytes(8)
            entry = blocks.new_entry(block, payload, version, codec.name(block, version, NO_KEY), NO_KEY)
            blocks.store(entry)
            log.append(entry)
            n_stored += 1
            log.publish()
            log.read_new(most=READS_PER_POLL)
            if log.should_merge:
                log.merge()
    measured = minutes - minutes // 2
    known = statistics.mean(len(blocks) for blocks, _ in machines)
    per_month = {name: n / measured * MONTH / 60 for name, n in store.counts.items()}
    dollars = (per_month["lists"] + per_month["puts"]) * PUT_PRICE + per_month["gets"] * GET_PRICE
    each = {name: n / measured / n_machines for name, n in store.counts.items()}
    print(f"\n{n_machines} machines, each with a new block of {payload / 1e6:.1f} MB a minute:")
    print(
        f"  manifests, for each machine and minute: {each['lists']:.1f} lists, {each['gets']:.1f} gets, "
        f"{each['puts']:.2f} puts, {each['bytes'] / 60:,.0f} bytes a second; {len(store.objects)} objects listed"
    )
    print(f"  requests for manifests: {dollars:,.0f} $ a month, {dollars / n_machines:.2f} $ a machine")
    blocks_dollars = n_machines * MONTH / 60 * PUT_PRICE
    print(f"  requests that store the blocks: {blocks_dollars:,.0f} $ a month")
    lag = (n_stored - known) / n_machines
    print(f"  blocks of others that a machine does not know yet: those of the last {lag:.1f} minutes")
    print(f"  new blocks that a machine learned of in a minute: {(known - known_before) / measured:.0f}")
    print(f"  traffic into the bucket: {n_machines * payload / 60 / 1e6:,.0f} MB/s")
    per_block = manifest_bytes_per_block()
    print(f"  bytes of manifest for a block: {per_block:.0f}; for a million blocks: {per_block:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the bucket is gone")
    parser.add_argument("--machines", type=int, default=1000, help="machines of the largest simulated fleet")
    options = parser.parse_args()
    for n_machines in (4, 50, options.machines):
        simulate(n_machines, 6 if n_machines > 500 else 20, 22_500)
    measure_outage(options.seconds)


if __name__ == "__main__":
    main()
