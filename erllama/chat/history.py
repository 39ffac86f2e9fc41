"""History of a model's conversations: the tokens that a rendered text was computed as.

The text of a reply may tokenize to other tokens than the model sampled. So `History` remembers the text of each
turn with its tokens, in the cache. The tokens of the next turn are those of the longest remembered text that it
begins with, followed by the tokens of the rest. `erllama.chat.chats` asks for tokens; `erllama.chat.turn` remembers
replies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from queue import Empty, SimpleQueue

import numpy as np
from numpy.typing import NDArray

from erllama.cache import Cache
from erllama.chat.content_masking import SpecialTokenTexts, encode_marked, tokenize_marked
from erllama.engine import Vocabulary
from erllama.engine.continuation_tokenizer import ContinuationTokenizer
from erllama.engine.output.text import WHITE, unfinished
from erllama.engine.output.token_codec import TokenCodec
from erllama.engine.requests.prompts import PromptTokenizer

# Tokens at the end of a context that a continuation may lack: at most those of a stop string.
_MAX_MISSING = 16
_WHITE_SPACE = WHITE.encode()
# Stands in a reply's text for bytes that are not a character.
_REPLACEMENT = "\ufffd".encode()
_LONGEST_CHARACTER = 4  # bytes


class History:
    """Remembers the texts of one model's conversations with their tokens. Thread-safe."""

    def __init__(self, vocabulary: Vocabulary, cache: Cache) -> None:
        self._vocabulary, self._cache = vocabulary, cache
        self._codec = TokenCodec(vocabulary)
        self._first = PromptTokenizer(vocabulary).first  # BOS, if the model requires one
        # Some tokenizers put a space before a text, and before what follows a special token.
        self._continuation = ContinuationTokenizer(vocabulary)
        self._spaced_after = lru_cache(maxsize=4096)(self._puts_space_after)
        self._deferred: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def tokens(self, namespace: bytes, text: str, *, as_text: bool) -> NDArray[np.int32]:
        """Return the tokens of a rendered conversation, int32, shape (n,), with one BOS if the model has one.

        Args:
            namespace: root key of the cache entries that the request may share.
            text: the conversation as `Conversation.render` returns it. Special tokens in it are parsed.
            as_text: tokenize the text alone, and ignore remembered texts.
        """
        with suppress(Empty):
            while True:
                self._deferred.get_nowait()()
        raw = encode_marked(text)
        known = None if as_text else self._cache.longest_text(namespace, raw)
        if known is None or not self._is_valid(known[1]) or _within_character(raw, known[0]):
            return self._tokenize_conversation(raw)
        n_bytes, tokens = known
        following = self._tokenize_after(raw[n_bytes:], int(tokens[-1]))
        return np.concatenate([tokens, np.array(following, np.int32)])

    def continue_context(self, context: NDArray[np.int32], text: str) -> NDArray[np.int32] | None:
        """Return the tokens of a text that continues a context, int32, shape (n,); None if it does not.

        Args:
            context: tokens that were computed, int32, shape (n,). The text may lack the last few of them, such as
                those of a stop string.
        """
        raw, tokens = text.encode("utf-8", "surrogatepass"), context.tolist()
        has_bos = raw.startswith(self.spell_out(self._first))
        begin = len(self._first) if tokens[: len(self._first)] == self._first and not has_bos else 0
        ends = [0]  # positions in the text at which the matched tokens end
        for at, token in enumerate(tokens[begin:], begin):
            spaced = self._continuation.adds_space and (at == begin or self._spaced_after(tokens[at - 1]))
            end = self._match_token(token, raw, ends[-1], first=at == begin, spaced=spaced)
            if end is None:
                break
            ends.append(end)
        while len(ends) > 1 and (ends[-1] == ends[-2] or _within_character(raw, ends[-1])):
            ends.pop()
        n = begin + len(ends) - 1
        if n == begin or len(tokens) - n > min(_MAX_MISSING, n - begin):
            return None
        return np.array(tokens[:n] + self._tokenize_after(raw[ends[-1] :], tokens[n - 1]), np.int32)

    def _match_token(self, token: int, raw: bytes, at: int, *, first: bool, spaced: bool) -> int | None:
        """Return the end of a token in a text that has it at `at`; None if the text has something else.

        Args:
            first: the token is the first one of the text.
            spaced: the tokenizer puts a space here, which is not in the text.
        """
        spelling = self._spell_token(token)
        spaced = spaced and spelling.startswith(b" ")
        if spaced and raw.startswith(spelling[1:], at):
            return at + len(spelling) - 1
        if raw.startswith(spelling, at) and not (first and spaced):
            return at + len(spelling)
        return None

    def defer(self, remember: Callable[[], None]) -> None:
        """Call `remember` at the beginning of the next call of `tokens`.

        Takes no lock that is not reentrant, so `__del__` may call it.
        """
        self._deferred.put(remember)

    def remember(self, namespace: bytes, text: bytes, tokens: Sequence[int]) -> None:
        """Remember that a text was computed as these tokens."""
        self._cache.remember_text(namespace, text, np.array(tokens, np.int32))

    def remember_reply(
        self,
        namespace: bytes,
        text: str,
        prompt: Sequence[int],
        reply: Sequence[int],
        *,
        cut: bool,
        stop: str | None,
    ) -> bool:
        """Remember a reply under the conversation's text followed by the reply as the model wrote it.

        Args:
            text: the rendered conversation, computed as `prompt`.
            cut: the reply was cut short, so later turns may have it without the white space at its end.
            stop: the stop string that ended the reply, which later turns do not have.

        Returns:
            Whether the whole reply is remembered. A reply whose text is ambiguous is not.
        """
        partial, before = self.partial_character(text, prompt), encode_marked(text)
        pieces = [self._spell_token(token) for token in reply]
        if partial and pieces:
            before = before.removesuffix(_REPLACEMENT)
            pieces[0] = partial + pieces[0]
        if stop is not None:
            pieces = _pieces_before_stop(stop.encode(), pieces)
        elif cut:
            self._remember_within_character(namespace, before, b"".join(pieces), prompt, reply)
        pieces = _complete_pieces(pieces)
        while cut and pieces and not pieces[-1].strip(_WHITE_SPACE):
            pieces.pop()
        n, reply_bytes = len(pieces), b"".join(pieces)
        if not reply_bytes or not self._is_unambiguous(reply_bytes, reply[:n]):
            return False
        self.remember(namespace, before + reply_bytes, [*prompt, *reply[:n]])
        return n == len(reply)

    def partial_character(self, text: str, tokens: Sequence[int]) -> bytes:
        """Return the incomplete character that tokens end with; b"" if `text` does not end with U+FFFD."""
        if not text.endswith("\ufffd"):
            return b""
        return unfinished(map(self._vocabulary.piece, tokens[: -_LONGEST_CHARACTER - 1 : -1]))

    def _remember_within_character(
        self, namespace: bytes, before: bytes, reply_bytes: bytes, prompt: Sequence[int], reply: Sequence[int]
    ) -> None:
        """Remember a reply that was cut within a character. Later turns have U+FFFD in the place of its bytes."""
        end = unfinished([reply_bytes])
        whole = reply_bytes.removesuffix(end)
        if end and _is_utf8(whole) and self._is_unambiguous(whole, reply):
            self.remember(namespace, before + whole + _REPLACEMENT, [*prompt, *reply])

    def spell_out(self, tokens: Sequence[int]) -> bytes:
        """Return the text of tokens, with special tokens spelled out."""
        return b"".join(map(self._spell_token, tokens))

    def _is_unambiguous(self, reply_bytes: bytes, tokens: Sequence[int]) -> bool:
        """Return whether a text identifies its tokens: it has the same special tokens and spells out no other."""
        retokenized = self._tokenize(reply_bytes)
        return [token for token in tokens if self._is_special(token)] == list(filter(self._is_special, retokenized))

    def _is_special(self, token: int) -> bool:
        return not self._vocabulary.piece(token)

    def _is_valid(self, tokens: NDArray[np.int32]) -> bool:
        """Return whether all tokens are in the vocabulary. Tokens that were read from a file may not be."""
        return bool(len(tokens)) and int(tokens.min()) >= 0 and int(tokens.max()) < self._vocabulary.n_tokens

    @cached_property
    def special(self) -> SpecialTokenTexts:
        """Texts of the control tokens and of the tokens that look like a template's markers."""
        return SpecialTokenTexts.from_vocabulary(self._vocabulary)

    def _tokenize_conversation(self, raw: bytes) -> NDArray[np.int32]:
        ids = tokenize_marked(raw, lambda: self.special, self._tokenize_text, None)
        first = self._first if ids[: len(self._first)] != self._first else []
        return np.array(first + ids, np.int32)

    def _tokenize_after(self, text: bytes, before: int) -> list[int]:
        """Return the tokens of a text that follows a token."""
        if not text:
            return []
        return tokenize_marked(text, lambda: self.special, self._tokenize_text, before)

    def _tokenize_text(self, text: bytes, before: int | None, parse_special: bool) -> list[int]:
        """Return the tokens of a text without marks."""
        if before is not None and self._continuation.adds_space and not self._spaced_after(before):
            ids = self._continuation.tokenize(text, parse_special=parse_special)
            if ids is not None:
                return ids
        return self._tokenize(text, parse_special=parse_special)

    def _puts_space_after(self, token: int) -> bool:
        """Return whether the tokenizer puts a space before a text that follows a token."""
        return self._continuation.adds_space_after(token, self._spell_token(token))

    def _spell_token(self, token: int) -> bytes:
        return self._codec.decode(self._codec.encode_token(token))

    def _tokenize(self, text: str | bytes, *, parse_special: bool = True) -> list[int]:
        array = self._vocabulary.tokenize(text, add_special=False, parse_special=parse_special)
        ids: list[int] = array.tolist()
        return ids


def _pieces_before_stop(stop: bytes, pieces: list[bytes]) -> list[bytes]:
    """Return the pieces before a stop string that ended a reply in its last piece."""
    text = b"".join(pieces)
    position = text.find(stop, max(len(text) - len(pieces[-1]) - len(stop) + 1, 0)) if pieces else 0
    # A stop string that may become a longer one is found late, so it may end before the last piece.
    return _pieces_within(position if position >= 0 else text.rfind(stop), pieces)


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _complete_pieces(pieces: list[bytes]) -> list[bytes]:
    """Return the pieces before the first incomplete or invalid character."""
    while True:
        try:
            b"".join(pieces).decode()
        except UnicodeDecodeError as error:
            pieces = _pieces_within(error.start, pieces)
        else:
            return pieces


def _pieces_within(end: int, pieces: list[bytes]) -> list[bytes]:
    """Return the pieces that end within the first `end` bytes."""
    n = n_bytes = 0
    while n < len(pieces) and n_bytes + len(pieces[n]) <= end:
        n_bytes += len(pieces[n])
        n += 1
    return pieces[:n]


def _within_character(raw: bytes, at: int) -> bool:
    return at < len(raw) and raw[at] & 0xC0 == 0x80
