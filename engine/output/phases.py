"""What a reply is at each token: an answer, thinking or a tool call; told by markers, in whatever tokens they come.

Tokens are written as a script of one character for each byte of text, and one
of its own for each token that is no text: so a marker is found across the
borders of tokens, a special token is never taken for its name spelled out, and
one search serves both. Used by the model thread, for every backend alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from erllama.engine.backend import Vocabulary
from erllama.engine.grammar.grammar import Grammar
from erllama.engine.grammar.matcher import Matcher
from erllama.engine.output.stops import WHITE, TextFinder
from erllama.engine.output.tool_calls import CallEnds
from erllama.errors import OptionError, boolean, encodable, integer

Kind = Literal["text", "thinking", "call"]
ReplyPhase = Literal["text", "thinking", "syntax", "payload"]

_SPECIAL = 0x100  # characters from here on are tokens that are no text
_NO_WHITE = {ord(character): None for character in WHITE}
_PROMPT_END = 32  # tokens of the prompt's end in which an opening marker is looked for
_CHARACTER = 4  # most bytes of one


@dataclass(frozen=True, slots=True)
class Markers:
    """Texts, special tokens written out, at which a phase begins and ends.

    Attributes:
        open: any of them begins it.
        close: any of them ends it; none for a phase that ends with the reply.
    """

    open: tuple[str, ...]
    close: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("open", "close"):
            object.__setattr__(self, name, _texts(f"the {name} markers", getattr(self, name)))
        if not self.open:
            raise OptionError("markers without one that opens; give at least one")


@dataclass(frozen=True, slots=True)
class PhaseOptions:
    """How the phases of a reply are told apart.

    Attributes:
        thinking: between which the model thinks; None for a model that does not.
        calls: between which it calls tools; None where it has none.
        payload: within a call, between which the arguments are; the rest is syntax, of which the most likely
            token is taken. None for a call that is all arguments.
        quotes: texts that begin and end strings in the arguments: a marker within a string is content. Quotes of
            one character may be escaped by a backslash. () where arguments are not quoted: an argument then ends
            at the payload's closing marker alone.
        leading: JSON texts, compared without white space, that begin a call where an answer begins with them.
        skip: texts around phases that belong to none.
        call_grammar: what a call must be of, from its opening marker on, and all that follows; None for anything.
        calls_only: the answer is of that grammar from the first.
        begins: whether the reply begins in thinking; None to see whether the prompt ends with its opening marker.
        opened: the beginning of a marker, or one, at the prompt's end, which the reply goes on with.
        thinking_budget: most tokens of thinking; at that many, the closing marker is put there; None for any.
        budget_message: what is put before that marker.
        signing_key: signs thinking, HMAC-SHA256; None for no signature.
    """

    thinking: Markers | None = None
    calls: Markers | None = None
    payload: Markers | None = None
    quotes: tuple[str, ...] = ('"',)
    leading: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    call_grammar: Grammar | None = None
    calls_only: bool = False
    begins: bool | None = None
    opened: str = ""
    thinking_budget: int | None = None
    budget_message: str = ""
    signing_key: bytes | None = None

    def __post_init__(self) -> None:
        for name in ("thinking", "calls", "payload"):
            if not isinstance(getattr(self, name), Markers | None):
                raise OptionError(f"{name}={getattr(self, name)!r}; give Markers, or None")
        for name in ("quotes", "leading", "skip"):
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        if self.begins is not None:
            boolean("begins", self.begins)
        if self.thinking_budget is not None:
            object.__setattr__(self, "thinking_budget", integer("thinking_budget_tokens", self.thinking_budget, 0))
        if not isinstance(self.budget_message, str):
            raise OptionError(f"thinking_budget_message={self.budget_message!r}; give a text")
        encodable("thinking_budget_message", self.budget_message)
        if self.signing_key is not None and (not isinstance(self.signing_key, bytes) or not self.signing_key):
            raise OptionError("thinking_signing_key must be bytes, at least one, or None")
        if self.thinking_budget is not None and (self.thinking is None or not self.thinking.close):
            raise OptionError("thinking_budget_tokens for a model without thinking markers; give thinking_markers")


def _texts(name: str, given: object) -> tuple[str, ...]:
    found = (given,) if isinstance(given, str) else given
    if not isinstance(found, list | tuple) or not all(isinstance(text, str) and text for text in found):
        raise OptionError(f"{name}: {given!r}; give a text, or several, none of them empty")
    return tuple(encodable(name, text) for text in found)


class Script:
    """Writes the tokens of one vocabulary as a script. Thread-safe."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def of_token(self, token: int) -> str:
        piece = self._vocabulary.piece(token)
        return piece.decode("latin-1") if piece else chr(_SPECIAL + token)

    def of_tokens(self, tokens: Iterable[int]) -> str:
        return "".join(map(self.of_token, tokens))

    def of_marker(self, text: str) -> str:
        """A text in which special tokens are written out.

        Raises:
            OptionError: it gives no tokens.
        """
        return self._scripted(text, self.tokens_of(text))

    def of_text(self, text: str) -> str:
        """A text in which special tokens are written out; one that gives no tokens is text."""
        ids = self._vocabulary.tokenize(text, add_special=False, parse_special=True)
        return self._scripted(text, ids.tolist())

    def token_of(self, character: str) -> int:
        """The special token that a character of a script is."""
        return ord(character) - _SPECIAL

    def _scripted(self, text: str, ids: Iterable[int]) -> str:
        rest, script = text.encode(), ""
        for token in ids:
            if not self._vocabulary.piece(token):
                name = self._vocabulary.detokenize([token], special=True)
                before, found, after = rest.partition(name) if name else (rest, b"", b"")
                if found:
                    script += before.decode("latin-1") + chr(_SPECIAL + token)
                    rest = after
        return script + rest.decode("latin-1")

    def tokens_of(self, text: str) -> list[int]:
        """The tokens of a marker, or of what is put into a reply.

        Raises:
            OptionError: there are none.
        """
        ids: list[int] = self._vocabulary.tokenize(text, add_special=False, parse_special=True).tolist()
        if not ids:
            raise OptionError(f"the marker {text!r} gives no tokens of this model")
        return ids

    def spelled(self, script: str) -> list[int]:
        """Tokens of this script and nothing else; [] where the tokenizer gives others."""
        try:
            ids: list[int] = self._vocabulary.tokenize(
                self.written(script).decode(), add_special=False, parse_special=True
            ).tolist()
        except UnicodeDecodeError:
            return []
        return ids if self.of_tokens(ids) == script else []

    def plain(self, script: str) -> bytes:
        """Its text alone."""
        return bytes(map(ord, script)) if script.isascii() else bytes([c for c in map(ord, script) if c < _SPECIAL])

    def written(self, script: str) -> bytes:
        """Its text, special tokens written out."""
        if script.isascii():
            return script.encode()
        return b"".join(
            bytes([code]) if code < _SPECIAL else self._vocabulary.detokenize([code - _SPECIAL], special=True)
            for code in map(ord, script)
        )

    def runs(self, script: str) -> Iterator[bytes | int]:
        """Its texts and its special tokens, in order."""
        text = bytearray()
        for code in map(ord, script):
            if code < _SPECIAL:
                text.append(code)
                continue
            if text:
                yield bytes(text)
                text.clear()
            yield code - _SPECIAL
        if text:
            yield bytes(text)


