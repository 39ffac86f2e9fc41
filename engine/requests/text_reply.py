"""A reply that is all text: without phases, stop strings and log-probabilities.

Every token of such a reply is one piece, whatever its text. So the model thread passes on tokens, and the reader's
thread decodes them. `Sequence` owns a `TextReply` in place of a `Reply` for such requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from erllama.engine.backend import Vocabulary
from erllama.engine.output.text import TextDecoder, TokenDecoder, unfinished
from erllama.engine.requests.request import RequestOptions
from erllama.engine.requests.ticket import TextTokens, Ticket
from erllama.engine.sampling.sampler import TokenLogprobs

_MAX_BEGUN_TOKENS = 4  # at the prompt's end, of one character: it has as many bytes


def partial_character(prompt: NDArray[np.int32], vocabulary: Vocabulary) -> bytes:
    """Return the bytes of the incomplete character at the end of a prompt, int32, shape (n,); usually empty."""
    return unfinished(map(vocabulary.piece, prompt[-_MAX_BEGUN_TOKENS:].tolist()[::-1]))


def decode_pieces(ticket: Ticket, vocabulary: Vocabulary) -> None:
    """Make a ticket decode the tokens of a reply that is all text, from where its request begins or resumes.

    Whoever fills the ticket calls this before its first piece: `TextReply` in the process of the model, and a
    parent process in its own. When a request resumes in another process, the parent's ticket keeps its decoder.
    """
    request = ticket.request
    decoder = TokenDecoder(vocabulary, partial_character(request.prompt, vocabulary))
    if request.resumed is not None:
        for token in request.resumed.tokens:
            decoder.feed(token)
    ticket.decode_with(decoder)


class TextReply:
    """Assembles the reply to one request.

    Args:
        ticket: receives the tokens.
        vocabulary: of the model.

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

    def __init__(self, ticket: Ticket, vocabulary: Vocabulary) -> None:
        self._ticket, self._vocabulary = ticket, vocabulary
        self._partial = partial_character(ticket.request.prompt, vocabulary)
        self.logprobs: list[TokenLogprobs] = []
        self.text = ""
        if ticket.streaming:
            decode_pieces(ticket, vocabulary)

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
        # The text has the whole character that the prompt ends within. A reply without tokens completes none.
        decoder = TextDecoder(self._partial if tokens else b"")
        text = decoder.feed(b"".join(map(self._vocabulary.piece, tokens)))
        rest = decoder.finish() if tokens else ""
        self.text = text + rest
        if rest:
            self._ticket.emit(TextTokens((), is_last=True))
