"""The protocol between a model's process and its parent: frames, messages, and what may not cross."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import erllama
from erllama._process.protocol import messages as m
from erllama._process.protocol.frames import FrameReader, Outbox, ProtocolError
from erllama._process.protocol.token_message import MARK, TokenEntry, decode_tokens, encode_tokens
from erllama._process.protocol.wire_values import pack_error, pack_options, unpack_error, unpack_options
from erllama._runtime.processes import python_command
from erllama.cache import CacheSpec
from erllama.engine import Grammar, RequestOptions, SamplingOptions
from erllama.engine.output.phase_options import Markers, PhaseOptions
from erllama.engine.speculation import NgramDrafter, ProposedTokens

bodies = st.lists(st.binary(min_size=1, max_size=300), max_size=8)


@given(bodies, st.integers(1, 50))
def test_frames_arrive_as_they_were_sent_in_any_pieces(sent: list[bytes], size: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        outbox = Outbox(ours, lambda: None)
        for body in sent:
            outbox.send(body)
        ours.shutdown(socket.SHUT_WR)
        raw = b"".join(iter(lambda: theirs.recv(1 << 16), b""))
    reader = FrameReader()
    received = [body for at in range(0, len(raw), size) for body in reader.feed(raw[at : at + size])]
    assert received == sent


@given(st.binary(min_size=1, max_size=200))
def test_bytes_that_are_no_message_are_refused(raw: bytes) -> None:
    for decode in (m.decode_start, m.decode_from_parent, m.decode_from_child):
        with suppress(ProtocolError):  # some bytes are a message
            decode(raw)


entries = st.builds(
    TokenEntry,
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.binary(min_size=16, max_size=16),
)


@given(st.lists(entries, max_size=8))
def test_tokens_cross_unchanged_in_the_short_form(sent: list[TokenEntry]) -> None:
    assert decode_tokens(encode_tokens(sent)) == sent


@given(st.lists(entries, min_size=1, max_size=3), st.data())
def test_a_short_message_that_is_cut_is_refused(sent: list[TokenEntry], data: st.DataObject) -> None:
    body = encode_tokens(sent)
    entry = (len(body) - 1) // len(sent)
    size = data.draw(st.integers(1, len(body) - 1).filter(lambda size: (size - 1) % entry))
    with pytest.raises(ProtocolError, match="no whole entries"):
        decode_tokens(body[:size])


@given(st.binary(max_size=100))
def test_no_other_message_begins_as_the_short_one(rest: bytes) -> None:
    with pytest.raises(ProtocolError):
        m.decode_from_child(bytes([MARK]) + rest)


def test_a_frame_of_a_wrong_length_is_refused() -> None:
    for raw in (b"\0\0\0\0", b"\xff\xff\xff\xff"):
        with pytest.raises(ProtocolError, match="bytes"):
            list(FrameReader().feed(raw))
    assert list(FrameReader().feed(b"\5\0\0\0ab")) == []


def test_an_outbox_keeps_what_a_reader_does_not_take() -> None:
    ours, theirs = socket.socketpair()
    backlogs: list[int] = []
    outbox = Outbox(ours, lambda: backlogs.append(1), 1 << 20)
    sent = [bytes([n]) * 100_000 for n in range(64)]
    for body in sent:
        outbox.send(body)
    assert outbox.full
    assert backlogs == [1]
    reader, received = FrameReader(), []
    while len(received) < len(sent):
        received += reader.feed(theirs.recv(1 << 20))
        outbox.flush()
    assert received == sent
    assert not outbox.waiting
    theirs.close()
    outbox.send(b"dropped")
    outbox.send(b"dropped")
    assert not outbox.waiting
    ours.close()


OPTIONS = [
    RequestOptions(),
    RequestOptions(
        max_tokens=5,
        sampling=SamplingOptions(temperature=0.3, seed=2**64 - 1, logit_bias={3: float("-inf"), 4: 2.5}, top_k=3),
        reproducible=True,
        cache_salt="salt",
        parent_key=b"k" * 32,
        stop=["a", "b\n"],
        stop_token_ids=[1, 2],
        logprobs=3,
        session_id="s",
    ),
    RequestOptions(
        sampling=SamplingOptions(mirostat=2, banned_tokens=[4, 5]),
        grammar=Grammar.regex("[a-z]+"),
        grammar_triggers=["x", 3],
        speculative=NgramDrafter,
        speculative_tokens=3,
    ),
    RequestOptions(
        sampling=SamplingOptions(dry_multiplier=0.8, dry_sequence_breakers=["a", "b"], xtc_probability=0.1),
        phases=PhaseOptions(
            thinking=Markers(("<t>",), ("</t>",)),
            calls=Markers(("<c>",)),
            payload=Markers(("{",), ("}",)),
            call_grammar=Grammar.json_object(),
            thinking_budget=4,
            budget_message="end",
            signing_key=b"k",
            open_marker="<t>",
            starts_in_thinking=True,
        ),
        speculative=ProposedTokens((1, 2, 3)),
    ),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_options_cross_unchanged(options: RequestOptions) -> None:
    packed = pack_options(options, None)
    submit = m.Submit(1, b"", packed, 0, True, (), None)
    received = m.decode_from_parent(m.encode(submit))
    assert isinstance(received, m.Submit)
    assert unpack_options(received.options) == options


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"samplers": ["top_k", lambda candidates: candidates]}, "samplers"),
        ({"speculative": lambda tokens, n: []}, "speculative"),
    ],
)
def test_functions_are_refused_by_name(options: dict[str, object], named: str) -> None:
    from erllama._model.requests.options import request_options
    from erllama.engine.backends.stub import StubVocabulary

    checked = request_options(options, "complete", None, vocabulary=StubVocabulary())  # type: ignore[arg-type]
    with pytest.raises(erllama.OptionError, match=rf"{named}.*without process=True"):
        pack_options(checked, None)


def test_errors_cross_with_their_type_and_position() -> None:
    for kind in vars(erllama.errors).values():
        if isinstance(kind, type) and issubclass(kind, erllama.Error):
            error = unpack_error(pack_error(kind("a message")))
            assert (type(error), str(error)) == (kind, "a message")
    with pytest.raises(erllama.GrammarError) as caught:
        Grammar.gbnf("root ::= (")
    found = unpack_error(pack_error(caught.value))
    assert isinstance(found, erllama.GrammarError)
    assert (found.line, found.column) == (caught.value.line, caught.value.column)
    unknown = unpack_error(pack_error(ZeroDivisionError("by zero")))
    assert isinstance(unknown, erllama.BackendError)
    assert "ZeroDivisionError: by zero" in str(unknown)


def start_message(**changes: object) -> m.Start:
    values: dict[str, object] = {
        "protocol": m.PROTOCOL,
        "version": erllama.__version__,
        "id": "test",
        "model": m.CustomModel("erllama.engine.backends.stub", "StubBackend", b"{}"),
        "cache": CacheSpec(1 << 20, (), 16, 1 << 20, True),
        "policy": {},
        "sizes": (None, None, None, 8),
        "warmup": True,
        "log_levels": {},
        "python_path": (),
        "heartbeat_seconds": 0.1,
    }
    return m.Start(**{**values, **changes})  # type: ignore[arg-type]


def exchange(raw: bytes) -> tuple[list[m.FromChild], int]:
    """Send bytes to a process. Returns what it answers until it ends, and its exit status."""
    ours, theirs = socket.socketpair()
    with ours, ExitStack() as stack:
        with theirs:
            child = stack.enter_context(
                subprocess.Popen(
                    python_command("erllama._process.child", str(theirs.fileno()), str(os.getpid())),
                    pass_fds=[theirs.fileno()],
                    stderr=subprocess.DEVNULL,
                )
            )
        stack.callback(child.kill)  # one that does not end by itself
        ours.sendall(raw)
        ours.shutdown(socket.SHUT_WR)
        reader, received = FrameReader(), []
        end = time.monotonic() + 120
        while raw := ours.recv(1 << 16):
            received += [m.decode_from_child(body) for body in reader.feed(raw)]
            assert time.monotonic() < end, "the process does not end"  # it sends signs of life for ever
        return received, child.wait(60)


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


def test_a_process_of_another_version_says_so() -> None:
    for changes in ({"version": "9.9"}, {"protocol": 99}):
        received, status = exchange(framed(m.encode(start_message(**changes))))
        assert status == 0
        assert isinstance(received[0], m.StartFailed)
        assert "start the program again" in received[0].error.message


def test_a_process_ends_with_its_parent_and_on_damaged_frames() -> None:
    start = framed(m.encode(start_message()))
    for rest in (b"", framed(m.encode(m.Stop())), framed(b"\x93\1"), b"\xff\xff\xff\xff", b"\5\0\0\0a"):
        received, status = exchange(start + rest)
        assert any(isinstance(message, m.Started) for message in received)
        assert (status == 0) == (rest in (b"", framed(m.encode(m.Stop())), b"\5\0\0\0a"))
    assert exchange(b"") == ([], 0)
    assert exchange(b"\5\0\0\0a")[0] == []


def test_a_process_does_not_start_another_one(tmp_path: Path) -> None:
    (tmp_path / "nested.py").write_text(
        "import erllama\n"
        "def make():\n"
        "    return erllama.load_backend('erllama.engine.backends.stub:StubBackend', process=True)\n"
    )
    sys.path.append(str(tmp_path))
    try:
        with pytest.raises(erllama.Unsupported, match="within the process of a model"):
            erllama.load_backend("nested:make", process=True)
    finally:
        sys.path.remove(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("no_such_module:make", {}, erllama.OptionError, "cannot be imported"),
        ("erllama.engine.backends.stub:Missing", {}, erllama.OptionError, "cannot be imported"),
        ("erllama.engine.backends.stub:EOG", {}, erllama.OptionError, "not callable"),
        ("erllama.engine.backends.stub:StubVocabulary", {}, erllama.OptionError, "lacks"),
        ("erllama.engine.backends.stub:StubBackend", {"n_ctx": 0}, erllama.OptionError, "at least 1"),
        ("erllama.engine.backends.stub:StubBackend", {"n_cxt": 3}, erllama.ModelLoadError, "TypeError"),
    ],
)
@pytest.mark.parametrize("process", [False, True])
def test_a_factory_that_fails_says_why(
    process: bool, name: str, options: dict[str, object], error: type[erllama.Error], message: str
) -> None:
    with erllama.Cache(ram=None) as cache, pytest.raises(error, match=message):
        erllama.load_backend(name, options, cache=cache, process=process)


def test_options_of_a_factory_must_be_json() -> None:
    for options in ({"n": object()}, {"n": float("nan")}, [1]):
        with pytest.raises(erllama.OptionError, match="options"):
            erllama.load_backend("erllama.engine.backends.stub:StubBackend", options)  # type: ignore[arg-type]
