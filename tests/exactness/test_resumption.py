"""Replies that are interrupted and resumed on another model thread equal uninterrupted ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erllama.cache import Cache, Policy
from erllama.engine import Completion, Grammar, Markers, PhaseOptions, Request, RequestOptions, SamplingOptions
from erllama.engine.backends.stub import EOG
from erllama.engine.speculation import DecodeCosts, NgramDrafter
from erllama.testing.models import write_gemma3, write_lfm2, write_llama, write_mamba
from support.recording_backend import RecordingBackend, llama_backend, prompt_of, same_bits
from support.resumption import LIKELY, STOP, VOCABULARY, Life, LikelyStub, Record, comparable, events_of
from support.scripted_backend import START, ScriptedBackend

N = int(os.environ.get("ERLLAMA_RESUMPTIONS", "60"))  # `make stress` runs more
POLICY = Policy(continued_interval=16)


@pytest.fixture(autouse=True)
def always_paying(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the stub, one more row costs as much as a decode, so no token would ever be drafted."""
    monkeypatch.setattr(DecodeCosts, "ratio", lambda self, n_rows, more: 1.0)


# --- random requests -----------------------------------------------------------------------------------

SAMPLING: list[dict[str, object]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "xtc_probability": 0.5, "xtc_threshold": 0.05},  # draws numbers, too
    {"temperature": 0.0, "repeat_penalty": 1.4, "repeat_last_n": 16},
    {"temperature": 0.0, "dry_multiplier": 0.8, "dry_allowed_length": 1},
    {"temperature": 1.5},
    {"temperature": 1.0, "mirostat": 1},
    {"temperature": 1.0, "mirostat": 2, "mirostat_tau": 3.0},
    {"temperature": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    {"temperature": 1.2, "dry_multiplier": 0.8, "dry_allowed_length": 1},
    {"temperature": 1.0, "repeat_penalty": 1.3, "frequency_penalty": 0.3, "presence_penalty": 0.2},
    {"temperature": 1.0, "dynatemp_range": 0.5, "typical_p": 0.9},
    {"temperature": 1.0, "top_n_sigma": 1.5, "top_k": 0},
    {"temperature": 1.0, "logit_bias": {EOG: 2.0}, "banned_tokens": [STOP]},
]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 6}, "b": {"enum": ["aé", "b", 12]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
GRAMMARS = [
    Grammar.json_schema(SCHEMA),
    Grammar.regex("[ab]{2,9}"),
    Grammar.regex("(é|ab )*"),
    Grammar.gbnf('root ::= "a bé" [ab]{1,3} "<a b>é☃" [ab]+'),
]
CALL = Grammar.gbnf('root ::= ("<c>{ab" [ab]{1,4} "}</c>" " "?)+')
STOPS = ["ab", "b a", "é", "☃", "<|stop|>", "\n", "a<", "aa"]


def texts(min_size: int, max_size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.sampled_from(LIKELY), min_size=min_size, max_size=max_size)


@st.composite
def phase_options(draw: st.DrawFn) -> PhaseOptions:
    budget = draw(st.none() | st.integers(0, 6))
    calls_only = draw(st.integers(0, 5)) == 0
    return PhaseOptions(
        thinking=Markers(("<t>", "<|t|>"), ("</t>",)),
        calls=Markers(("<c>",), ("</c>",)),
        payload=draw(st.sampled_from([None, Markers(("{",), ("}",))])),
        leading=draw(st.sampled_from([(), ('{"a',)])),
        skip=draw(st.sampled_from([(), ("\n",)])),
        call_grammar=CALL if calls_only or draw(st.booleans()) else None,
        calls_only=calls_only,
        starts_in_thinking=draw(st.sampled_from([None, True, True, False])),
        open_marker=draw(st.sampled_from(["", "", "", "<c>", "<"])),
        thinking_budget=budget,
        budget_message=draw(st.sampled_from(["", " ab☃ "])),
        signing_key=draw(st.sampled_from([None, b"key"])),
    )


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Draw a request; one in three for a reply that is all text."""
    sampling = SamplingOptions(seed=draw(st.integers(0, 99)), **draw(st.sampled_from(SAMPLING)))  # type: ignore[arg-type]
    options: dict[str, object] = {"sampling": sampling, "max_tokens": draw(st.integers(1, 90))}
    if draw(st.integers(0, 2)):
        phases = draw(st.none() | phase_options())
        options["phases"] = phases
        if draw(st.booleans()) and not (phases and phases.calls_only):
            options["grammar"] = draw(st.sampled_from(GRAMMARS))
            options["grammar_triggers"] = draw(st.sampled_from([(), (), ("<",), ("a", "☃"), (STOP,)]))
        options["stop"] = draw(st.lists(st.sampled_from(STOPS), max_size=2))
        options["stop_token_ids"] = draw(st.sampled_from([(), (), (STOP,), (EOG,)]))
        options["logprobs"] = draw(st.none() | st.integers(0, 3))
        if draw(st.booleans()):
            options["speculative"] = NgramDrafter
    if "speculative" not in options:
        options["reproducible"] = draw(st.booleans())
    prompt = draw(texts(1, 40))
    return Request(np.array(prompt, np.int32), RequestOptions(**options))  # type: ignore[arg-type]


# --- the stub: to the token, the piece and the bit --------------------------------------------------------


def make_cache(request: Request, n_warm: int, stub: Callable[[], LikelyStub]) -> Cache:
    """Return a cache that has the first tokens of a prompt."""
    cache = Cache(block_size=16)
    if n_warm:
        options = RequestOptions(max_tokens=0, reproducible=request.options.reproducible)
        Life(Request(request.prompt[:n_warm], options), stub(), cache, policy=POLICY)
    return cache


@settings(max_examples=N)
@given(
    requests(),
    st.lists(st.tuples(st.integers(1, 25), st.integers(1, 3)), min_size=1, max_size=3),
    st.fixed_dictionaries(
        {
            "can_trim": st.sampled_from([True, True, False]),
            "n_ctx": st.sampled_from([64, 1024, 1024]),
            "end_bias": st.sampled_from([-100.0, 4.0, 7.0]),
        }
    ),
    st.sampled_from([(0, True), (0, False), (20, True)]),
    st.integers(0, 2),
    st.booleans(),
)
def test_an_interrupted_reply_continues_as_if_it_had_not_been(
    asked: Request,
    cuts: list[tuple[int, int]],
    sizes: dict[str, object],
    caching: tuple[int, bool],
    n_beside: int,
    reads_events: bool,
) -> None:
    """Each cut is a number of ticks, and after how many of them the progress is recorded each time.

    `caching` is how many tokens of the prompt the cache has, and whether it stays.
    """
    n_warm, keeps_cache = caching

    def stub() -> LikelyStub:
        return LikelyStub(n_ubatch=16, n_batch=64, **sizes)  # type: ignore[arg-type]

    with make_cache(asked, n_warm, stub) as cache:
        expected = Life(asked, stub(), cache, policy=POLICY)
    record, resumed = Record(), asked
    cache = make_cache(asked, n_warm, stub)
    n_beside = 0 if sizes["n_ctx"] == 64 else n_beside
    for n_ticks, every in cuts:
        life = Life(
            resumed, stub(), cache, record, kill_after=n_ticks, every=every, n_beside=n_beside, policy=POLICY
        )
        if life.outcome is not None:
            break
        assert record.progress is not None
        resumed = replace(asked, resumed=record.progress)
        if not keeps_cache:
            cache.close()
            cache = Cache(block_size=16)
    if life.outcome is None:
        life = Life(resumed, stub(), cache, None if reads_events else record, policy=POLICY)
    cache.close()
    without = ["finish_key", "cache_delta"] if ended_at_once(life.outcome) else []
    if any(every > 1 for _, every in cuts):
        without.append("cache_delta")  # blocks may have been saved after the last progress
    assert comparable(life.outcome, *without) == comparable(expected.outcome, *without)
    pieces_before = events_of(asked, record.pieces, None if life.events else life.outcome, VOCABULARY)
    assert pieces_before + life.events == expected.events


def ended_at_once(outcome: object) -> bool:
    """Whether a reply had ended when it was resumed. It is not computed again, so its KV is not stored."""
    return isinstance(outcome, Completion) and outcome.timings.restore == 0


PHASES = PhaseOptions(
    thinking=Markers(("<t>",), ("</t>",)), calls=Markers(("<c>",), ("</c>",)), payload=Markers(("{",), ("}",))
)


@pytest.mark.parametrize("options", [{}, {"stop": ("b☃c",)}, {"phases": PHASES, "stop": ("b☃d", "x")}])
def test_a_reply_may_be_cut_after_each_of_its_bytes(options: dict[str, object]) -> None:
    """Characters, markers and stop strings straddle the cuts."""
    reply = VOCABULARY.byte_tokens('aé☃ <t>b☃</t> "é<c>{"☃"}</c> ab☃b☃ce')
    asked = Request(
        np.array([START], np.int32),
        RequestOptions(sampling=SamplingOptions(temperature=0.0, seed=1), **options),  # type: ignore[arg-type]
    )
    with Cache(block_size=16) as cache:
        expected = Life(asked, ScriptedBackend(VOCABULARY, reply), cache)
    assert isinstance(expected.outcome, Completion)
    n_cuts = 0
    for n_ticks in range(1, len(reply) + 2):
        record = Record()
        with Cache(block_size=16) as cache:
            life = Life(asked, ScriptedBackend(VOCABULARY, reply), cache, record, kill_after=n_ticks)
            if life.outcome is None:
                resumed = replace(asked, resumed=record.progress)
                life = Life(resumed, ScriptedBackend(VOCABULARY, reply), cache)
                n_cuts += 1
        without = ("finish_key", "cache_delta") if ended_at_once(life.outcome) else ()
        assert comparable(life.outcome, *without) == comparable(expected.outcome, *without)
        pieces = None if life.events else life.outcome
        assert events_of(asked, record.pieces, pieces, VOCABULARY) + life.events == expected.events
    assert n_cuts >= len(expected.outcome.tokens)


# --- libllama: to the bit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_llama, write_gemma3, write_mamba, write_lfm2])
@pytest.mark.parametrize("keeps_cache", [True, False])
def test_reproducible_replies_on_libllama_keep_their_bits(
    write: Callable[..., Path], keeps_cache: bool, tmp_path: Path
) -> None:
    path = write(tmp_path / "model.gguf", seed=1)

    def backend() -> RecordingBackend:
        return RecordingBackend(llama_backend(path, n_ubatch=64))

    first = backend()
    ends = np.flatnonzero(first.vocabulary.is_eog).tolist()
    sampling = SamplingOptions(temperature=1.5, seed=7, top_k=0, banned_tokens=ends)
    options = RequestOptions(reproducible=True, max_tokens=60, logprobs=2, sampling=sampling)
    asked = Request(prompt_of(5, 150), options)
    with Cache(block_size=32) as cache:
        expected = Life(asked, first, cache)
    assert isinstance(expected.outcome, Completion)
    for n_ticks in (2, 5, 20, 40):
        record, resumed = Record(), asked
        cache = Cache(block_size=32)
        for kill_after in (n_ticks, 6, None):
            later = backend()
            life = Life(resumed, later, cache, record, kill_after=kill_after)
            assert record.progress is not None
            resumed = replace(asked, resumed=record.progress)
            if not keeps_cache:
                cache.close()
                cache = Cache(block_size=32)
        cache.close()
        assert comparable(life.outcome) == comparable(expected.outcome)
        assert len(later.logits) < len(first.logits)
        assert same_bits(later.logits, first.logits[len(first.logits) - len(later.logits) :])
        found = events_of(asked, record.pieces, life.outcome, first.vocabulary)
        assert found == expected.events
