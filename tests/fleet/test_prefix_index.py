"""The prefix index: what it finds agrees with a plain model of what each replica holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erllama.fleet.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KvEventError,
    decode_batch,
    encode_batch,
)
from erllama.fleet.prefix_index import CachedPrefix, PrefixIndex

SIZE = 16  # tokens per block


def prompt(*blocks: int) -> np.ndarray:
    """Return a prompt of whole blocks; equal numbers are equal blocks."""
    return np.repeat(np.array(blocks, np.int32), SIZE)


def stored(blocks: list[int], hashes: list[int], parent: int | None = None, medium: str = "GPU") -> BlockStored:
    tokens = tuple(int(token) for token in prompt(*blocks))
    return BlockStored(tuple(hashes), tokens, SIZE, parent, medium)


def found(index: PrefixIndex, tokens: np.ndarray, salt: str | None = None) -> dict[str, CachedPrefix]:
    return index.match(index.keys(tokens, salt))


def test_a_prompt_matches_the_stored_blocks_it_begins_with():
    index = PrefixIndex(SIZE)
    index.store("a", stored([1, 2, 3], [11, 12, 13]))
    index.store("b", stored([1], [21]))
    assert found(index, prompt(1, 2, 9)) == {"a": (32, 32), "b": (16, 16)}
    assert found(index, prompt(9, 1, 2)) == {}


def test_blocks_follow_the_parent_that_an_event_names():
    index = PrefixIndex(SIZE)
    index.store("a", stored([1, 2], [11, 12]))
    index.store("a", stored([3], [13], parent=12))
    index.store("a", stored([7], [17], parent=11))
    assert found(index, prompt(1, 2, 3)) == {"a": (48, 48)}
    assert found(index, prompt(1, 7)) == {"a": (32, 32)}


@pytest.mark.parametrize(
    "event",
    [
        stored([3], [13], parent=99),
        BlockStored((13,), (1,) * SIZE, SIZE, None, "GPU", lora_id=1),
        BlockStored((13,), (1,) * SIZE, SIZE, None, "GPU", lora_name="x"),
        BlockStored((13,), (1,) * 10, 10),
        BlockStored((13,), (1,) * (SIZE - 1), SIZE),
        BlockStored((13,), (), 0),
        BlockStored((13,), (2**31,) * SIZE, SIZE),
        BlockStored((13,), (2**63,) * SIZE, SIZE),
        BlockStored((13,), (-1,) * SIZE, SIZE),
    ],
    ids=[
        "unknown parent",
        "adapter",
        "adapter name",
        "other block size",
        "too few tokens",
        "empty",
        "no int32",
        "no int64",
        "negative",
    ],
)
def test_an_event_that_does_not_fit_is_counted_and_ignored(event: BlockStored):
    index = PrefixIndex(SIZE)
    index.store("a", event)
    assert index.ignored_events == 1
    assert found(index, prompt(1, 1)) == {}
    index.check_integrity()


def test_larger_blocks_of_events_match_in_parts():
    index = PrefixIndex(SIZE)
    tokens = tuple(int(token) for token in prompt(1, 2, 3, 4))
    index.store("a", BlockStored((5,), tokens, 4 * SIZE))
    assert found(index, prompt(1, 2, 3)) == {"a": (48, 48)}
    index.remove("a", BlockRemoved((5,)))
    assert found(index, prompt(1, 2, 3)) == {}


def test_a_block_on_a_disk_counts_apart_from_one_in_memory():
    index = PrefixIndex(SIZE)
    index.store("a", stored([1], [11], medium="CPU"))
    index.store("a", stored([1, 2], [11, 12], medium="DISK"))
    assert found(index, prompt(1, 2)) == {"a": (16, 32)}
    index.remove("a", BlockRemoved((11,), "CPU"))
    assert found(index, prompt(1, 2)) == {"a": (0, 32)}


def test_a_block_is_held_until_it_left_all_media():
    index = PrefixIndex(SIZE)
    index.store("a", stored([1], [11], medium="GPU"))
    index.store("a", stored([1], [11], medium="DISK"))
    index.remove("a", BlockRemoved((11,), "GPU"))
    assert found(index, prompt(1)) == {"a": (0, 16)}
    index.remove("a", BlockRemoved((11,), "DISK"))
    assert found(index, prompt(1)) == {}


def test_a_replica_is_assumed_to_hold_what_it_was_sent_for_a_time():
    now = [0.0]
    index = PrefixIndex(SIZE, assumed_seconds=10, clock=lambda: now[0])
    index.assume("a", index.keys(prompt(1, 2)))
    assert found(index, prompt(1, 2)) == {"a": (32, 32)}
    now[0] = 10.0
    assert found(index, prompt(1, 2)) == {}
    index.check_integrity()


def test_a_removed_block_is_not_assumed_any_longer():
    index = PrefixIndex(SIZE)
    index.assume("a", index.keys(prompt(1, 2)))
    index.store("a", stored([1, 2], [11, 12]))
    index.remove("a", BlockRemoved((12,)))
    assert found(index, prompt(1, 2)) == {"a": (16, 16)}


def test_prompts_of_another_salt_do_not_match():
    index = PrefixIndex(SIZE)
    index.assume("a", index.keys(prompt(1, 2), "tenant"))
    assert found(index, prompt(1, 2)) == {}
    assert found(index, prompt(1, 2), "other") == {}
    assert found(index, prompt(1, 2), "") == {}
    assert found(index, prompt(1, 2), "tenant") == {"a": (32, 32)}


def test_the_index_of_a_replica_is_bounded():
    index = PrefixIndex(SIZE, max_blocks=8)
    for number in range(100):
        index.store("a", stored([number], [number]))
        index.assume("a", index.keys(prompt(1000 + number)))
    assert index.n_blocks("a") == 8
    assert index.ignored_events == 92
    assert sum(bool(found(index, prompt(1000 + number))) for number in range(100)) == 8
    index.check_integrity()


def test_a_cleared_replica_holds_nothing():
    index = PrefixIndex(SIZE)
    for name in "ab":
        index.store(name, stored([1, 2], [11, 12]))
        index.assume(name, index.keys(prompt(1, 2, 3)))
    index.clear("a")
    assert found(index, prompt(1, 2, 3)) == {"b": (48, 48)}
    index.check_integrity()


REPLICAS = st.sampled_from("abc")
PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("store"), REPLICAS, PATHS, st.sampled_from(["GPU", "CPU", "DISK"])),
            st.tuples(st.just("remove"), REPLICAS, PATHS, st.sampled_from(["GPU", "CPU", "DISK"])),
            st.tuples(st.just("clear"), REPLICAS),
        ),
        max_size=30,
    ),
    asked=PATHS,
)
def test_any_events_leave_what_a_plain_model_has(steps: list[tuple], asked: list[int]):
    index = PrefixIndex(SIZE)
    held: dict[str, dict[tuple[int, ...], set[str]]] = {name: {} for name in "abc"}

    def hash_of(path: tuple[int, ...]) -> int:
        return hash(path) & (1 << 64) - 1

    for kind, replica, *rest in steps:
        own = held[replica]
        if kind == "clear":
            index.clear(replica)
            own.clear()
            continue
        path, medium = tuple(rest[0]), rest[1]
        prefixes = [path[:length] for length in range(1, len(path) + 1)]
        if kind == "store":
            index.store(replica, stored(list(path), [hash_of(each) for each in prefixes], medium=medium))
            for each in prefixes:
                own.setdefault(each, set()).add(medium)
        else:
            index.remove(replica, BlockRemoved((hash_of(path),), medium))
            if path in own:
                own[path].discard(medium)
                if not own[path]:
                    del own[path]
        index.check_integrity()
    expected = {}
    for replica, own in held.items():
        fast = total = 0
        for length in range(1, len(asked) + 1):
            media = own.get(tuple(asked[:length]))
            if media is None:
                break
            if fast == total and media & {"GPU", "CPU"}:
                fast = length
            total = length
        if total:
            expected[replica] = (fast * SIZE, total * SIZE)
    assert found(index, prompt(*asked)) == expected


def test_a_batch_of_events_survives_its_format():
    events = (stored([1], [2**64 - 1], parent=None, medium="CPU"), BlockRemoved((5,), "DISK"), AllBlocksCleared())
    assert decode_batch(encode_batch(1.5, events)) == events


def test_unknown_fields_of_events_are_ignored():
    import msgspec

    event = {"type": "BlockRemoved", "block_hashes": [3], "medium": "CPU", "new_field": [1, 2]}
    assert decode_batch(msgspec.msgpack.encode([0.0, [event], 0, "more"])) == (BlockRemoved((3,), "CPU"),)


@given(st.binary(max_size=64))
def test_bytes_that_are_no_events_raise_one_error(raw: bytes):
    try:
        decode_batch(raw)
    except KvEventError:
        pass
