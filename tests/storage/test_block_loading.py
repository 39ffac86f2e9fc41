"""Loading many blocks: in order and ahead of the caller, pinned, and complete up to the first fault."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from erllama.cache import Block, Cache, Match
from erllama.cache.blocks import kvc
from erllama.cache.pipeline import loader
from erllama.cache.tiers.file_names import block_path
from erllama.engine.backends.stub import StubBackend
from support.engine_models import SIZE as ENGINE_SIZE
from support.engine_models import cold_reply, load_stub, random_prompt
from support.faulty.tiers import SmallTier
from support.storage.blocks import NAMESPACE, SIZE, blocks_of, payload_of, save
from support.threads import in_threads, wait_until

N_BLOCKS = 12
TOKENS = np.arange(N_BLOCKS * SIZE, dtype=np.int32)
BLOCKS = blocks_of(TOKENS)
PAYLOAD_BYTES = 640
FILE_BYTES = kvc.header_bytes(SIZE) + PAYLOAD_BYTES


@pytest.fixture(autouse=True, params=[1, 3, 100])
def batch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Read this many blocks at once."""
    monkeypatch.setattr(loader, "_BATCH_BYTES", request.param * FILE_BYTES)
    n: int = request.param
    return n


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a directory with the blocks."""
    with Cache(block_size=SIZE, disk=tmp_path / "kv") as cache:
        save(cache, TOKENS, n_bytes=PAYLOAD_BYTES)
    return tmp_path / "kv"


def load(cache: Cache, on_batch: Callable[[int, Match], object] = lambda *_: None) -> int:
    """Load the blocks of a match. Returns how many were loaded, after checking each and their order."""
    found: list[bytes] = []
    with cache.lookup(NAMESPACE, TOKENS) as match, closing(cache.load_batches(match.blocks)) as batches:
        for number, batch in enumerate(batches):
            for loaded in batch:
                assert bytes(loaded.payload) == payload_of(loaded.block, PAYLOAD_BYTES).tobytes()
                found.append(loaded.block.key)
            on_batch(number, match)
    assert found == [block.key for block in BLOCKS[: len(found)]]
    return len(found)


# --- without faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ram", [0, "1MiB"])
def test_blocks_are_loaded_in_order(root: Path, ram: int | str, batch: int) -> None:
    sizes: list[int] = []
    with Cache(block_size=SIZE, disk=root, ram=ram) as cache:
        assert load(cache, lambda number, match: sizes.append(number)) == N_BLOCKS
        assert len(sizes) == -(-N_BLOCKS // batch)
        assert cache.counters()["promotions"] == (N_BLOCKS if ram else 0)
        sizes.clear()
        assert load(cache, lambda number, match: sizes.append(number)) == N_BLOCKS
        assert len(sizes) == (1 if ram else -(-N_BLOCKS // batch)), "blocks in memory are one batch"


def test_blocks_of_several_tiers_are_loaded_in_order(root: Path) -> None:
    """Every third block is in RAM, and one is only there."""
    with Cache(block_size=SIZE, disk=root) as cache:
        for block in BLOCKS[::3]:
            assert cache.load(block) is not None
        block_path(root, BLOCKS[6].key).unlink()
        tiers: list[str] = []
        with cache.lookup(NAMESPACE, TOKENS) as match:
            for batch in cache.load_batches(match.blocks):
                tiers += [loaded.tier for loaded in batch]
        assert tiers == ["ram" if at % 3 == 0 else "disk" for at in range(N_BLOCKS)]


def test_no_blocks_need_no_loading(root: Path) -> None:
    with Cache(block_size=SIZE, disk=root) as cache:
        assert list(cache.load_batches([])) == []


def test_promoted_blocks_keep_to_the_budget(root: Path) -> None:
    """RAM for five blocks: those of the match are pinned, so the first five stay."""
    with Cache(block_size=SIZE, disk=root, ram=5 * PAYLOAD_BYTES) as cache:
        assert load(cache) == N_BLOCKS
        assert {row.key for row in cache.rows() if row.tier == "ram"} == {block.key for block in BLOCKS[:5]}
        cache.check_integrity()


# --- faults in the middle -------------------------------------------------------------------------------


def corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def corrupt_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def vanish(path: Path) -> None:
    path.unlink()


def exchange(path: Path) -> None:
    """Put the file of the first block here."""
    path.write_bytes(block_path(path.parent.parent, BLOCKS[0].key).read_bytes())


def become_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [corrupt, corrupt_header, shorten, lengthen, empty, vanish, exchange, become_a_directory]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("at", [1, 5, 11])
def test_a_damaged_file_ends_the_load_before_it(root: Path, damage: Callable[[Path], None], at: int) -> None:
    with Cache(block_size=SIZE, disk=root, watch=False) as cache:
        damage(block_path(root, BLOCKS[at].key))
        assert load(cache) == at
        cache.flush()
        n_damaged = cache.counters()["corrupt_files"] + cache.counters()["disk_errors"]
        assert n_damaged == (0 if damage is vanish else 1)
        in_ram = {row.key for row in cache.rows() if row.tier == "ram"}
        assert in_ram.issuperset(block.key for block in BLOCKS[:at]), "what was read before it is promoted"
        assert load(cache) == at
        save(cache, TOKENS, n_bytes=PAYLOAD_BYTES)
        assert load(cache) == N_BLOCKS


@pytest.mark.parametrize("damage", [corrupt, shorten, vanish])
def test_a_file_damaged_during_the_load_ends_it(root: Path, damage: Callable[[Path], None]) -> None:
    """Damage the last file while the first batch is in use."""

    def damage_last(number: int, match: Match) -> None:
        if number == 0:
            damage(block_path(root, BLOCKS[-1].key))

    with Cache(block_size=SIZE, disk=root, ram=0, watch=False) as cache:
        assert load(cache, damage_last) >= N_BLOCKS - 1
        cache.flush()
        assert load(cache) == N_BLOCKS - 1


def test_a_tier_that_raises_ends_the_load_there() -> None:
    class Breaks(SmallTier):
        def read(self, block: Block) -> tuple[Block, memoryview]:
            if block.start == 5 * SIZE:
                raise ValueError("a mistake in a tier")
            return super().read(block)

    with Cache(block_size=SIZE, ram=0, tiers=[Breaks("breaks")]) as cache:
        save(cache, TOKENS, n_bytes=PAYLOAD_BYTES)
        cache.flush()
        assert load(cache) == 5
        assert cache.counters()["disk_errors"] == 1


def test_a_reply_is_right_after_a_fault_in_the_middle(tmp_path: Path) -> None:
    prompt = random_prompt(1, 12 * ENGINE_SIZE)
    expected = cold_reply(prompt, max_tokens=5, seed=1)

    def complete(damage: int | None) -> int:
        cache = Cache(block_size=ENGINE_SIZE, disk=tmp_path, ram=0, watch=False)
        with cache, load_stub(StubBackend(eog_bias=-100), cache=cache) as model:
            if damage is not None:
                files = [(kvc.read_header(path)[0].start, path) for path in (tmp_path / "blocks").iterdir()]
                corrupt(sorted(files)[damage][1])
            done = model.complete(prompt, max_tokens=5, seed=1)
            assert done.tokens == expected.tokens
            return done.cache.tokens

    assert complete(None) == 0
    assert complete(7) == 7 * ENGINE_SIZE
    assert complete(None) == len(prompt) - 1


# --- pins -----------------------------------------------------------------------------------------------


def test_pinned_blocks_are_not_evicted_while_they_are_read_ahead(root: Path) -> None:
    def evict(number: int, match: Match) -> None:
        cache.evict_bytes("1GiB", ("ram", "disk"))

    with Cache(block_size=SIZE, disk=root) as cache:
        save(cache, TOKENS + 10_000, n_bytes=PAYLOAD_BYTES)
        cache.flush()
        assert load(cache, evict) == N_BLOCKS
        assert {row.key for row in cache.rows()} == {block.key for block in BLOCKS}
        cache.evict_bytes("1GiB", ("ram", "disk"))
        assert cache.rows() == [], "nothing stays pinned"


class Gated(SmallTier):
    """Reads of blocks from `first` on wait until the gate opens. Counts the threads inside."""

    def __init__(self, place: str, first: int = 0) -> None:
        super().__init__(place)
        self.first, self.inside, self.n_read = first * SIZE, 0, 0
        self.gate, self.reading = threading.Event(), threading.Event()

    def size(self, block: Block, payload_bytes: int) -> int:
        return FILE_BYTES

    def read(self, block: Block) -> tuple[Block, memoryview]:
        self.inside += 1
        try:
            if block.start >= self.first:
                self.reading.set()
                assert self.gate.wait(60)
            self.n_read += 1
            return super().read(block)
        finally:
            self.inside -= 1


def gated(name: str, first: int) -> tuple[Cache, Gated]:
    tier = Gated(name, first)
    cache = Cache(block_size=SIZE, ram=0, tiers=[tier])
    save(cache, TOKENS, n_bytes=PAYLOAD_BYTES)
    cache.flush()
    return cache, tier


def test_no_read_outlives_a_load_that_ends_early(batch: int) -> None:
    """A load is closed while the next batch is read. Its blocks are unpinned afterwards."""
    if batch >= N_BLOCKS:
        pytest.skip("a load of several batches")
    cache, tier = gated(f"early {batch}", first=batch)
    with cache, cache.lookup(NAMESPACE, TOKENS) as match:
        batches = cache.load_batches(match.blocks)
        assert len(next(batches)) >= 1
        assert tier.reading.wait(60)
        closing_thread = threading.Thread(target=batches.close)
        closing_thread.start()
        assert closing_thread.is_alive()
        tier.gate.set()
        closing_thread.join(60)
        assert tier.inside == 0
        assert list(batches) == []


def test_a_load_does_not_wait_for_the_reads_of_another(batch: int) -> None:
    """The reader is busy with a slow tier for one load, so another load reads its batches itself."""
    if batch >= N_BLOCKS:
        pytest.skip("a load of several batches")
    cache, tier = gated(f"busy {batch}", first=batch)
    other = TOKENS + 10_000
    with cache, cache.lookup(NAMESPACE, TOKENS) as match, closing(cache.load_batches(match.blocks)) as slow:
        assert len(next(slow)) >= 1
        assert tier.reading.wait(60)
        tier.first = 10**9  # the waiting read stays; later reads pass
        save(cache, other, n_bytes=PAYLOAD_BYTES)
        cache.flush()
        with cache.lookup(NAMESPACE, other) as second:
            assert sum(map(len, cache.load_batches(second.blocks))) == N_BLOCKS
        assert tier.inside == 1, "the first load still waits"
        tier.gate.set()
        assert sum(map(len, slow)) > 0


# --- the reader -----------------------------------------------------------------------------------------


def readers() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith("erllama-cache-reader")]


def test_loads_share_one_reader_which_ends_with_the_cache(root: Path, batch: int) -> None:
    wait_until(lambda: not readers())
    with Cache(block_size=SIZE, disk=root, ram=0) as cache:
        in_threads(lambda _: load(cache) == N_BLOCKS or pytest.fail("a block is missing"), 6)
        assert len(readers()) == (0 if batch >= N_BLOCKS else 1)
    wait_until(lambda: not readers())


def test_blocks_are_loaded_if_no_thread_can_start(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        if self.name.startswith("erllama-cache-reader"):
            raise RuntimeError("can't start new thread")
        start(self)

    tier = Gated(f"no threads {batch}")
    tier.gate.set()
    with Cache(block_size=SIZE, ram=0, tiers=[tier]) as cache:
        save(cache, TOKENS, n_bytes=PAYLOAD_BYTES)
        cache.flush()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            assert load(cache) == N_BLOCKS
        assert load(cache) == N_BLOCKS
        assert tier.n_read == 2 * N_BLOCKS, "the reader repeats no read of the first load"


def test_a_child_forked_during_a_load_can_end_it(batch: int) -> None:
    if batch >= N_BLOCKS:
        pytest.skip("a load of several batches")
    cache, tier = gated(f"forked {batch}", first=batch)
    with cache, cache.lookup(NAMESPACE, TOKENS) as match, closing(cache.load_batches(match.blocks)) as batches:
        next(batches)
        assert tier.reading.wait(60)
        pid = os.fork()
        if pid == 0:
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(20)
                os._exit(len(list(batches)))
            finally:
                os._exit(100)
        tier.gate.set()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert sum(map(len, batches)) == N_BLOCKS - batch


def test_a_closed_cache_loads_nothing_and_does_not_fail(root: Path) -> None:
    with Cache(block_size=SIZE, disk=root, ram=0) as cache:

        def close(number: int, match: Match) -> None:
            cache.close()

        assert 1 <= load(cache, close) <= N_BLOCKS
        assert load(cache) == 0


# --- requests -------------------------------------------------------------------------------------------


def test_a_request_cancelled_while_it_is_restored_frees_its_cells() -> None:
    """Cancel while blocks are read. The prompt is cached, and its next request has the same reply."""
    tier = Gated("cancelled")
    tier.gate.set()
    prompt = random_prompt(3, 10 * ENGINE_SIZE)
    backend = StubBackend(eog_bias=-100)
    with (
        Cache(block_size=ENGINE_SIZE, ram=0, tiers=[tier]) as cache,
        load_stub(backend, cache=cache) as model,
    ):
        expected = model.complete(prompt, max_tokens=5, seed=1)
        model.evict()
        cache.flush()
        tier.gate.clear()
        tier.reading.clear()
        stream = model.stream(prompt, max_tokens=5, seed=1)
        assert tier.reading.wait(60)
        stream.cancel()
        tier.gate.set()
        assert stream.result().finish_reason == "cancelled"
        assert all(row.pins == 0 for row in cache.rows())
        model.evict()
        assert backend.cells_used == 0
        again = model.complete(prompt, max_tokens=5, seed=1)
        assert (again.tokens, again.cache.kind) == (expected.tokens, "exact")
