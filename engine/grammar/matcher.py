"""The state of one reply in a grammar: which tokens are allowed next, and which are forced.

`engine.grammar.grammar` makes matchers, and the sequence of a reply owns one. The masks are llguidance's
(https://github.com/guidance-ai/llguidance); this module adds what depends on the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from erllama.engine.grammar.llguidance_adapter import GuidanceVocabulary, describe_error, is_limit
from erllama.errors import GrammarError


class Matcher:
    """The state of one reply in a grammar. One thread at a time may use it.

    Args:
        vocabulary: the model's vocabulary.
        native: a copy of the compiled grammar.
        on_limit: called when the grammar reaches one of llguidance's limits. All copies of a compiled grammar share
            its lexer, so no copy works after that.
        names_tokens: whether the grammar refers to tokens, so that it may allow tokens without text.
    """

    def __init__(
        self, vocabulary: GuidanceVocabulary, native: LLMatcher, on_limit: Callable[[], None], *, names_tokens: bool
    ) -> None:
        self._vocabulary, self._native, self._on_limit = vocabulary, native, on_limit
        self._names_tokens = names_tokens
        self._bits = np.zeros((vocabulary.n_total + 31) // 32, np.uint32)
        self._recent: list[int] = []
        self._begun = self._ended = False

    def fork(self) -> Matcher:
        """Return an independent copy in the same state."""
        fork = Matcher(self._vocabulary, self._native.deep_copy(), self._on_limit, names_tokens=self._names_tokens)
        fork._recent, fork._begun, fork._ended = list(self._recent), self._begun, self._ended
        return fork

    def allowed(self) -> NDArray[np.bool_]:
        """Return the tokens that are allowed next.

        Returns:
            bool, shape (n_tokens,), valid until the next call. Tokens that end the reply are allowed where
            `accepting`. No token is allowed after the end of the reply, or where the vocabulary lacks the bytes
            that the grammar requires.

        Raises:
            GrammarError: the grammar takes too long, or too much memory, in this state.
        """
        vocabulary = self._vocabulary
        if self._ended:
            return np.zeros(vocabulary.n_tokens, np.bool_)
        mask = np.unpackbits(self._mask().view(np.uint8), bitorder="little").view(np.bool_)
        allowed = mask[: vocabulary.n_tokens]
        if not self._names_tokens:
            allowed[vocabulary.without_text] = False
        allowed[vocabulary.eog_ids] = mask[vocabulary.end_token]
        return allowed

    def accept(self, token: int) -> None:
        """Advance by a token.

        Raises:
            GrammarError: the token is not allowed here; the state is unchanged. Or the grammar takes too long, or
                too much memory, in this state.
        """
        vocabulary = self._vocabulary
        token = int(token)
        if self._ended or not 0 <= token < vocabulary.n_tokens:
            raise GrammarError(
                f"token {token}: " + ("the reply has ended" if self._ended else "outside the vocabulary")
            )
        if token in vocabulary.eog_set:
            if not self.accepting:
                raise GrammarError(f"token {token} ends the reply, and the grammar does not end here")
            self._ended = True
            return
        without_text = not vocabulary.pieces[token] and not self._names_tokens
        if without_text or self._native.try_consume_tokens([token]) != 1:
            self._raise_limit(token)
            raise GrammarError(f"token {token} ({vocabulary.pieces[token]!r}) is not allowed by the grammar here")
        self._begun = True
        self._recent = [*self._recent[-3:], token]

    def accept_text(self, data: bytes) -> bool:
        """Advance by bytes. They need not end where a token ends.

        Returns:
            whether the bytes stay in the language. If not, the state is unchanged.

        Raises:
            GrammarError: the grammar takes too long, or too much memory, in this state.
        """
        vocabulary = self._vocabulary
        ids = [vocabulary.n_tokens + byte for byte in data]
        # llguidance marks names of tokens with this byte. No text has it.
        if self._ended or 0xFF in data:
            return not ids
        n = self._native.validate_tokens(ids)
        if n < len(ids):
            self._raise_limit(*ids[: n + 1])
            return False
        self._native.try_consume_tokens(ids)
        if ids:
            self._begun = True
            self._recent = []
        return True

    def forced(self) -> list[int]:
        """Return the tokens that the grammar forces next, as the model's tokenizer writes them.

        Returns:
            ids; [] if several texts, or the end, are possible, or if later text may change the first token.
        """
        if self._ended:
            return []
        # On a copy: after it looked ahead to a token, llguidance no longer accepts the token.
        data = self._native.deep_copy().compute_ff_bytes()
        if data.startswith(b"\xff["):
            token = int(data[2 : data.index(b"]")])
            return [] if token in self._vocabulary.eog_set or token >= self._vocabulary.n_tokens else [token]
        data = data.split(b"\xff", 1)[0]
        return self._vocabulary.forced_tokenizer().tokenize(data, self._recent) if data else []

    @property
    def accepting(self) -> bool:
        """Whether the reply may end here."""
        return self._ended or self._native.is_accepting()

    @property
    def stopped(self) -> bool:
        """Whether only the end can follow."""
        if self._ended or self._native.is_stopped():
            return True
        # llguidance reports an end after a step, so not at the start of a grammar whose only text is empty.
        return (
            not self._begun and self.accepting and int.from_bytes(self._mask().tobytes(), "little").bit_count() == 1
        )

    def _mask(self) -> NDArray[np.uint32]:
        self._native.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._native.is_error():
            self._on_limit()
            raise GrammarError(describe_error(self._native.get_error()).text)
        return self._bits

    def _raise_limit(self, *tokens: int) -> None:
        """Raise GrammarError if a limit is the reason that the last token was refused.

        To find out, a copy consumes the tokens. That breaks the copy.
        """
        ahead = self._native.deep_copy()
        ahead.try_consume_tokens(list(tokens[:-1]))
        ahead.consume_token(tokens[-1])
        if is_limit(ahead.get_error()):
            self._on_limit()
            raise GrammarError(describe_error(ahead.get_error()).text)
