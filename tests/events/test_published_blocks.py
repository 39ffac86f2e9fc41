"""What subscribers know is what a lookup can find, after any changes of the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import erllama
from erllama.cache import Block, BlockChange, SaveReason, namespace_key, token_bytes
from erllama.events.published import PublishedBlocks, key_hash
from erllama.events.replays import payloads
from erllama.events.wire import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch, decode, encode
from support.event_subscriber import State, apply_event, findable, stored_in
from support.examples import examples

ROOT = namespace_key({"model": "test"})
OTHER = namespace_key({"model": "test", "cache_salt": "s"})
FULL, SMALL = 16, 4
TIERS = ("live", "ram", "ram_file", "disk", "remote")


def chain(*runs: int, namespace: bytes = ROOT) -> list[Block]:
    """Return the blocks of a prompt of runs of four equal tokens; four runs fill a block."""
    tokens = np.repeat(np.array(runs, np.int32), SMALL)
    return Block.chain(token_bytes(tokens), namespace, FULL, SaveReason.COLD)


# Prompts of up to three blocks, which share beginnings of any length.
PROMPTS = st.integers(1, 3).flatmap(lambda n: st.lists(st.integers(0, 1), min_size=4 * n, max_size=4 * n))
CHANGES = st.lists(st.tuples(PROMPTS, st.integers(0, 2), st.sampled_from(TIERS), st.booleans()), max_size=20)


def as_changes(drawn: list[tuple[list[int], int, str, bool]]) -> list[BlockChange]:
    changes = []
    for runs, index, tier, stored in drawn:
        blocks = chain(*runs)
        changes.append(BlockChange(tier, blocks[min(index, len(blocks) - 1)], stored))
    return changes


def held_after(changes: list[BlockChange]) -> list[tuple[str, Block]]:
    held: dict[tuple[str, bytes], Block] = {}
    for tier, block, stored in changes:
        if stored:
            held[tier, block.key] = block
        else:
            held.pop((tier, block.key), None)
    return [(tier, block) for (tier, _), block in held.items()]


@settings(max_examples=examples(40))
@given(CHANGES, st.integers(1, 7))
def test_events_keep_a_subscriber_equal_to_the_tiers(
    drawn: list[tuple[list[int], int, str, bool]], step: int
) -> None:
    changes, blocks, state = as_changes(drawn), PublishedBlocks(SMALL), State()
    for at in range(0, len(changes), step):
        for event in blocks.apply(changes[at : at + step]):
            apply_event(state, event)
        assert state.known == findable(held_after(changes[: at + step]), SMALL, FULL)


@settings(max_examples=examples(40))
@given(CHANGES)
def test_a_snapshot_has_exactly_what_events_have_told(drawn: list[tuple[list[int], int, str, bool]]) -> None:
    changes, blocks, state = as_changes(drawn), PublishedBlocks(SMALL), State()
    state.known = {(1, "GPU")}  # of an earlier process
    blocks.apply(changes)
    for payload in payloads(blocks, blocks.located(), per_batch=2):
        for event in decode(payload).events:
            apply_event(state, event)
    assert state.known == findable(held_after(changes), SMALL, FULL)


@settings(max_examples=examples(40))
@given(CHANGES, CHANGES)
def test_the_whole_content_replaces_what_was_known(
    before: list[tuple[list[int], int, str, bool]], after: list[tuple[list[int], int, str, bool]]
) -> None:
    blocks, state = PublishedBlocks(SMALL), State()
    blocks.apply(as_changes(before))
    held = held_after(as_changes(after))
    blocks.replace([BlockChange(tier, block, stored=True) for tier, block in held])
    for payload in payloads(blocks, blocks.located()):
        for event in decode(payload).events:
            apply_event(state, event)
    assert state.known == findable(held, SMALL, FULL)
    for event in blocks.apply([BlockChange(tier, block, stored=False) for tier, block in held]):
        apply_event(state, event)
    assert not state.known
    assert not len(blocks)
    assert not blocks._children
    assert not blocks._siblings


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("save"), PROMPTS),
        st.tuples(st.just("evict"), st.integers(1, 4)),
        st.tuples(st.just("park"), PROMPTS),
        st.tuples(st.just("leave"), PROMPTS),
        st.tuples(st.just("read"), st.none()),
    ),
    max_size=15,
)


@settings(max_examples=examples(40))
@given(OPERATIONS, st.integers(1, 6))
def test_a_log_of_a_cache_misses_no_change(operations: list[tuple[str, object]], limit: int) -> None:
    with logged_cache(limit) as (cache, log):
        cells = Cells("live", 1 << 20)
        cache.attach(cells)
        blocks, state = PublishedBlocks(SMALL), State()

        def read() -> None:
            changes, complete, _ = cache.read_block_log(log)
            events: list[Event] = []
            if complete:
                blocks.replace(changes)
                for payload in payloads(blocks, blocks.located()):
                    events += decode(payload).events
            else:
                events = blocks.apply(changes)
            for event in events:
                apply_event(state, event)
            assert state.known == stored_in(cache, ROOT, SMALL)

        for name, argument in operations:
            prompt = chain(*argument) if isinstance(argument, list) else []
            if name == "save":
                for block in [*prompt, *chain(*argument, namespace=OTHER)]:  # type: ignore[misc]
                    cache.save(block, b"x" * 100)
            elif name == "evict":
                cache.evict_bytes(int(argument) * 100, ("ram",))  # type: ignore[call-overload]
            elif name == "park":
                for block in filter(lambda block: cache.contains(block.key), prompt):
                    cache.report_stored(cells, block, 1)
            elif name == "leave":
                cache.report_removed(cells, [block.key for block in prompt])
            else:
                read()
        read()
        cache.close()
        read()
        assert not state.known


class Cells(erllama.cache.Tier):
    """A tier that its owner writes."""

    write_mode = "external"

    def rows(self) -> list[erllama.cache.TierRow]:
        return []

    def write(self, block: Block, payload: memoryview) -> None:
        raise OSError

    def read(self, block: Block) -> tuple[Block, memoryview]:
        raise FileNotFoundError

    def remove(self, keys: object) -> None:
        pass


@contextmanager
def logged_cache(
    limit: int, reports: Callable[[str], bool] = lambda tier: True
) -> Iterator[tuple[erllama.Cache, erllama.cache.BlockLog]]:
    with erllama.Cache(ram=1000, block_size=FULL) as cache:
        log = cache.open_block_log(ROOT, limit=limit, wake=lambda: None, reports=reports)
        yield cache, log
        cache.close_block_log(log)


# --- the wire format ----------------------------------------------------------------------------------


def test_a_batch_has_vllms_bytes() -> None:
    events: list[Event] = [
        BlockStored([2**64 - 1, 5], 7, [1, 2, 70000, 4], 2, None, "CPU", None),
        BlockRemoved([5], "DISK"),
        AllBlocksCleared(),
    ]
    expected = (
        b"\x93\xcb\x3f\xf8\x00\x00\x00\x00\x00\x00"  # [1.5, ...
        b"\x93"  # three events
        b"\x88\xa4type\xabBlockStored"
        b"\xacblock_hashes\x92\xcf\xff\xff\xff\xff\xff\xff\xff\xff\x05"
        b"\xb1parent_block_hash\x07"
        b"\xa9token_ids\x94\x01\x02\xce\x00\x01\x11\x70\x04"
        b"\xaablock_size\x02"
        b"\xa7lora_id\xc0"
        b"\xa6medium\xa3CPU"
        b"\xa9lora_name\xc0"
        b"\x83\xa4type\xacBlockRemoved\xacblock_hashes\x91\x05\xa6medium\xa4DISK"
        b"\x81\xa4type\xb0AllBlocksCleared"
        b"\x00"  # the rank
    )
    batch = EventBatch(1.5, events)
    assert encode(batch) == expected
    assert decode(expected) == batch
    assert msgspec.msgpack.decode(expected)[1][2] == {"type": "AllBlocksCleared"}


def test_a_chain_is_one_event_with_tokens_and_parents() -> None:
    blocks = chain(1, 2, 3, 4, 5, 6, 7, 8)
    published = PublishedBlocks(8)
    (event,) = published.apply([BlockChange("ram", block, stored=True) for block in blocks])
    assert isinstance(event, BlockStored)
    assert event.parent_block_hash is None
    assert event.token_ids == [token for token in range(1, 9) for _ in range(SMALL)]
    assert event.block_size == 8
    assert event.block_hashes[1::2] == [key_hash(block.key) for block in blocks]
    assert event.medium == "CPU"


def test_a_shared_beginning_stays_until_its_last_block_goes() -> None:
    one, two = chain(1, 2, 3, 4)[0], chain(1, 2, 9, 9)[0]
    published = PublishedBlocks(SMALL)
    published.apply([BlockChange("ram", one, stored=True)])
    (added,) = published.apply([BlockChange("ram", two, stored=True)])
    assert isinstance(added, BlockStored)
    assert len(added.block_hashes) == 2
    (removed,) = published.apply([BlockChange("ram", one, stored=False)])
    assert isinstance(removed, BlockRemoved)
    assert len(removed.block_hashes) == 2
    (rest,) = published.apply([BlockChange("ram", two, stored=False)])
    assert isinstance(rest, BlockRemoved)
    assert len(rest.block_hashes) == 4


@pytest.mark.parametrize(
    ("tiers", "reported"), [(None, {"ram", "live"}), (["ram"], {"ram"}), (["remote", "ram"], {"ram", "remote"})]
)
def test_tiers_that_are_not_wanted_are_left_out(tiers: list[str] | None, reported: set[str]) -> None:
    options = erllama.KvEvents(tiers=tiers)  # type: ignore[arg-type]
    with logged_cache(100, options.reports) as (cache, log):
        cells = [Cells("live", 1 << 20), Cells("remote", 1 << 20)]
        for tier in cells:
            cache.attach(tier)
        one, two = chain(1, 2, 3, 4), chain(5, 6, 7, 8)
        for block in (*one, *two):
            cache.save(block, b"x")
            for tier in cells:
                cache.report_stored(tier, block, 1)
            changes, complete, _ = cache.read_block_log(log)
            assert complete == (block in one)
            assert {change.tier for change in changes} == reported
        for tier in cells:
            cache.report_removed(tier, [block.key for block in two])
        assert {change.tier for change in cache.read_block_log(log).changes} == reported - {"ram"}


class Turns:
    """A lock that runs a call after each time that it was held."""

    def __init__(self, lock: AbstractContextManager[object], after: Callable[[], None]) -> None:
        self._lock, self._after = lock, after

    def __enter__(self) -> None:
        self._lock.__enter__()

    def __exit__(self, *error: Any) -> None:  # noqa: ANN401
        self._lock.__exit__(*error)
        self._after()


@settings(max_examples=examples(20))
@given(
    st.lists(PROMPTS, min_size=3, max_size=8), st.lists(st.tuples(PROMPTS, st.booleans()), min_size=4, max_size=8)
)
def test_requests_go_on_while_the_whole_content_is_read(
    before: list[list[int]], meanwhile: list[tuple[list[int], bool]]
) -> None:
    """Changes between the parts of the content are not lost."""
    with pytest.MonkeyPatch.context() as patched, logged_cache(100) as (cache, log):
        patched.setattr("erllama.cache.store._LOG_PART", 1)
        patched.setattr("erllama.cache.store._LOG_PAUSE", 0)
        for runs in before:
            for block in chain(*runs):
                cache.save(block, b"x" * 50)
        n_stored, lock, n_turns, waiting = len(cache.rows()), cache._lock, 0, list(meanwhile)

        def change() -> None:
            nonlocal n_turns
            n_turns += 1
            if not waiting:
                return
            runs, stores = waiting.pop()
            cache._lock = lock
            for block in chain(*runs):
                if stores:
                    cache.save(block, b"y" * 50)
                else:
                    cache.evict_bytes(50, ("ram",))
            cache._lock = Turns(lock, change)  # type: ignore[assignment]

        cache._lock = Turns(lock, change)  # type: ignore[assignment]
        blocks, state = PublishedBlocks(SMALL), State()
        changes, complete, _ = cache.read_block_log(log)
        cache._lock = lock
        assert complete
        assert n_turns == n_stored + 1
        blocks.replace(changes)
        for payload in payloads(blocks, blocks.located()):
            for event in decode(payload).events:
                apply_event(state, event)
        changes, complete, _ = cache.read_block_log(log)
        assert not complete
        for event in blocks.apply(changes):
            apply_event(state, event)
        assert state.known == stored_in(cache, ROOT, SMALL)
