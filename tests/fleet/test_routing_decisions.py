"""Which replica gets a request: by prefix, load, queue and chance."""

from __future__ import annotations

import weakref
from collections import Counter
from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from erllama.fleet.hot_prefixes import HotPrefixes
from erllama.fleet.kv_events import BlockRemoved, BlockStored
from erllama.fleet.loads import Load, LoadTable
from erllama.fleet.prefix_index import CachedPrefix, PrefixIndex
from erllama.fleet.prefix_router import PrefixRouter
from erllama.fleet.ranking import Candidate, rank, score

SIZE = 16
RANDOM = Random(7)


def prompt(*blocks: int) -> np.ndarray:
    return np.repeat(np.array(blocks, np.int32), SIZE)


def stats(identity: str = "model", slots: int = 4, tokens: int = 0, requests: int = 0) -> dict[str, object]:
    return {"identity": identity, "slots": slots, "load": [tokens, requests]}


def router(n: int = 3, **options: object) -> PrefixRouter:
    """Return a router of replicas "a", "b", ..., which all serve and have reported."""
    found = PrefixRouter(index=PrefixIndex(SIZE), random=Random(7), **options)  # type: ignore[arg-type]
    names = "abcdefgh"[:n]
    found.update(names, {name: stats() for name in names})
    return found


def send(route: PrefixRouter, name: str, tokens: np.ndarray, replicas: str = "abc", salt: str | None = None) -> str:
    """Route a request as Ray does, and return its replica."""
    route.expect(name, tokens, salt)
    chosen = route.rank(name, list(replicas))[0][0]
    route.sent(name, chosen)
    return chosen


def finish(route: PrefixRouter, name: str, replica: str, tokens: np.ndarray) -> None:
    route.begun(name)
    route.ended(name, replica, tokens)


def candidate(name: str, fast: int = 0, total: int = 0, tokens: int = 0, requests: int = 0) -> Candidate:
    return Candidate(name, CachedPrefix(fast, max(fast, total)), Load(tokens, requests))


# --- ranking ----------------------------------------------------------------------------------------


def test_the_longest_prefix_wins_on_idle_replicas():
    ranks = rank([candidate("a", 16), candidate("b", 64), candidate("c")], 1.0, RANDOM)
    assert ranks == [["b"], ["a"], ["c"]]


def test_a_replica_that_must_compute_more_first_than_it_saves_loses():
    ranks = rank([candidate("a", 1000, tokens=1100), candidate("b", 0)], 1.0, RANDOM)
    assert ranks[0] == ["b"]
    assert rank([candidate("a", 1000, tokens=1100), candidate("b", 0)], 0.5, RANDOM)[0] == ["a"]


def test_memory_wins_over_a_disk_and_a_disk_over_computing():
    ranks = rank([candidate("a"), candidate("b", 0, 100), candidate("c", 100)], 1.0, RANDOM)
    assert ranks == [["c"], ["b"], ["a"]]


def test_equal_scores_are_ordered_by_their_queues():
    ranks = rank([candidate("a", requests=3), candidate("b", requests=1), candidate("c", requests=2)], 1.0, RANDOM)
    assert ranks == [["b"], ["c"], ["a"]]


def test_equal_replicas_come_as_random_pairs():
    firsts = Counter(tuple(rank([candidate(name) for name in "abcd"], 1.0, RANDOM)[0]) for _ in range(600))
    assert {len(pair) for pair in firsts} == {2}
    assert len(firsts) == 12
    assert min(firsts.values()) > 10


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 4096), st.integers(0, 4096), st.integers(0, 9999), st.integers(0, 9)),
        min_size=1,
        max_size=12,
    ),
    st.floats(0, 4),
)
def test_every_replica_is_ranked_once_and_in_order(values: list[tuple[int, int, int, int]], weight: float):
    found = {str(place): candidate(str(place), *each) for place, each in enumerate(values)}
    ranks = rank(list(found.values()), weight, RANDOM)
    flat = [name for names in ranks for name in names]
    assert sorted(flat) == sorted(found)
    keys = [(-score(found[name], weight), found[name].load.requests) for name in flat]
    assert keys == sorted(keys)
    assert all(len(names) <= 2 for names in ranks)


# --- loads ------------------------------------------------------------------------------------------


def test_a_running_request_counts_what_it_computes_until_it_begins():
    loads = LoadTable()
    loads.sent("r", "a", prompt=100, cached=60)
    assert loads.of("a") == (40, 1)
    loads.begun("r")
    assert loads.of("a") == (0, 1)
    loads.ended("r")
    assert loads.of("a") == (0, 0)


