"""Phases of a reply: recognized by their markers for any division of the text into tokens."""

from __future__ import annotations

import hashlib
import hmac
import re
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import erllama
from erllama.engine.output.phase_options import Markers, PhaseOptions
from erllama.engine.output.phases import PhaseTracker
from erllama.engine.output.token_codec import TokenCodec
from erllama.testing.scripted import END, write_scripted
from support.examples import examples
from support.recording_backend import first_by_position
from support.scripted_backend import PieceVocabulary, ScriptedBackend

# Markers with common beginnings. One of them is a special token without text; \u0001 stands for it below.
SPECIAL = "<|think|>"
VOCABULARY = PieceVocabulary(["he", "llo", "<", "</", "think", ">", "</think>", "<call>", "é", " {"], [SPECIAL])
CODEC = TokenCodec(VOCABULARY)
OPTIONS = PhaseOptions(
    thinking=Markers(("<think>", SPECIAL), ("</think>",)),
    calls=Markers(("<call>",), ("</call>", "</c>")),
    payload=Markers(("{",), ("}",)),
    skip=("<skip>",),
)
PARTS = ["a", "é", "<", "</", *"{}", "<think>", "</think>", SPECIAL, "<call>", "</call>", "</c>", "<skip>", " x"]
BARE = ['{ "name" : 1}', ' [ {"name":2}]', '{"nam', '{"nope":1}', "no", '<think>x</think>{"name":3}']


def phases_of(tokens: Sequence[int], options: PhaseOptions = OPTIONS, prompt: str = "") -> list[tuple[str, str]]:
    """Return the phases of a reply and their texts, without empty phases that do not end."""
    tracker = PhaseTracker(options, CODEC, VOCABULARY.tokenize(prompt))
    phases: list[tuple[str, bytes]] = []
    over = True
    segments = [segment for token in tokens for segment in tracker.feed(token)] + tracker.finish()
    for kind, encoded, ended in segments:
        if over or phases[-1][0] != kind:
            phases.append((kind, b""))
        phases[-1] = (kind, phases[-1][1] + CODEC.decode(encoded))
        over = ended
    return [(kind, reply_text.decode()) for kind, reply_text in phases]


def expected(text: str) -> list[tuple[str, str]]:
    """Return the same for a whole text, by repeated search for the next marker."""
    phases: list[tuple[str, str]] = []

    def say(kind: str, reply_text: str, over: bool) -> None:
        if phases and phases[-1][0] == kind and not ended[0]:
            phases[-1] = (kind, phases[-1][1] + reply_text)
        elif reply_text or over:
            phases.append((kind, reply_text))
        ended[0] = over

    ended = [True]
    kind, rest = "text", text
    while rest or kind == "call":
        marks = {"text": r"<think>|\x01|<call>|<skip>", "thinking": r"</think>", "call": r"</call>|</c>"}[kind]
        found = re.search(marks, rest)
        if found is None:
            say(kind, rest, kind == "call")
            break
        mark = found.group()
        if found.start():
            say(kind, rest[: found.start()], False)
        rest = rest[found.end() :]
        if kind == "thinking":
            say(kind, "", True)
            kind = "text"
        elif kind == "call":
            say(kind, mark, True)
            kind = "text"
        elif mark in ("<think>", "\x01"):
            kind = "thinking"
        elif mark == "<call>":
            kind = "call"
            say(kind, mark, False)
    return [(kind, reply_text.replace("\x01", SPECIAL)) for kind, reply_text in phases]


@st.composite
def cut_texts(draw: st.DrawFn, parts: Sequence[str] = PARTS) -> tuple[str, list[int]]:
    """Draw a text and one of the token sequences that spell it."""
    text = "".join(draw(st.lists(st.sampled_from(parts), max_size=12))).replace(SPECIAL, "\x01")
    tokens: list[int] = []
    raw = text.encode()
    while raw:
        ids = VOCABULARY.tokens_that_start(raw) if not raw.startswith(b"\x01") else [VOCABULARY.special[SPECIAL]]
        token = draw(st.sampled_from(ids))
        tokens.append(token)
        raw = raw[len(VOCABULARY.piece(token)) or 1 :]
    return text, tokens


