"""What a request says: tokens become text, thinking and tool calls, and pieces for who reads along."""

from __future__ import annotations

import hashlib
import hmac

from erllama.engine.backend import Vocabulary
from erllama.engine.output.phases import Kind, PhaseTracker, Script, Segment
from erllama.engine.output.stops import WHITE, StopScanner
from erllama.engine.output.text import TextDecoder
from erllama.engine.requests.request import RequestOptions
from erllama.engine.requests.ticket import Ticket
from erllama.engine.sampling.sampler import TokenLogprobs


class Reply:
    """The reply to one request, as it grows. Used by the model thread.

    Where phases are told apart, white space between them belongs to none. Stop
    strings are looked for before it is left out, in each text by itself. Every
    token is told in some piece, but for those of a stop string.

    Args:
        tracker: tells the phases apart; None for a reply that is all text.
        begun: the bytes of a character that the prompt ends within. The reply's text has all of it.

    Attributes:
        calls: the tool calls that are complete, as they were written.
        places: for each of them, how many characters of the text come before it.
        logprobs: of the tokens, where asked for.
        signature: of the thinking, where a thought is over.
    """

    def __init__(
        self,
        ticket: Ticket,
        options: RequestOptions,
        vocabulary: Vocabulary,
        script: Script,
        tracker: PhaseTracker | None,
        begun: bytes = b"",
    ) -> None:
        self._ticket, self._vocabulary, self._script, self._tracker = ticket, vocabulary, script, tracker
        self._phases = options.phases
        self._decoder, self._begun = TextDecoder(), begun
        self._stops = StopScanner(options.stop)
        self._said: dict[Kind, list[str]] = {"text": [], "thinking": [], "call": []}
        self._unsent: list[int] = []  # drawn, and no piece told of them
        self._kind: Kind = tracker.kind if tracker is not None else "text"
        self._trimming = self._kind == "thinking"  # white space at the beginning of a phase
        self._white = ""  # at its end, perhaps
        self._call = b""
        self._stopped_at: str | None = None
        self.calls: list[bytes] = []
        self.places: list[int] = []
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
        """The stop string that ended it, or the text of the stop token that did."""
        return self._stopped_at if self._stops.matched is None else self._stops.matched

    @property
    def at_stop_token(self) -> bool:
        """Whether a stop token ended it, and no stop string before that."""
        return self._stopped_at is not None and self._stops.matched is None

    def stop_at(self, text: str) -> None:
        """It ends at a stop token, told as this text."""
        self._stopped_at = text

    @property
    def within_character(self) -> bool:
        """Whether the last token ended within one."""
        held = self._script.plain(self._tracker.held) if self._tracker is not None else b""
        if not held:
            return self._decoder.within
        # It may become a marker, which begins with a character of its own.
        decoder = TextDecoder()
        decoder.feed(held)
        return decoder.within

    def take(self, token: int) -> None:
        """One token more."""
        if self._begun:  # a reply without tokens completes nothing
            self._decoder, self._begun = TextDecoder(self._begun), b""
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
        rest = self._rest()
        if self._kind == "text":
            rest += self._white
        if rest or self._stops.matched is None:
            self._send(rest)

    def _tell(self, segment: Segment) -> None:
        if segment.kind != self._kind and self._stops.matched is None:
            self._end_phase()
            if self._stops.matched is None:
                self._begin_phase(segment.kind)
        if self._stops.matched is not None:
            return
        if segment.script and segment.kind == "call":
            written = self._script.written(segment.script)
            self._call += written
            self._send(self._decoder.feed(written))
        elif segment.script:
            self._say(self._decoder.feed(self._script.plain(segment.script)))
        if segment.ended:
            self._end_phase()
            self._begin_phase("text")

    def _begin_phase(self, kind: Kind) -> None:
        self._kind, self._trimming, self._white = kind, True, ""
        if kind == "text":
            self._stops.begin()

    def _end_phase(self) -> None:
        """What comes is of another phase."""
        rest = self._rest()
        if self._kind == "thinking":
            self._end_thought(rest)
            return
        if rest:
            self._send(rest)
        if self._call:
            self.calls.append(self._call)
            self.places.append(len(self.text))
            self._ticket.emit(("call_end", self._call))
            self._call = b""

    def _end_thought(self, rest: str) -> None:
        """A thought is over, be it empty; one that the budget closed before it had a token never was."""
        assert self._phases is not None
        if self._phases.thinking_budget == 0 and not self.thinking and not rest:
            return
        self._send(rest)
        key = self._phases.signing_key
        self.signature = hmac.digest(key, self.thinking.encode(), hashlib.sha256) if key is not None else b""
        self._ticket.emit(("thinking_end", self.signature))

    def _rest(self) -> str:
        """What is left of a phase that is over, but white space at its end."""
        rest = self._decoder.finish()
        if self._kind == "text":
            rest = self._stops.feed(rest) + self._stops.flush()
        return self._trimmed(rest)

    def _say(self, text: str) -> None:
        """Pass text of the answer or of a thought on, but for what may belong to a stop string, or to nobody."""
        if self._kind == "text":
            text = self._stops.feed(text)
        text = self._trimmed(text)
        held = self._kind == "text" and (self._stops.holding or self._stops.matched is not None or self._white)
        if text or not held:
            self._send(text)

    def _trimmed(self, text: str) -> str:
        """Without white space around a phase; what may be in the middle of it comes with what follows."""
        if self._tracker is None or self._kind == "call":
            return text
        text = self._white + text
        if self._trimming:
            text = text.lstrip(WHITE)
            self._trimming = not text
        kept = text.rstrip(WHITE)
        self._white = text[len(kept) :]
        return kept

    def _send(self, text: str) -> None:
        """Tell a piece, of all tokens that none has told."""
        if not text and not self._unsent:
            return
        self._said[self._kind].append(text)
        if self._ticket.streaming:
            told = self.logprobs[len(self.logprobs) - len(self._unsent) :] if self.logprobs else ()
            self._ticket.emit((self._kind, text, tuple(self._unsent), tuple(told)))
        self._unsent.clear()
