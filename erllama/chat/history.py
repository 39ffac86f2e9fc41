"""The tokens of a conversation: those that were really computed, as far as it is one that went on from here.

A reply that comes back as text may be other tokens than its text gives. So each
turn is remembered by its text, and the next turn's tokens are those of the
longest one remembered, followed by the tokens of what is new.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from queue import Empty, SimpleQueue

import numpy as np
from numpy.typing import NDArray

from erllama.cache import Cache
from erllama.chat.content import SpecialTexts, tokenized
from erllama.chat.content import raw as marked_bytes
from erllama.engine import Vocabulary
from erllama.engine.continuation_tokenizer import ContinuationTokenizer
from erllama.engine.output.phases import Script
from erllama.engine.output.text import unfinished
from erllama.engine.requests.prompts import PromptTokenizer

# Tokens at the end of a context that a text which goes on from it need not have: a stop string's, at most.
_MOST_MISSING = 16
_WHITE = b" \t\r\n"
# What the text of a reply has where its bytes are no character, and how many bytes one has at most.
_REPLACEMENT = "\ufffd".encode()
_LONGEST_CHARACTER = 4


class History:
    """Texts and tokens of one model's conversations. Thread-safe."""

    def __init__(self, vocabulary: Vocabulary, cache: Cache) -> None:
        self._vocabulary, self._cache = vocabulary, cache
        self._script = Script(vocabulary)
        self._first = PromptTokenizer(vocabulary).first  # BOS, where the model wants one
        # Some tokenizers put a space before a text, and before what follows a special token.
        self._continuation = ContinuationTokenizer(vocabulary)
        self._spaced_after = lru_cache(maxsize=4096)(self._puts_space_after)
        self._deferred: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def tokens(self, namespace: bytes, text: str, *, as_text: bool) -> NDArray[np.int32]:
        """The tokens of a rendered conversation, int32, shape (n,); special tokens are read, BOS comes once.

        Args:
            as_text: go by the text alone, whatever was computed before.
        """
        with suppress(Empty):
            while True:
                self._deferred.get_nowait()()
        raw = marked_bytes(text)
        known = None if as_text else self._cache.longest_text(namespace, raw)
        if known is None or not self._is_sound(known[1]) or _within_character(raw, known[0]):
            return self._of_whole(raw)
        n_bytes, tokens = known
        following = self._following(raw[n_bytes:], int(tokens[-1]))
        return np.concatenate([tokens, np.array(following, np.int32)])

    def going_on(self, context: NDArray[np.int32], text: str) -> NDArray[np.int32] | None:
        """The tokens of a text that goes on where a context ends; None where it does not.

        Args:
            context: the tokens of what was computed; the last few, such as those of a stop string, may be
                missing from the text.
        """
        raw, tokens = text.encode("utf-8", "surrogatepass"), context.tolist()
        given = raw.startswith(self.written(self._first))  # the text has its BOS itself
        begin = len(self._first) if tokens[: len(self._first)] == self._first and not given else 0
        ends = [0]  # in the text, of the tokens that it has
        for at, token in enumerate(tokens[begin:], begin):
            spaced = self._continuation.adds_space and (at == begin or self._spaced_after(tokens[at - 1]))
            end = self._end_of(token, raw, ends[-1], first=at == begin, spaced=spaced)
            if end is None:
                break
            ends.append(end)
        while len(ends) > 1 and (ends[-1] == ends[-2] or _within_character(raw, ends[-1])):
            ends.pop()
        n = begin + len(ends) - 1
        if n == begin or len(tokens) - n > min(_MOST_MISSING, n - begin):
            return None
        return np.array(tokens[:n] + self._following(raw[ends[-1] :], tokens[n - 1]), np.int32)

    def _end_of(self, token: int, raw: bytes, at: int, *, first: bool, spaced: bool) -> int | None:
        """Where a token ends in a text that has it at `at`; None where the text goes on otherwise.

        Args:
            first: it is the first of all.
            spaced: the tokenizer puts a space here, which is not in the text.
        """
        written = self._written(token)
        spaced = spaced and written.startswith(b" ")
        if spaced and raw.startswith(written[1:], at):
            return at + len(written) - 1
        if raw.startswith(written, at) and not (first and spaced):
            return at + len(written)
        return None

    def defer(self, remember: Callable[[], None]) -> None:
        """Have something remembered before the next tokens are asked for. Takes no lock that is not reentrant."""
        self._deferred.put(remember)

    def remember(self, namespace: bytes, text: bytes, tokens: Sequence[int]) -> None:
        """A text was computed as these tokens."""
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
        """A conversation went on with a reply, which may come back as it was said.

        Args:
            text: the conversation's, computed as `prompt`.
            cut: the reply may come back without white space at its end.
            stop: the stop string that it ended at, which will not come back.

        Returns:
            whether all of the reply is remembered: its text may not tell what it was.
        """
        begun, before = self.begun(text, prompt), marked_bytes(text)
        pieces = [self._written(token) for token in reply]
        if begun and pieces:
            before = before.removesuffix(_REPLACEMENT)
            pieces[0] = begun + pieces[0]
        if stop is not None:
            pieces = _before(stop.encode(), pieces)
        elif cut:
            self._remember_within_character(namespace, before, b"".join(pieces), prompt, reply)
        pieces = _whole(pieces)
        while cut and pieces and not pieces[-1].strip(_WHITE):
            pieces.pop()
        n, said = len(pieces), b"".join(pieces)
        if not said or not self._is_told_by(said, reply[:n]):
            return False
        self.remember(namespace, before + said, [*prompt, *reply[:n]])
        return n == len(reply)

    def begun(self, text: str, tokens: Sequence[int]) -> bytes:
        """The bytes of a character that tokens end within, where their text ends with U+FFFD for it."""
        if not text.endswith("\ufffd"):
            return b""
        return unfinished(map(self._vocabulary.piece, tokens[: -_LONGEST_CHARACTER - 1 : -1]))

    def _remember_within_character(
        self, namespace: bytes, before: bytes, said: bytes, prompt: Sequence[int], reply: Sequence[int]
    ) -> None:
        """Remember a reply that was cut within a character: it comes back with U+FFFD in its place."""
        end = unfinished([said])
        whole = said.removesuffix(end)
        if end and _is_text(whole) and self._is_told_by(whole, reply):
            self.remember(namespace, before + whole + _REPLACEMENT, [*prompt, *reply])

    def written(self, tokens: Sequence[int]) -> bytes:
        """What tokens say, special tokens written out."""
        return b"".join(map(self._written, tokens))

    def _is_told_by(self, said: bytes, tokens: Sequence[int]) -> bool:
        """Whether no other conversation can have this text: it spells no special token out."""
        read = self._tokenize(said)
        return [token for token in tokens if self._is_special(token)] == list(filter(self._is_special, read))

    def _is_special(self, token: int) -> bool:
        return not self._vocabulary.piece(token)

    def _is_sound(self, tokens: NDArray[np.int32]) -> bool:
        """Whether tokens are this model's: they may come from a file."""
        return bool(len(tokens)) and int(tokens.min()) >= 0 and int(tokens.max()) < self._vocabulary.n_tokens

    @cached_property
    def special(self) -> SpecialTexts:
        """The texts of the tokens that are no text, or a template's markers."""
        return SpecialTexts.of(self._vocabulary)

    def _of_whole(self, raw: bytes) -> NDArray[np.int32]:
        ids = tokenized(raw, lambda: self.special, self._ids, None)
        first = self._first if ids[: len(self._first)] != self._first else []
        return np.array(first + ids, np.int32)

    def _following(self, text: bytes, before: int) -> list[int]:
        """The tokens of a text that follows a token."""
        if not text:
            return []
        return tokenized(text, lambda: self.special, self._ids, before)

    def _ids(self, text: bytes, before: int | None, parse_special: bool) -> list[int]:
        """The tokens of a text that has no marks."""
        if before is not None and self._continuation.adds_space and not self._spaced_after(before):
            ids = self._continuation.tokenize(text, parse_special=parse_special)
            if ids is not None:
                return ids
        return self._tokenize(text, parse_special=parse_special)

    def _puts_space_after(self, token: int) -> bool:
        """Whether the tokenizer puts a space before what follows a token."""
        return self._continuation.adds_space_after(token, self._written(token))

    def _written(self, token: int) -> bytes:
        return self._script.written(self._script.of_token(token))

    def _tokenize(self, text: str | bytes, *, parse_special: bool = True) -> list[int]:
        found = self._vocabulary.tokenize(text, add_special=False, parse_special=parse_special)
        ids: list[int] = found.tolist()
        return ids


def _before(stop: bytes, pieces: list[bytes]) -> list[bytes]:
    """The pieces that end before a stop string, with which the last of them ended a reply."""
    said = b"".join(pieces)
    found = said.find(stop, max(len(said) - len(pieces[-1]) - len(stop) + 1, 0)) if pieces else 0
    return _up_to(found if found >= 0 else said.rfind(stop), pieces)  # seen late, where it might become another


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _whole(pieces: list[bytes]) -> list[bytes]:
    """The pieces up to a character that is not complete, or is none."""
    while True:
        try:
            b"".join(pieces).decode()
        except UnicodeDecodeError as error:
            pieces = _up_to(error.start, pieces)
        else:
            return pieces


def _up_to(end: int, pieces: list[bytes]) -> list[bytes]:
    """The pieces that end within so many bytes."""
    n = n_bytes = 0
    while n < len(pieces) and n_bytes + len(pieces[n]) <= end:
        n_bytes += len(pieces[n])
        n += 1
    return pieces[:n]


def _within_character(raw: bytes, at: int) -> bool:
    return at < len(raw) and raw[at] & 0xC0 == 0x80