@settings(max_examples=examples(375), deadline=None)
@given(cut_texts())
def test_phases_do_not_depend_on_token_boundaries(cut: tuple[str, list[int]]) -> None:
    text, tokens = cut
    assert phases_of(tokens) == expected(text)


@settings(max_examples=examples(75), deadline=None)
@given(cut_texts())
def test_only_text_that_may_become_a_marker_is_held_back(cut: tuple[str, list[int]]) -> None:
    tracker = PhaseTracker(OPTIONS, CODEC, np.zeros(0, np.int32))
    markers = ["<think>", "</think>", "<call>", "</call>", "</c>", "<skip>", "{", "}"]
    for token in cut[1]:
        tracker.feed(token)
        assert not tracker.buffer or any(marker.startswith(tracker.buffer) for marker in markers)


def test_a_special_token_differs_from_its_spelled_name() -> None:
    assert phases_of([*VOCABULARY.byte_tokens(SPECIAL), ord("x")]) == [("text", f"{SPECIAL}x")]
    assert phases_of([VOCABULARY.special[SPECIAL], ord("x")]) == [("thinking", "x")]


def test_a_phase_opened_by_the_prompt_is_recognized() -> None:
    assert phases_of(VOCABULARY.byte_tokens("so</think>yes"), prompt="Question?<think>\n") == [
        ("thinking", "so"),
        ("text", "yes"),
    ]
    assert phases_of(VOCABULARY.byte_tokens("so"), prompt="Question?<think>\n</think>\n") == [("text", "so")]
    closed = PhaseOptions(thinking=OPTIONS.thinking, starts_in_thinking=False)
    assert phases_of(VOCABULARY.byte_tokens("so"), closed, prompt="<think>") == [("text", "so")]


@settings(max_examples=examples(75), deadline=None)
@given(st.sampled_from(BARE), st.data())
def test_a_call_without_markers_is_recognized_by_its_start(text: str, data: st.DataObject) -> None:
    options = PhaseOptions(thinking=OPTIONS.thinking, calls=Markers(("<call>",)), leading=('{"name":', '[{"name":'))
    tokens: list[int] = []
    raw = text.encode()
    while raw:
        tokens.append(data.draw(st.sampled_from(VOCABULARY.tokens_that_start(raw))))
        raw = raw[len(VOCABULARY.piece(tokens[-1])) :]
    kinds = [kind for kind, _ in phases_of(tokens, options)]
    assert kinds[-1] == ("call" if '"name"' in text else "text")
    assert phases_of(tokens, options)[-1][1].strip() == text.split("</think>")[-1].strip()


SCRIPTED = "<think>hmé.\n</think> Let go: <call>{7}</call>!"


@settings(max_examples=examples(15), deadline=None)
@given(st.sets(st.integers(1, len(SCRIPTED) - 1)))
def test_phases_on_libllama_do_not_depend_on_token_boundaries(cuts: set[int]) -> None:
    edges = [0, *sorted(cuts), len(SCRIPTED)]
    pieces = [SCRIPTED[start:end] for start, end in pairwise(edges)]
    # Each token determines the next one. A token that occurs twice is joined with its successor.
    while len(set(pieces)) < len(pieces) or any(not piece.isascii() and len(piece) == 1 for piece in pieces):
        at = next(i for i, p in enumerate(pieces) if pieces.count(p) > 1 or (not p.isascii() and len(p) == 1))
        at = min(at, len(pieces) - 2)
        pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
    with tempfile.TemporaryDirectory() as place:
        chain = ["<|go|>", *pieces, END]
        words = [piece for piece in pieces if len(piece) > 1]
        path = write_scripted(Path(place) / "model.gguf", dict(pairwise(chain)), words=words, special=["<|go|>"])
        with erllama.load_model(path, n_ctx=256, cache=erllama.Cache(), warmup=False, n_threads=1) as model:
            stream = model.stream("<|go|>", temperature=0.0, thinking="enabled", **MARKERS)
            deltas = [event for event in stream if isinstance(event, erllama.ThinkingDelta | erllama.ToolCallDelta)]
            reply = stream.result()
    assert (reply.thinking, reply.text, reply.raw_tool_calls) == ("hmé.", "Let go:!", (b"<call>{7}</call>",))
    assert len(reply.tokens) == len(pieces)
    assert "".join(event.text for event in deltas) == "hmé.<call>{7}</call>"