def test_a_request_without_a_slot_counts_its_whole_prompt():
    loads = LoadTable()
    loads.report("a", 1, Load(0, 0))
    loads.sent("r1", "a", prompt=100, cached=100)
    assert loads.of("a") == (0, 1)
    loads.sent("r2", "a", prompt=100, cached=100)
    assert loads.of("a") == (100, 2)


def test_reported_loads_add_those_of_other_routers_only():
    loads = LoadTable()
    loads.sent("r", "a", prompt=100, cached=0)
    loads.report("a", 4, Load(350, 5))
    assert loads.of("a") == (350, 5)
    loads.ended("r")
    assert loads.of("a") == (250, 4)


@given(
    st.lists(
        st.tuples(st.sampled_from(["sent", "begun", "ended", "forget"]), st.integers(0, 5), st.sampled_from("ab"))
    )
)
def test_loads_return_to_zero_when_all_requests_end(steps: list[tuple[str, int, str]]):
    loads = LoadTable()
    for kind, number, replica in steps:
        if kind == "sent":
            loads.sent(str(number), replica, prompt=10, cached=3)
        elif kind == "forget":
            loads.forget(replica)
        else:
            getattr(loads, kind)(str(number))
        assert min(loads.of(replica)) >= 0
    for number in range(6):
        loads.ended(str(number))
    assert loads.of("a") == loads.of("b") == (0, 0)


# --- the router -------------------------------------------------------------------------------------


def test_a_conversation_stays_where_its_prefix_is():
    route = router()
    turns = prompt(1)
    first = send(route, "0", turns)
    finish(route, "0", first, turns)
    for number in range(1, 6):
        turns = np.concatenate([turns, prompt(10 + number)])
        assert send(route, str(number), turns) == first
        finish(route, str(number), first, turns)
    counts = route.counts()
    assert (counts.requests, counts.spilled) == (6, 0)
    assert counts.expected_tokens == counts.prompt_tokens - 6 * SIZE


def test_the_tokens_of_a_reply_count_as_cached():
    route = router()
    first = send(route, "0", prompt(1))
    finish(route, "0", first, prompt(1, 2, 3))
    assert route.longest(prompt(1, 2, 3, 4), None) == 3 * SIZE


def test_cold_prompts_spread_over_all_replicas_at_once():
    route = router()
    chosen = Counter(send(route, str(number), prompt(100 + number)) for number in range(30))
    assert chosen == {"a": 10, "b": 10, "c": 10}


def test_cold_prompts_spread_before_they_are_sent():
    route = router()
    for number in range(30):
        route.expect(str(number), prompt(100 + number), None)
    chosen = Counter(route.rank(str(number), list("abc"))[0][0] for number in range(30))
    assert chosen == {"a": 10, "b": 10, "c": 10}


def test_cold_prompts_one_after_another_go_to_different_replicas():
    route = router()
    chosen = Counter()
    for number in range(300):
        name = send(route, str(number), prompt(100 + number))
        finish(route, str(number), name, prompt(100 + number))
        chosen[name] += 1
    assert min(chosen.values()) > 50


def test_a_hot_prefix_spills_over_when_its_replica_is_queued():
    route = router()
    hot = prompt(*range(20))
    first = send(route, "warm", hot)
    finish(route, "warm", first, hot)
    chosen = [send(route, str(number), np.concatenate([hot, prompt(50 + number)])) for number in range(24)]
    assert chosen[:4] == [first] * 4  # as many as it runs at once
    assert set(chosen) == set("abc")
    assert route.counts().spilled > 0


def test_a_hot_prefix_returns_when_the_queue_is_gone():
    route = router()
    hot = prompt(*range(20))
    first = send(route, "warm", hot)
    finish(route, "warm", first, hot)
    names = [str(number) for number in range(12)]
    chosen = {name: send(route, name, hot) for name in names}
    for name in names:
        finish(route, name, chosen[name], hot)
    assert send(route, "next", np.concatenate([hot, prompt(99)])) in set(chosen.values())


def test_events_of_replicas_decide_for_another_router():
    route = router()
    tokens = tuple(int(token) for token in prompt(1, 2))
    route.apply("b", (BlockStored((1, 2), tokens, SIZE),))
    assert send(route, "0", prompt(1, 2, 3)) == "b"
    finish(route, "0", "b", prompt(1))
    route.apply("b", (BlockRemoved((1, 2)),))
    assert route.longest(prompt(1, 2), None) == 0