class Segment(NamedTuple):
    """A part of a reply, as script; `ended`: its phase is over."""

    kind: Kind
    script: str
    ended: bool = False


class PhaseTracker:
    """Follows one reply through its phases.

    Attributes:
        phase: where it is; within a call, "syntax" or "payload".
        call: the call so far, from its opening marker on, while it is in one.
        behind: what the last token fed told behind the end of thinking, if it told that; as script.
        held: what is held back, since it may become a marker.
    """

    def __init__(self, options: PhaseOptions, script: Script, prompt: NDArray[np.int32]) -> None:
        self._script = script
        thinking, calls, payload = options.thinking, options.calls, options.payload
        self._thinking = _Scripted(thinking, script)
        self._calls = _Scripted(calls, script)
        self._payload = _Scripted(payload, script)
        self._skip = tuple(map(script.of_marker, options.skip))
        self._quotes = tuple(map(script.of_marker, options.quotes))
        self._call_grammar: Matcher | None = None
        self._ends: CallEnds | None = None  # of the call that it is in
        self._leading = options.leading
        markers: dict[ReplyPhase, Sequence[str]] = {
            "text": (*self._thinking.open, *self._calls.open, *self._skip),
            "thinking": self._thinking.close,
            "syntax": (*self._calls.close, *self._payload.open),
            "payload": (*self._calls.close, *self._payload.close),
        }
        self._finders = {phase: TextFinder(texts, longest=True) for phase, texts in markers.items()}
        self.held = script.of_marker(options.opened) if options.opened else ""
        self._may_lead = bool(self._leading)
        self._settled = False
        self.call = self.behind = ""
        begins = options.begins
        if begins is None:
            end = script.of_tokens(prompt[-_PROMPT_END:].tolist()).rstrip(WHITE)
            begins = any(end.endswith(marker.rstrip(WHITE)) for marker in self._thinking.open)
        self.phase: ReplyPhase = "thinking" if begins and thinking is not None else "text"

    @property
    def kind(self) -> Kind:
        return "call" if self.phase in ("syntax", "payload") else self.phase  # type: ignore[return-value]

    @property
    def ending(self) -> bool:
        """Whether what is held ends thinking, at this marker or at a longer one."""
        return self.phase == "thinking" and bool(self.held) and self.held.startswith(self._thinking.close)

    @property
    def closing(self) -> str:
        """What would end thinking here, as script: the rest of a closing marker that has begun, or all of one."""
        return next(
            (text.removeprefix(self.held) for text in self._thinking.close if text.startswith(self.held)), ""
        )

    def settle(self) -> None:
        """What comes is the answer to its end, whatever it looks like."""
        self._settled = True

    def follow(self, call_grammar: Matcher) -> None:
        """Calls are of this grammar, which decides where one ends. It is forked at each call."""
        self._call_grammar = call_grammar

    def end_at_once(self) -> None:
        """Thinking ends at its first closing marker, though a longer one could come."""
        self._finders["thinking"] = TextFinder(self._thinking.close)

    def feed(self, token: int) -> list[Segment]:
        """Take the next token; the segments that are certain now."""
        self.held += self._script.of_token(token)
        self.behind = ""
        return list(self._advance(ended=False))

    def finish(self) -> list[Segment]:
        """The end of the reply: what was held back, and the end of a call that it was in."""
        segments = list(self._advance(ended=True))
        if self.kind == "call":
            segments.append(Segment("call", "", ended=True))
        return segments

    def _advance(self, *, ended: bool) -> Iterator[Segment]:
        if self._settled:
            yield from self._release(len(self.held))
            return
        while True:
            if self._may_lead and self.phase == "text" and self._awaits_lead(ended):
                return
            at, marker = self._finders[self.phase].find(self.held, ended=ended)
            yield from self._release(at)
            if marker is None:
                return
            if self._ends is not None and not self._counts(marker, self._ends):
                yield from self._release(1)
                continue
            self.held = self.held[len(marker) :]
            yield from self._pass(marker)

    def _release(self, n: int) -> Iterator[Segment]:
        if n:
            released, self.held = self.held[:n], self.held[n:]
            if self.kind == "call":
                self._read(released)
            yield Segment(self.kind, released)

    def _begin_call(self, marker: str) -> None:
        self.phase, self.call = "syntax" if self._payload.open else "payload", ""
        grammar = self._call_grammar.fork() if self._call_grammar is not None else None
        self._ends = CallEnds(self._script.runs, self._quotes, grammar)
        self._read(marker)

    def _read(self, script: str) -> None:
        """A part of the call."""
        assert self._ends is not None
        self.call += script
        self._ends.read(script)

    def _counts(self, marker: str, ends: CallEnds) -> bool:
        """Whether a marker within a call ends something, and is no content of an argument."""
        if marker in self._calls.close:
            may_end = ends.may_end(marker)
            if may_end is not None:
                return may_end
            # Arguments without quotes end at their own marker alone.
            unquoted = not self._quotes and bool(self._payload.close) and marker not in self._payload.close
            return not ends.within_string and not (unquoted and self.phase == "payload")
        return self.phase == "syntax" or not ends.within_string

    def _pass(self, marker: str) -> Iterator[Segment]:
        """Go on behind a marker."""
        if self.phase == "thinking":
            self.phase, self.behind = "text", self.held
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
            self._read(marker)
            if marker in self._calls.close:
                self.phase, self._ends = "text", None
                yield Segment("call", marker, ended=True)
            else:
                self.phase = "payload" if self.phase == "syntax" else "syntax"
                yield Segment("call", marker)

    def _awaits_lead(self, ended: bool) -> bool:
        """Whether it is still open if the answer is a call without a marker; if it is one, it begins."""
        begun = self.held.translate(_NO_WHITE)
        if any(begun.startswith(lead) for lead in self._leading):
            self.held = self.held.lstrip(WHITE)
            self._begin_call("")
        elif not ended and any(lead.startswith(begun) for lead in self._leading):
            return True
        self._may_lead = False
        return False