# --- through the engine ----------------------------------------------------------------------------


def model_replying(*tokens: int, **sizes: int) -> erllama.Model:
    return erllama.load_backend(ScriptedBackend(VOCABULARY, tokens, **sizes), cache=erllama.Cache())


MARKERS = {"thinking_markers": ("<think>", "</think>"), "tool_markers": ("<call>", "</call>")}


def test_a_stream_separates_thinking_and_calls_from_text() -> None:
    reply_text = "<think> hm\n</think>\n\nYes. <call>{1}</call> Done"
    with model_replying(*VOCABULARY.byte_tokens(reply_text)) as model:
        events = list(model.stream("Q\t", thinking="enabled", thinking_signing_key=b"k", **MARKERS))
        kinds = [type(event).__name__ for event in events]
        order = [kind for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
        assert order == [
            "ThinkingDelta", "ThinkingEnd", "TextDelta", "ToolCallDelta", "ToolCallEnd", "TextDelta", "Done"
        ]  # fmt: skip
        joined = {
            kind: "".join(e.text for e in events if type(e).__name__ == kind)
            for kind in set(order)
            if "Delta" in kind
        }
        assert joined == {"ThinkingDelta": "hm", "TextDelta": "Yes.Done", "ToolCallDelta": "<call>{1}</call>"}
        signature = hmac.digest(b"k", b"hm", hashlib.sha256)
        assert [e.signature for e in events if isinstance(e, erllama.ThinkingEnd)] == [signature]
        assert [e.full for e in events if isinstance(e, erllama.ToolCallEnd)] == [b"<call>{1}</call>"]
        done = events[-1].completion
        assert (done.text, done.thinking, done.raw_tool_calls) == ("Yes.Done", "hm", (b"<call>{1}</call>",))
        assert done.thinking_signature == signature
        assert VOCABULARY.detokenize(done.tokens).decode() == reply_text
        without_key = model.complete("Q\t", thinking="enabled", **MARKERS)
        assert without_key.thinking_signature == b""


def test_without_thinking_a_stream_is_plain_text() -> None:
    reply_text = "<think>hm</think>yes"
    with model_replying(*VOCABULARY.byte_tokens(reply_text)) as model:
        for options in ({}, {"thinking": "disabled"}, {"thinking": False}):
            events = list(model.stream("Q\t", **options))
            assert {type(e) for e in events} == {erllama.TextDelta, erllama.Done}
            assert events[-1].completion.text == reply_text


@settings(max_examples=examples(25), deadline=None)
@given(st.text("a <\n", max_size=20))
def test_a_reply_without_markers_is_unchanged(text: str) -> None:
    with model_replying(*VOCABULARY.byte_tokens(text)) as model:
        stream = model.stream("Q\t", thinking="enabled", **MARKERS)
        joined = "".join(event.text for event in stream if isinstance(event, erllama.TextDelta))
        assert joined == stream.result().text == text


def test_stop_strings_apply_to_the_answer_only() -> None:
    reply_text = "<think>END</think>a<call>END</call>bENDc"
    with model_replying(*VOCABULARY.byte_tokens(reply_text)) as model:
        reply = model.complete("Q\t", thinking="enabled", stop="END", **MARKERS)
        assert (reply.thinking, reply.text, reply.stop_sequence) == ("END", "ab", "END")
        assert reply.raw_tool_calls == (b"<call>END</call>",)


WHITE_STOPS = ["\n", "\n\n", " ", "END", "\n\nEND", " x", "\u00e9\n"]


def expected_reply(text: str, stops: Sequence[str]) -> tuple[str, str, list[bytes], str | None, int]:
    """Return answer, thinking, calls and stop string of a whole reply, and how many of its thinking phases end."""
    answer = thinking = ""
    calls: list[bytes] = []
    n_ends = 0
    kind, rest, begun = "text", text, False
    while True:
        found = re.search({"text": "<think>|<call>", "thinking": "</think>", "call": "</call>"}[kind], rest)
        reply_text, mark, rest = rest.partition(found.group()) if found else (rest, "", "")
        shown = reply_text.replace("\x01", "")
        if kind == "text":
            kept, stop = first_by_position(shown, list(stops), behind=begun)
            kept = kept.lstrip() if begun else kept
            answer += kept.rstrip() if mark and stop is None else kept
            if stop is not None:
                return answer, thinking, calls, stop, n_ends
        elif kind == "thinking":
            thinking += shown.strip()
            n_ends += bool(mark)
        else:
            calls.append(f"<call>{reply_text}{mark}".replace("\x01", SPECIAL).encode())
        if not mark:
            return answer, thinking, calls, None, n_ends
        kind = {"<think>": "thinking", "<call>": "call"}.get(mark, "text")
        begun = True


@settings(max_examples=examples(150), deadline=None)
@given(
    cut_texts([*PARTS, "END", "E", "\n", "\n\n", " ", "<think> ", "</think>\n\n"]),
    st.lists(st.sampled_from(WHITE_STOPS), max_size=2),
    st.sampled_from([None, 0]),
)
def test_stream_events_add_up_to_the_reply(
    cut: tuple[str, list[int]], stops: list[str], logprobs: int | None
) -> None:
    text, tokens = cut
    with model_replying(*tokens) as model:
        *events, done = model.stream("Q\t", thinking="enabled", stop=stops, logprobs=logprobs, **MARKERS)
    reply = done.completion
    ends = [event for event in events if isinstance(event, erllama.ThinkingEnd)]
    expected = expected_reply(text, stops)
    assert (reply.text, reply.thinking, list(reply.raw_tool_calls), reply.stop_sequence, len(ends)) == expected
    deltas = [event for event in events if hasattr(event, "tokens")]
    for kind, reply_text in ((erllama.TextDelta, reply.text), (erllama.ThinkingDelta, reply.thinking)):
        assert "".join(event.text for event in deltas if isinstance(event, kind)) == reply_text
    assert all(event.text or event.tokens for event in deltas)
    streamed = tuple(token for event in deltas for token in event.tokens)
    assert streamed == reply.tokens if reply.stop_sequence is None else streamed == reply.tokens[: len(streamed)]
    if logprobs is not None:
        assert all(event.tokens == tuple(entry.token for entry in event.logprobs) for event in deltas)


@pytest.mark.parametrize("said", ["\n<think>", " \n<think>hm", "\n<call>", "\n<call>1</call>"])
def test_white_space_before_a_marker_is_not_text(said: str) -> None:
    with model_replying(*VOCABULARY.byte_tokens(said)) as model:
        assert model.complete("Q\t", thinking="enabled", **MARKERS).text == ""


@pytest.mark.parametrize(
    ("reply_text", "stop", "text", "n_left"),
    [
        ("answer\n\n\nmore", "\n", "answer", 6),
        ("<think>hm</think>\n\nanswer\n\nmore", "\n\n", "answer", 4),
        ("<think>hm</think>\n\nEND", ["\n", "\n\nEND"], "", 0),
        ("one two", " ", "one", 3),
        ("one \n<call>1</call>", "\n", "one ", 14),
    ],
)
def test_a_stop_string_of_white_space_stops_at_once(
    reply_text: str, stop: str | list[str], text: str, n_left: int
) -> None:
    with model_replying(*VOCABULARY.byte_tokens(reply_text)) as model:
        reply = model.complete("Q\t", thinking="enabled", stop=stop, **MARKERS)
        assert (reply.text, reply.finish_reason, reply.raw_tool_calls) == (text, "stop", ())
        assert len(reply.tokens) == len(reply_text) - n_left


@pytest.mark.parametrize(
    "reply_text", ["<think></think>x", "<think>\n\n</think>x", "<think></think>", "<think>\n</think>\n"]
)
@pytest.mark.parametrize("key", [None, b"k"])
def test_empty_thinking_ends_like_any_other(reply_text: str, key: bytes | None) -> None:
    with model_replying(*VOCABULARY.byte_tokens(reply_text)) as model:
        events = list(model.stream("Q\t", thinking="enabled", thinking_signing_key=key, **MARKERS))
    signature = hmac.digest(key, b"", hashlib.sha256) if key is not None else b""
    assert [event for event in events if isinstance(event, erllama.ThinkingEnd)] == [erllama.ThinkingEnd(signature)]
    assert all(event.tokens for event in events if isinstance(event, erllama.ThinkingDelta))
    assert events[-1].completion.thinking_signature == signature


@pytest.mark.parametrize("logprobs", [None, 1])
@pytest.mark.parametrize("budget", [0, 1, 3, 100])
@pytest.mark.parametrize("opened", [False, True])
def test_thinking_ends_at_its_budget_and_the_answer_follows(
    budget: int, opened: bool, logprobs: int | None
) -> None:
    thought = "abcdefgh"
    reply_text = [*VOCABULARY.byte_tokens("" if opened else "<think>"), *VOCABULARY.byte_tokens(thought)]
    # The next token depends on the number of tokens. The reply ends after 40.
    with model_replying(*reply_text, *VOCABULARY.byte_tokens("</think>" + "y" * 40)) as model:
        reply = model.complete(
            "Q<think>\t" if opened else "Q\t",
            thinking="enabled",
            thinking_budget_tokens=budget,
            thinking_budget_message="; so",
            max_tokens=30,
            logprobs=logprobs,
            **MARKERS,
        )
        put = budget < len(thought)
        assert reply.thinking == (thought[:budget] + "; so" if put else thought)
        written = VOCABULARY.detokenize(reply.tokens).decode()
        assert (reply.thinking + "</think>") in written
        assert reply.text
        assert len(reply.tokens) == 30
        assert reply.logprobs is None or len(reply.logprobs) == 30
        # The text is in the context, so a continuation finds it cached.
        again = model.complete(list(reply.context_tokens), max_tokens=1)
        assert again.cache.tokens >= len(reply.context_tokens) - 1


def test_a_budget_does_not_end_thinking_within_a_character() -> None:
    reply_text = [*VOCABULARY.byte_tokens("<think>"), *"éé".encode(), *VOCABULARY.byte_tokens("</think>")]
    with model_replying(*reply_text) as model:
        reply = model.complete("Q\t", thinking="enabled", thinking_budget_tokens=1, **MARKERS)
        assert reply.thinking == "é"


@pytest.mark.parametrize("budget", range(8))
def test_a_budget_waits_for_text_that_may_become_a_marker(budget: int) -> None:
    markers = ("\u25c1think\u25b7", "\u25c1/think\u25b7")  # its first byte is shared with other characters
    with model_replying(*VOCABULARY.byte_tokens(markers[0]), *"a\u2014\u2014b".encode(), *b"c" * 9) as model:
        reply = model.complete(
            "Q\t", thinking="enabled", thinking_budget_tokens=budget, max_tokens=60, thinking_markers=markers
        )
    assert "a\u2014\u2014bccc".startswith(reply.thinking)
    assert budget <= len(reply.thinking.encode()) <= budget + 2


def test_a_budget_adds_no_end_marker_after_one_that_may_grow() -> None:
    markers = ("<think>", ("</think>", "</think>!!"))
    with model_replying(*VOCABULARY.byte_tokens("<think>abc</think>!x")) as model:
        reply = model.complete("Q\t", thinking="enabled", thinking_budget_tokens=11, thinking_markers=markers)
    assert (reply.thinking, reply.text) == ("abc", "!x")


def test_invalid_bytes_do_not_extend_a_budget() -> None:
    with model_replying(*VOCABULARY.byte_tokens("<think>"), *b"\xe2" * 50) as model:
        reply = model.complete("Q\t", thinking="enabled", thinking_budget_tokens=2, max_tokens=40, **MARKERS)
    assert 2 <= len(reply.thinking) <= 5


def test_a_grammar_constrains_the_answer_but_not_thinking() -> None:
    reply_text = "<think>free: 1</think>xyz"
    with model_replying(*VOCABULARY.tokenize(reply_text).tolist()) as model:
        reply = model.complete("Q\t", thinking="enabled", regex="[0-9]{3}", **MARKERS)
        assert reply.thinking == "free: 1"
        assert re.fullmatch("[0-9]{3}", reply.text)
        opened = model.complete("Q<think>\t", thinking="enabled", regex="[0-9]{3}", **MARKERS)
        assert re.fullmatch("[0-9]{3}", opened.text)
    with model_replying(ord("a")) as model:
        # Text that looks like a marker within the answer belongs to the answer.
        reply = model.complete("Q\t", thinking="enabled", regex="a<think>b</think>c", **MARKERS)
        assert (reply.text, reply.thinking) == ("a<think>b</think>c", "")


@pytest.mark.parametrize("logprobs", [None, 0])
@pytest.mark.parametrize(
    "reply_text",
    [
        ["hm", "</think>Hello"],
        ["hm", "</", "think", ">\n\nX"],
        ["hm", "</", "think", ">\n\nX", "<"],
        ["hm", "</think><think>"],
        ["hm", "</think>1<think>"],
        ["hm", "</", "think"],
        ["hm", "</think>123", "4"],
        ["hm", "</", "think", ">\n12 ", "3"],
        ["hm", "</think>"],
    ],
)
@pytest.mark.parametrize("close", [("</think>",), ("</think>", "</think>\n\n", "</think>\n\nX!")])
def test_a_token_across_the_end_of_thinking_passes_the_grammar(
    reply_text: list[str], close: tuple[str, ...], logprobs: int | None
) -> None:
    vocabulary = PieceVocabulary([*reply_text, "</think>1"])
    tokens = [int(vocabulary.tokenize(part)[0]) for part in reply_text]
    with erllama.load_backend(ScriptedBackend(vocabulary, tokens), cache=erllama.Cache()) as model:
        reply = model.complete(
            "Q<think>\t",
            thinking="enabled",
            thinking_markers=("<think>", close),
            regex="[0-9]{3}",
            logprobs=logprobs,
            max_tokens=50,
        )
        assert re.fullmatch("[0-9]{3}", reply.text)
        assert reply.thinking == "hm"
        assert reply.logprobs is None or [entry.token for entry in reply.logprobs] == list(reply.tokens)


@pytest.mark.parametrize("reply_text", [["</think>ab", "x"], ["</think>a", "b", "x"], ["</think>", "ab", "x"]])
def test_a_trigger_may_begin_in_the_token_that_ends_thinking(reply_text: list[str]) -> None:
    vocabulary = PieceVocabulary(["<think>", *reply_text])
    tokens = [int(vocabulary.tokenize(part)[0]) for part in ["<think>", "a", *reply_text]]
    with erllama.load_backend(ScriptedBackend(vocabulary, tokens), cache=erllama.Cache()) as model:
        reply = model.complete(
            "Q\t",
            thinking=True,
            thinking_markers=("<think>", "</think>"),
            regex="ab[0-9]{3}",
            grammar_triggers=["ab"],
            max_tokens=50,
        )
    assert reply.thinking == "a"
    assert re.fullmatch("ab[0-9]{3}", reply.text)


@pytest.mark.parametrize(
    "cut", [["</think><tool_call>"], ["</think>no<tool_call>"], ["</", "think>\n<tool_call>{"]]
)
def test_a_required_call_may_begin_in_the_token_that_ends_thinking(cut: list[str]) -> None:
    vocabulary = PieceVocabulary(["<think>", *cut])
    tokens = [int(vocabulary.tokenize(part)[0]) for part in ["<think>", "a", *cut]]
    template = "{% if tools %}<tool_call></tool_call><think></think>{% endif %}{{ messages[0].content }}"
    backend = ScriptedBackend(vocabulary, tokens, chat_templates={"default": template}, n_ctx=1024)
    tool = {"name": "now", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}}
    with erllama.load_backend(backend, cache=erllama.Cache()) as model:
        reply = model.chat(
            [{"role": "user", "content": "Q\t"}], tools=[tool], tool_choice="required", tool_format="hermes"
        )
    assert (reply.thinking, reply.text, reply.tool_call_errors) == ("a", "", ())
    assert [call.name for call in reply.tool_calls] == ["now"]


