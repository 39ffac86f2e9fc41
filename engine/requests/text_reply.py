"""A reply that is all text: without phases, stop strings and log-probabilities.

Every token of such a reply is one piece, whatever its text. So the model thread passes on tokens, and the reader's
thread decodes them. `Sequence` owns a `TextReply` in place of a `Reply` for such requests.
"""

from __future__ import annotations

from collections.abc import Sequence

from erllama.engine.backend import Vocabulary
from erllama.engine.output.text import TextDecoder, TokenDecoder
from erllama.engine.requests.request import RequestOptions
from erllama.engine.requests.ticket import TextTokens, Ticket
from erllama.engine.sampling.sampler import TokenLogprobs


class TextReply:
    """Assembles the reply to one request.

    Args:
        ticket: receives the tokens.
        vocabulary: of the model.
        partial: the bytes of a character that the prompt ends within. The reply's text has the whole character.

    Attributes:
        text: the whole reply, after `finish`.
        others: as in `Reply`, and always empty.
    """

    stop_sequence: str | None = None
    at_stop_token = False
    within_character = False
    thinking = ""
    signature: bytes | None = None
    calls: Sequence[bytes] = ()
    places: Sequence[int] = ()

    def __init__(self, ticket: Ticket, vocabulary: Vocabulary, partial: bytes) -> None:
        self._ticket, self._vocabulary, self._partial = ticket, vocabulary, partial
        self.logprobs: list[TokenLogprobs] = []
        self.text = ""
        if ticket.streaming:
            ticket.decode_with(TokenDecoder(vocabulary, partial))

    @staticmethod
    def suits(options: RequestOptions) -> bool:
        """Return whether the reply to a request is all text."""
        return (
            options.phases is None
            and options.grammar is None
            and options.logprobs is None
            and options.speculative is None
            and not options.stop
            and not options.stop_token_ids
        )

    def add(self, token: int) -> None:
        """Add one token."""
        self._ticket.emit(token)

    def finish(self, tokens: Sequence[int]) -> None:
        """End the reply, which consists of `tokens`. Sends U+FFFD for a character that never ended."""
        decoder = TextDecoder(self._partial if tokens else b"")  # a reply without tokens completes no character
        text = decoder.feed(b"".join(map(self._vocabulary.piece, tokens)))
        rest = decoder.finish() if tokens else ""
        self.text = text + rest
        if rest:
            self._ticket.emit(TextTokens((), is_last=True))