class _Scripted:
    """Markers as script; empty ones for None."""

    def __init__(self, markers: Markers | None, script: Script) -> None:
        self.open = tuple(map(script.of_marker, markers.open)) if markers is not None else ()
        self.close = tuple(map(script.of_marker, markers.close)) if markers is not None else ()


def opening_tokens(options: PhaseOptions, script: Script, *, calls: bool) -> list[Sequence[int]]:
    """The tokens of what may come before an answer: of the markers that open phases, and of what is skipped.

    Args:
        calls: of calls, too.
    """
    texts = list(options.skip)
    if options.thinking is not None:
        texts += options.thinking.open
    if calls and options.calls is not None:
        texts += options.calls.open
    return [script.tokens_of(text) for text in texts]


class ThinkingBudget:
    """Counts the tokens of a reply's thinking, and says when its end is to be put.

    Attributes:
        closing: the tokens that end it there.
    """

    def __init__(self, options: PhaseOptions, close: str, script: Script) -> None:
        self._limit = options.thinking_budget
        self.closing = script.tokens_of(options.budget_message + close)
        self._n_tokens = 0
        self._n_within = 0  # tokens in a row that ended within a character
        self._put = False

    def count(self, *, before: bool, after: bool, within: bool) -> None:
        """A token was taken.

        Args:
            before: whether the reply was thinking before it.
            after: whether it is thinking now.
            within: whether it is within a character.
        """
        self._n_tokens += before and after
        self._n_within = self._n_within + 1 if within else 0
        self._put = self._put and after

    def due(self, tracker: PhaseTracker) -> bool:
        """Whether the end of thinking is to be put now; once for each thought, and not within a character."""
        if self._put or self._limit is None or tracker.phase != "thinking" or self._n_tokens < self._limit:
            return False
        # What is not complete in as many tokens as it can have bytes is no character.
        if tracker.ending or 0 < self._n_within < _CHARACTER:
            return False
        self._put = True
        return True
