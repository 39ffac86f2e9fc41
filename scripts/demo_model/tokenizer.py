"""A byte-level BPE as libllama reads it from a GGUF: model "gpt2", pre-tokenizer "qwen2".

The tokenizer splits text into words and words into bytes, and joins bytes with the
learned merges, the earliest first. Each digit is a separate word, and so one token.
Special tokens are recognized wherever they are written out.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise

END = "<|im_end|>"
CONTROL = ("<|im_start|>", END)
# Also special, but part of the text of a reply.
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
SPECIAL = CONTROL + MARKERS
PRE_TOKENIZER = "qwen2"

# Qwen 2's words: `\p{L}` is [^\W\d_] here, and `\p{N}` is \d.
_WORD = re.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|(?:[^\r\n\w]|_)?[^\W\d_]+|\d| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")

Pair = tuple[str, str]


def _alphabet() -> list[str]:
    """Return the character for each byte, as in GPT-2: the byte itself if it is printable."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_ALPHABET = _alphabet()


class Tokenizer:
    """Tokens in the order of their ids: 256 bytes, the results of `merges`, and the special ones."""

    def __init__(self, merges: Sequence[Pair]) -> None:
        self.merges = list(merges)
        self.tokens = [*_ALPHABET, *("".join(pair) for pair in merges), *SPECIAL]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._of_word = lru_cache(maxsize=1 << 16)(self._encode_word)

    @classmethod
    def learn(cls, texts: Iterable[str], n_vocab: int) -> Tokenizer:
        """Learn the merges of the most frequent pairs in `texts`; ties are broken alphabetically."""
        counts = Counter(word for text in texts for part in _parts(text) for word in _WORD.findall(part))
        words = [(_spelled(word), count) for word, count in sorted(counts.items()) if count > 2]
        pairs: Counter[Pair] = Counter()
        where: defaultdict[Pair, set[int]] = defaultdict(set)
        for i, (word, count) in enumerate(words):
            for pair in pairwise(word):
                pairs[pair] += count
                where[pair].add(i)
        merges: list[Pair] = []
        while len(_ALPHABET) + len(merges) + len(SPECIAL) < n_vocab:
            best = max(pairs, key=lambda pair: (pairs[pair], pair))
            merges.append(best)
            for i in where.pop(best):
                word, count = words[i]
                for pair in pairwise(word):
                    pairs[pair] -= count
                word[:] = _join(word, best)
                for pair in pairwise(word):
                    pairs[pair] += count
                    where[pair].add(i)
            del pairs[best]
        return cls(merges)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, including special ones."""
        ids: list[int] = []
        for part in _SPECIAL.split(text):
            if part in SPECIAL:
                ids.append(self.ids[part])
            else:
                for word in _WORD.findall(part):
                    ids += self._of_word(word)
        return ids

    def _encode_word(self, word: str) -> tuple[int, ...]:
        pieces = _spelled(word)
        while len(pieces) > 1:
            best = min(pairwise(pieces), key=lambda pair: self._ranks.get(pair, len(self.tokens)))
            if best not in self._ranks:
                break
            pieces = _join(pieces, best)
        return tuple(self.ids[piece] for piece in pieces)


def _parts(text: str) -> list[str]:
    return [part for part in _SPECIAL.split(text) if part not in SPECIAL]


def _spelled(word: str) -> list[str]:
    return [_ALPHABET[byte] for byte in word.encode()]


def _join(pieces: list[str], pair: Pair) -> list[str]:
    """Return the pieces with each occurrence of a pair joined, from the left."""
    joined: list[str] = []
    i = 0
    while i < len(pieces):
        if tuple(pieces[i : i + 2]) == pair:
            joined.append(pieces[i] + pieces[i + 1])
            i += 2
        else:
            joined.append(pieces[i])
            i += 1
    return joined