def test_a_reader_that_pauses_receives_all_events_in_order() -> None:
    reply_text = "".join(f"{i}," for i in range(300))
    with model_replying(
        *VOCABULARY.byte_tokens(reply_text), *VOCABULARY.byte_tokens("<think>hm</think>!")
    ) as model:
        stream = model.stream("Q\t", thinking="enabled", **MARKERS)
        first = next(stream)
        stream.result()
        rest = list(stream)
        texts = [event.text for event in [first, *rest] if isinstance(event, erllama.TextDelta)]
        assert "".join(texts) == reply_text + "!"
        kinds = [type(event) for event in rest if not isinstance(event, erllama.TextDelta)]
        assert kinds == [erllama.ThinkingDelta, erllama.ThinkingEnd, erllama.Done]


def test_cancelling_within_a_phase_ends_it() -> None:
    with model_replying(*VOCABULARY.byte_tokens("<call>" + "x" * 1000)) as model:
        stream = model.stream("Q\t", thinking="enabled", **MARKERS)
        for event in stream:
            if isinstance(event, erllama.ToolCallDelta):
                stream.cancel()
        reply = stream.result()
        assert reply.finish_reason == "cancelled"
        assert len(reply.raw_tool_calls) == 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"thinking": "on"}, "thinking="),
        ({"thinking": "enabled", "thinking_budget_tokens": -1}, "thinking_budget_tokens=-1"),
        ({"thinking_budget_tokens": 5}, 'thinking="enabled"'),
        ({"thinking": "enabled", "thinking_budget_tokens": 5}, "thinking_markers"),
        ({"thinking": "enabled", "thinking_markers": ("", "x")}, "empty"),
        ({"thinking": "enabled", "thinking_markers": "<think>"}, "thinking_markers"),
        ({"thinking": "enabled", "thinking_markers": ("<think>",)}, "thinking_markers"),
        ({"thinking": "enabled", "thinking_signing_key": "text", **MARKERS}, "thinking_signing_key"),
        ({"thinking": "enabled", "thinking_budget_message": "so", **MARKERS}, "without thinking_budget_tokens"),
        ({"thinking": True, "thinking_budget_tokens": 1, "thinking_budget_message": 3, **MARKERS}, "message=3"),
        ({"tool_markers": 7}, "tool_markers"),
        ({"tool_markers": ("\ud800", "x")}, "surrogate"),
        (
            {"thinking": True, "thinking_budget_tokens": 1, "thinking_budget_message": "\udfff", **MARKERS},
            "surrogate",
        ),
        ({"thinking_marker": ("a", "b")}, "did you mean 'thinking_markers'"),
    ],
)
def test_invalid_phase_options_are_refused(options: dict[str, object], match: str) -> None:
    with model_replying(1) as model, pytest.raises(erllama.OptionError, match=match):
        model.complete("Q\t", **options)  # type: ignore[arg-type]