def test_events_of_a_replica_that_is_gone_have_no_effect():
    route = router(2)
    tokens = tuple(int(token) for token in prompt(1))
    route.apply("x", (BlockStored((1,), tokens, SIZE),))
    assert route.longest(prompt(1), None) == 0
    route.apply("a", (BlockStored((1,), tokens, SIZE),))
    route.update("b", {"b": stats()})
    assert route.longest(prompt(1), None) == 0


def test_a_replica_that_returns_is_cold():
    route = router(2)
    name = send(route, "0", prompt(1), "ab")
    finish(route, "0", name, prompt(1))
    route.update("ab".replace(name, ""), {})
    route.update("ab", {})
    assert route.longest(prompt(1), None) == 0


def test_salted_prompts_are_routed_to_their_own_prefix():
    route = router()
    name = send(route, "0", prompt(1, 2, 3), salt="tenant")
    finish(route, "0", name, prompt(1, 2, 3))
    for number in range(5):
        assert send(route, f"s{number}", prompt(1, 2, 3, 4), salt="tenant") == name
        finish(route, f"s{number}", name, prompt(1, 2, 3))
    assert route.longest(prompt(1, 2, 3), None) == 0


def test_a_replica_with_another_model_gets_no_requests():
    route = router()
    route.update("abc", {"a": stats(), "b": stats("other"), "c": stats()})
    route.use_identity("model")
    assert route.accepted() == ("a", "c")
    chosen = {send(route, str(number), prompt(number)) for number in range(30)}
    assert chosen == {"a", "c"}
    assert route.counts().refused_replicas == 1


def test_a_replica_whose_model_is_right_again_gets_requests():
    route = router()
    route.use_identity("model")
    route.update("abc", {name: stats("other" if name == "b" else "model") for name in "abc"})
    route.update("ac", {name: stats() for name in "ac"})
    route.update("abc", {name: stats() for name in "abc"})
    assert route.accepted() == ("a", "b", "c")


def test_if_all_replicas_have_another_model_one_refuses_the_request():
    route = router()
    route.update("abc", {name: stats("other") for name in "abc"})
    route.use_identity("model")
    assert route.accepted() == ()
    assert send(route, "0", prompt(1)) in "abc"


def test_round_robin_takes_turns_whatever_the_prefix():
    route = router(policy="round_robin")
    chosen = [send(route, str(number), prompt(1, 2, 3)) for number in range(6)]
    assert chosen == ["b", "c", "a", "b", "c", "a"]


def test_random_ignores_the_prefix():
    route = router(policy="random")
    chosen = Counter(send(route, str(number), prompt(1, 2, 3)) for number in range(300))
    assert min(chosen.values()) > 60


def test_the_hottest_prefixes_are_those_that_prompts_share():
    route = router()
    for number in range(5):
        send(route, f"x{number}", prompt(1, 2, 100 + number))
    for number in range(3):
        send(route, f"y{number}", prompt(7, 200 + number))
    found = route.hottest(2)
    assert [(each.uses, each.tokens.tolist()) for each in found] == [
        (5, prompt(1, 2).tolist()),
        (3, prompt(7).tolist()),
    ]


def test_counted_prompts_are_not_kept():
    hot, index = HotPrefixes(SIZE), PrefixIndex(SIZE)
    for number in range(2):
        tokens = prompt(*range(50), 100 + number)
        hot.count(index.keys(tokens), tokens, None)
        kept = weakref.ref(tokens)
        del tokens
        assert kept() is None
    assert [each.tokens.tolist() for each in hot.hottest(3)] == [prompt(*range(50)).tolist()]


@given(st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=12), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_hot_prefixes_begin_their_prompts_whatever_was_dropped(prompts: list[list[int]], max_tracked: int):
    hot, index = HotPrefixes(SIZE, max_tracked), PrefixIndex(SIZE)
    for blocks in prompts:
        hot.count(index.keys(prompt(*blocks)), prompt(*blocks), None)
    for found in hot.hottest(10):
        with_it = [each for each in prompts if prompt(*each)[: len(found.tokens)].tolist() == found.tokens.tolist()]
        assert len(with_it) >= found.uses > 1


def test_changes_of_the_replicas_are_announced():
    route, seen = router(), []
    route.on_change = seen.append
    route.update("ab", {})
    assert seen == [("a", "b")]
