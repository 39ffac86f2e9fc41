"""The phases of a reply: the answer, thinking and tool calls, separated at their markers.

`PhaseTracker` follows one reply token by token, for any backend. It works on text encoded by `TokenCodec`, so a
marker is found however it is split into tokens. Used by the model thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from erllama.engine.grammar.matcher import Matcher
from erllama.engine.output.phase_options import Markers, PhaseOptions
from erllama.engine.output.stops import TextFinder
from erllama.engine.output.text import WHITE
from erllama.engine.output.token_codec import TokenCodec
from erllama.engine.output.tool_call_ends import CallEnds

SegmentKind = Literal["text", "thinking", "call"]
ReplyPhase = Literal["text", "thinking", "syntax", "payload"]

_REMOVE_WHITE = {ord(character): None for character in WHITE}
_PROMPT_END = 32  # tokens of the prompt's end that are searched for an opening marker


class Segment(NamedTuple):
    """A part of a reply.

    Attributes:
        kind: which phase it belongs to.
        encoded: its text, as `TokenCodec` encodes it.
        ended: whether its phase ends with it.
    """

    kind: SegmentKind
    encoded: str
    ended: bool = False


class PhaseTracker:
    """Follows one reply through its phases.

    Args:
        options: the markers.
        codec: encodes the model's tokens.
        prompt: the prompt's ids, int32, shape (n,); its end may open a phase.

    Attributes:
        phase: the current phase; within a call, "syntax" or "payload".
        call: the call so far, encoded, from its opening marker on, while the reply is in one.
        after_thinking: if the last token ended thinking, the encoded text that it has after the closing marker.
        buffer: encoded text that is not released yet, since it may become a marker.
    """

    def __init__(self, options: PhaseOptions, codec: TokenCodec, prompt: NDArray[np.int32]) -> None:
        self._codec = codec
        self._thinking = _EncodedMarkers.of(options.thinking, codec)
        self._calls = _EncodedMarkers.of(options.calls, codec)
        self._payload = _EncodedMarkers.of(options.payload, codec)
        skip = tuple(map(codec.encode_marker, options.skip))
        self._quotes = tuple(map(codec.encode_marker, options.quotes))
        self._call_grammar: Matcher | None = None
        self._call_ends: CallEnds | None = None  # of the current call
        self._leading = options.leading
        markers: dict[ReplyPhase, Sequence[str]] = {
            "text": (*self._thinking.open, *self._calls.open, *skip),
            "thinking": self._thinking.close,
            "syntax": (*self._calls.close, *self._payload.open),
            "payload": (*self._calls.close, *self._payload.close),
        }
        self._finders = {phase: TextFinder(texts, longest=True) for phase, texts in markers.items()}
        self.buffer = codec.encode_marker(options.open_marker) if options.open_marker else ""
        self._may_lead = bool(self._leading)  # the answer has not begun: a leading text would begin a call
        self._all_text = False
        self.call = self.after_thinking = ""
        thinks = options.starts_in_thinking
        if thinks is None:
            end = codec.encode_tokens(prompt[-_PROMPT_END:].tolist()).rstrip(WHITE)
            thinks = any(end.endswith(marker.rstrip(WHITE)) for marker in self._thinking.open)
        self.phase: ReplyPhase = "thinking" if thinks and options.thinking is not None else "text"

    @property
    def kind(self) -> SegmentKind:
        """The kind of the segments of the current phase."""
        return "call" if self.phase in ("syntax", "payload") else self.phase  # type: ignore[return-value]

    @property
    def ending(self) -> bool:
        """Whether the buffer ends thinking, at this marker or at a longer one."""
        return self.phase == "thinking" and bool(self.buffer) and self.buffer.startswith(self._thinking.close)

    @property
    def closing(self) -> str:
        """The encoded text that would end thinking here: a closing marker, or the rest of one that has begun."""
        return next(
            (text.removeprefix(self.buffer) for text in self._thinking.close if text.startswith(self.buffer)), ""
        )

    # --- settings that a grammar changes

    def treat_rest_as_text(self) -> None:
        """Treat the rest of the reply as the answer, and its markers as content."""
        self._all_text = True

    def use_call_grammar(self, grammar: Matcher) -> None:
        """Set the grammar that decides where calls end. It is forked at each call."""
        self._call_grammar = grammar

    def end_at_first_marker(self) -> None:
        """End thinking at its first closing marker, even if a longer one could follow."""
        self._finders["thinking"] = TextFinder(self._thinking.close)

    # --- following the reply

    def feed(self, token: int) -> list[Segment]:
        """Add the next token. Returns the segments that are certain now."""
        self.buffer += self._codec.encode_token(token)
        self.after_thinking = ""
        return list(self._advance(ended=False))

    def finish(self) -> list[Segment]:
        """End the reply. Returns the buffered text, and the end of a call that is incomplete."""
        segments = list(self._advance(ended=True))
        if self.kind == "call":
            segments.append(Segment("call", "", ended=True))
        return segments

    def _advance(self, *, ended: bool) -> Iterator[Segment]:
        """Release text and pass markers, until the buffer may be the beginning of a marker."""
        if self._all_text:
            yield from self._release(len(self.buffer))
            return
        while True:
            if self._may_lead and self.phase == "text" and self._waits_for_leading(ended):
                return
            at, marker = self._finders[self.phase].find(self.buffer, ended=ended)
            yield from self._release(at)
            if marker is None:
                return
            if self._call_ends is not None and not self._is_marker(marker, self._call_ends):
                yield from self._release(1)
                continue
            self.buffer = self.buffer[len(marker) :]
            yield from self._pass_marker(marker)

    def _release(self, n: int) -> Iterator[Segment]:
        """Release the first `n` characters of the buffer."""
        if n:
            released, self.buffer = self.buffer[:n], self.buffer[n:]
            if self.kind == "call":
                self._add_to_call(released)
            yield Segment(self.kind, released)

    def _pass_marker(self, marker: str) -> Iterator[Segment]:
        """Change the phase at a marker, which is removed from the buffer."""
        if self.phase == "thinking":
            self.phase, self.after_thinking = "text", self.buffer
            self._may_lead = bool(self._leading)
            yield Segment("thinking", "", ended=True)
        elif self.phase == "text":
            if marker in self._calls.open:
                self._begin_call(marker)
                yield Segment("call", marker)
            elif marker in self._thinking.open:
                self.phase = "thinking"
            else:
                self._may_lead = bool(self._leading)
        else:
            self._add_to_call(marker)
            if marker in self._calls.close:
                self.phase, self._call_ends = "text", None
                yield Segment("call", marker, ended=True)
            else:
                self.phase = "payload" if self.phase == "syntax" else "syntax"
                yield Segment("call", marker)

    # --- calls

    def _begin_call(self, marker: str) -> None:
        self.phase, self.call = "syntax" if self._payload.open else "payload", ""
        grammar = self._call_grammar.fork() if self._call_grammar is not None else None
        self._call_ends = CallEnds(self._codec.split, self._quotes, grammar)
        self._add_to_call(marker)

    def _add_to_call(self, encoded: str) -> None:
        assert self._call_ends is not None
        self.call += encoded
        self._call_ends.read(encoded)

    def _is_marker(self, marker: str, ends: CallEnds) -> bool:
        """Return whether a marker within a call ends something. Otherwise it is content of an argument."""
        if marker in self._calls.close:
            may_end = ends.may_end(marker)
            if may_end is not None:
                return may_end
            # Arguments without quotes end only at their own marker.
            unquoted = not self._quotes and bool(self._payload.close) and marker not in self._payload.close
            return not ends.within_string and not (unquoted and self.phase == "payload")
        return self.phase == "syntax" or not ends.within_string

    def _waits_for_leading(self, ended: bool) -> bool:
        """Return whether the buffer may become a leading text. If it is one already, begin a call."""
        answer = self.buffer.translate(_REMOVE_WHITE)
        if any(answer.startswith(text) for text in self._leading):
            self.buffer = self.buffer.lstrip(WHITE)
            self._begin_call("")
        elif not ended and any(text.startswith(answer) for text in self._leading):
            return True
        self._may_lead = False
        return False


class _EncodedMarkers(NamedTuple):
    open: tuple[str, ...]
    close: tuple[str, ...]

    @classmethod
    def of(cls, markers: Markers | None, codec: TokenCodec) -> _EncodedMarkers:
        """Encode markers; empty ones for None."""
        if markers is None:
            return cls((), ())
        return cls(tuple(map(codec.encode_marker, markers.open)), tuple(map(codec.encode_marker, markers.close)))


def opening_tokens(options: PhaseOptions, codec: TokenCodec, *, calls: bool) -> list[Sequence[int]]:
    """Return the tokens of each text that may precede an answer: markers that open phases, and skipped texts.

    Args:
        calls: include the opening markers of calls.
    """
    texts = list(options.skip)
    if options.thinking is not None:
        texts += options.thinking.open
    if calls and options.calls is not None:
        texts += options.calls.open
    return [codec.tokenize(text) for text in texts]
