"""One reply: its tokens become text, thinking and tool calls, and pieces for the reader of a stream.

`Sequence` owns a `Reply` and adds the sampled tokens, in the model thread.
"""

from __future__ import annotations

import hashlib
import hmac

from erllama.engine.backend import Vocabulary
from erllama.engine.output.phases import PhaseTracker, Segment, SegmentKind
from erllama.engine.output.stops import StopScanner
from erllama.engine.output.text import WHITE, TextDecoder
from erllama.engine.output.token_codec import TokenCodec
from erllama.engine.requests.request import RequestOptions
from erllama.engine.requests.ticket import DeltaPiece, EndPiece, Ticket
from erllama.engine.sampling.sampler import TokenLogprobs


class Reply:
    """Assembles the reply to one request.

    With phases, white space between them is removed. Stop strings are searched for before it is removed, in
    each text by itself. Every token is part of one piece, except those of a stop string.

    Args:
        ticket: receives the pieces.
        options: of the request.
        vocabulary, codec: of the model.
        tracker: separates the phases; None for a reply that is all text.
        partial: the bytes of a character that the prompt ends within. The reply's text has the whole character.

    Attributes:
        calls: the complete tool calls, as the model wrote them.
        places: for each of them, the number of characters of the text before it.
        logprobs: of the tokens, if requested.
        signature: of the thinking, once a thought has ended.
    """

    def __init__(
        self,
        ticket: Ticket,
        options: RequestOptions,
        vocabulary: Vocabulary,
        codec: TokenCodec,
        tracker: PhaseTracker | None,
        partial: bytes = b"",
    ) -> None:
        self._ticket, self._vocabulary, self._codec, self._tracker = ticket, vocabulary, codec, tracker
        self._phases = options.phases
        self._decoder, self._partial = TextDecoder(), partial
        self._stops = StopScanner(options.stop)
        self._texts: dict[SegmentKind, list[str]] = {"text": [], "thinking": [], "call": []}
        self._unsent: list[int] = []  # sampled tokens that are not part of a piece yet
        self._kind: SegmentKind = tracker.kind if tracker is not None else "text"
        self._at_phase_start = self._kind == "thinking"  # white space here is removed
        self._white = ""  # removed if the phase ends with it
        self._call = b""
        self._stop_token_text: str | None = None
        self.calls: list[bytes] = []
        self.places: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.signature: bytes | None = None

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._texts["text"])

    @property
    def thinking(self) -> str:
        """The thinking so far."""
        return "".join(self._texts["thinking"])

    @property
    def stop_sequence(self) -> str | None:
        """The stop string that ended the reply, or the text of the stop token that did."""
        return self._stop_token_text if self._stops.matched is None else self._stops.matched

    @property
    def at_stop_token(self) -> bool:
        """Whether a stop token ended the reply, and no stop string before it."""
        return self._stop_token_text is not None and self._stops.matched is None

    @property
    def within_character(self) -> bool:
        """Whether the last token ended within a character."""
        buffered = self._codec.text_bytes(self._tracker.buffer) if self._tracker is not None else b""
        if not buffered:
            return self._decoder.within
        # It may become a marker, which begins with a character of its own.
        decoder = TextDecoder()
        decoder.feed(buffered)
        return decoder.within

    def add(self, token: int) -> None:
        """Add one token."""
        if self._partial:  # a reply without tokens completes no character
            self._decoder, self._partial = TextDecoder(self._partial), b""
        self._unsent.append(token)
        if self._tracker is None:
            self._add_text(self._decoder.feed(self._vocabulary.piece(token)))
        else:
            for segment in self._tracker.feed(token):
                self._add_segment(segment)

    def stop_at(self, text: str) -> None:
        """End the reply at a stop token, which `stop_sequence` reports as this text."""
        self._stop_token_text = text

    def finish(self) -> None:
        """End the reply: send the buffered text that is not a stop string or marker."""
        for segment in self._tracker.finish() if self._tracker is not None else ():
            self._add_segment(segment)
        rest = self._flush()
        # White space before a marker is not text, even at the end of the reply.
        at_marker = self._tracker is not None and self._tracker.kind != "text" and self._stops.matched is None
        if self._kind == "text" and not at_marker:
            rest += self._white
        if rest or self._stops.matched is None:
            self._send(rest)

    # --- phases

    def _add_segment(self, segment: Segment) -> None:
        if segment.kind != self._kind and self._stops.matched is None:
            self._end_phase()
            if self._stops.matched is None:
                self._begin_phase(segment.kind)
        if self._stops.matched is not None:
            return
        if segment.encoded and segment.kind == "call":
            raw = self._codec.decode(segment.encoded)
            self._call += raw
            self._send(self._decoder.feed(raw))
        elif segment.encoded:
            self._add_text(self._decoder.feed(self._codec.text_bytes(segment.encoded)))
        if segment.ended:
            self._end_phase()
            self._begin_phase("text")

    def _begin_phase(self, kind: SegmentKind) -> None:
        self._kind, self._at_phase_start, self._white = kind, True, ""
        if kind == "text":
            self._stops.begin()

    def _end_phase(self) -> None:
        rest = self._flush()
        if self._kind == "thinking":
            self._end_thought(rest)
            return
        if rest:
            self._send(rest)
        if self._call:
            self.calls.append(self._call)
            self.places.append(len(self.text))
            self._ticket.emit(EndPiece("call", self._call))
            self._call = b""

    def _end_thought(self, rest: str) -> None:
        """End a thought, even an empty one; but not one that the budget ended before its first token."""
        assert self._phases is not None
        if self._phases.thinking_budget == 0 and not self.thinking and not rest:
            return
        self._send(rest)
        key = self._phases.signing_key
        self.signature = hmac.digest(key, self.thinking.encode(), hashlib.sha256) if key is not None else b""
        self._ticket.emit(EndPiece("thinking", self.signature))

    # --- text

    def _add_text(self, text: str) -> None:
        """Send text of the answer or of a thought. Keep what may be removed: stop strings and outer white space."""
        if self._kind == "text":
            text = self._stops.feed(text)
        text = self._trim(text)
        is_buffered = self._kind == "text" and (
            self._stops.holding or self._stops.matched is not None or self._white
        )
        if text or not is_buffered:
            self._send(text)

    def _flush(self) -> str:
        """Return the buffered text of a phase that ends, without white space at its end."""
        rest = self._decoder.finish()
        if self._kind == "text":
            rest = self._stops.feed(rest) + self._stops.flush()
        return self._trim(rest)

    def _trim(self, text: str) -> str:
        """Remove white space around a phase. White space that may be inside it is kept for the next call."""
        if self._tracker is None or self._kind == "call":
            return text
        text = self._white + text
        if self._at_phase_start:
            text = text.lstrip(WHITE)
            self._at_phase_start = not text
        kept = text.rstrip(WHITE)
        self._white = text[len(kept) :]
        return kept

    def _send(self, text: str) -> None:
        """Send a piece with all unsent tokens."""
        if not text and not self._unsent:
            return
        self._texts[self._kind].append(text)
        if self._ticket.streaming:
            logprobs = self.logprobs[len(self.logprobs) - len(self._unsent) :] if self.logprobs else ()
            self._ticket.emit(DeltaPiece(self._kind, text, tuple(self._unsent), tuple(logprobs)))
        self._unsent.clear()
