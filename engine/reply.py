"""What a request says: tokens become text, thinking and tool calls, and pieces for who reads along."""

from __future__ import annotations

import hashlib
import hmac

from erllama.engine.backend import Vocabulary
from erllama.engine.phases import Kind, PhaseTracker, Script, Segment
from erllama.engine.request import RequestOptions
from erllama.engine.sampling import TokenLogprobs
from erllama.engine.stops import StopScanner
from erllama.engine.text import TextDecoder
from erllama.engine.ticket import Ticket

_WHITE = " \t\r\n"


class Reply:
    """The reply to one request, as it grows. Used by the model thread.

    Where phases are told apart, white space between them belongs to none.

    Args:
        tracker: tells the phases apart; None for a reply that is all text.

    Attributes:
        calls: the tool calls that are complete, as they were written.
        logprobs: of the tokens, where asked for.
        signature: of the thinking, where a thought is complete.
    """

    def __init__(
        self,
        ticket: Ticket,
        options: RequestOptions,
        vocabulary: Vocabulary,
        script: Script,
        tracker: PhaseTracker | None,
    ) -> None:
        self._ticket, self._vocabulary, self._script, self._tracker = ticket, vocabulary, script, tracker
        self._signing_key = options.phases.signing_key if options.phases is not None else None
        self._decoder = TextDecoder()
        self._stops = StopScanner(options.stop)
        self._said: dict[Kind, list[str]] = {"text": [], "thinking": [], "call": []}
        self._unsent: list[int] = []  # drawn, and no piece told of them
        self._kind: Kind = tracker.kind if tracker is not None else "text"
        self._trimming = self._kind == "thinking"  # white space at the beginning of a phase
        self._white = ""  # at its end, perhaps
        self._call = b""
        self.calls: list[bytes] = []
        self.logprobs: list[TokenLogprobs] = []
        self.signature: bytes | None = None

    @property
    def text(self) -> str:
        return "".join(self._said["text"])

    @property
    def thinking(self) -> str:
        return "".join(self._said["thinking"])

    @property
    def stop_sequence(self) -> str | None:
        """The stop string that ended it."""
        return self._stops.matched

    @property
    def within_character(self) -> bool:
        """Whether the last token ended within one."""
        return self._decoder.within

    def take(self, token: int) -> None:
        """One token more."""
        self._unsent.append(token)
        if self._tracker is None:
            self._say(self._decoder.feed(self._vocabulary.piece(token)))
        else:
            for segment in self._tracker.feed(token):
                self._tell(segment)

    def finish(self) -> None:
        """The end: what was held back, and is no stop string or marker, is said."""
        for segment in self._tracker.finish() if self._tracker is not None else ():
            self._tell(segment)
        rest = self._decoder.finish()
        if self._kind == "text":
            rest = self._stops.feed(self._white + rest) + self._stops.flush()
        self._send(rest, always=False)

    def _tell(self, segment: Segment) -> None:
        if segment.kind != self._kind:
            self._end_phase()
            self._kind, self._trimming = segment.kind, True
        if segment.script and segment.kind == "call":
            written = self._script.written(segment.script)
            self._call += written
            self._send(self._decoder.feed(written))
        elif segment.script:
            self._say(self._trimmed(self._decoder.feed(self._script.plain(segment.script))))
        if segment.ended:
            self._end_phase()
            self._kind, self._trimming = "text", True

    def _trimmed(self, text: str) -> str:
        """Without white space around a phase; what may be in the middle of it comes with what follows."""
        text = self._white + text
        if self._trimming:
            text = text.lstrip(_WHITE)
            self._trimming = not text
        kept = text.rstrip(_WHITE)
        self._white = text[len(kept) :]
        return kept

    def _end_phase(self) -> None:
        """What comes is of another phase."""
        rest = self._decoder.finish()
        self._white = ""
        if self._kind == "text":
            self._send(self._stops.feed(rest) + self._stops.flush(), always=False)
        elif self._kind == "thinking":
            self._send(rest, always=False)
            if any(self._said["thinking"]):
                self._sign()
        elif self._call:
            self._send(rest, always=False)
            self.calls.append(self._call)
            self._ticket.emit(("call_end", self._call))
            self._call = b""

    def _sign(self) -> None:
        """A thought is over."""
        self.signature = b""
        if self._signing_key is not None:
            self.signature = hmac.digest(self._signing_key, self.thinking.encode(), hashlib.sha256)
        self._ticket.emit(("thinking_end", self.signature))

    def _say(self, text: str) -> None:
        """Pass text on, but for what may belong to a stop string."""
        if self._kind != "text":
            self._send(text)
            return
        released = self._stops.feed(text)
        if released or not (self._stops.holding or self._stops.matched or self._white):
            self._send(released)

    def _send(self, text: str, *, always: bool = True) -> None:
        if not text and not always:
            return
        self._said[self._kind].append(text)
        if self._ticket.streaming:
            told = self.logprobs[len(self.logprobs) - len(self._unsent) :] if self.logprobs else ()
            self._ticket.emit((self._kind, text, tuple(self._unsent), tuple(told)))
        self._unsent.clear()
