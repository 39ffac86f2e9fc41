"""A vocabulary made of texts, and a backend that replies with scripted tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from erllama.cache.blocks.keys import NamespaceValue
from erllama.engine.backend import Batch
from erllama.engine.backends.stub import StubBackend

EOG = 256
START = ord("\t")  # the reply follows the last of these

_token_of: dict[int, int] = {}  # by the content of the token's cell, which also depends on all tokens before it


class PieceVocabulary:
    """Bytes, an end token, some longer texts, and special tokens without text.

    Texts are tokenized by the longest piece that fits, so a reply of single bytes often differs from the
    tokens of its text.
    """

    def __init__(self, pieces: Sequence[str] = (), special: Sequence[str] = (), end: str = "<|end|>") -> None:
        self._pieces = [bytes([byte]) for byte in range(256)] + [b""] + [piece.encode() for piece in pieces]
        self.special = {name: len(self._pieces) + i for i, name in enumerate(special)}
        self._names = {id: name.encode() for name, id in self.special.items()} | {EOG: end.encode()}
        self._pieces += [b""] * len(special)
        self._by_length = sorted(
            (id for id, piece in enumerate(self._pieces) if piece), key=lambda id: -len(self._pieces[id])
        )
        self.n_tokens = len(self._pieces)
        self.is_eog: NDArray[np.bool_] = np.arange(self.n_tokens) == EOG

    def tokens_that_start(self, raw: bytes) -> list[int]:
        """Return the text tokens with which some bytes can start."""
        return [id for id in self._by_length if raw.startswith(self._pieces[id])]

    def byte_tokens(self, text: str) -> list[int]:
        """Return the single-byte tokens of a text."""
        return list(text.encode())

    def tokenize(
        self, source: str | bytes, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        raw = source.encode() if isinstance(source, str) else bytes(source)
        ids = []
        while raw:
            named = [id for id, name in self._names.items() if parse_special and raw.startswith(name)]
            id = named[0] if named else self.tokens_that_start(raw)[0]
            ids.append(id)
            raw = raw[len(self._names.get(id) or self._pieces[id]) :]
        return np.array(ids, np.int32)

    def piece(self, token: int) -> bytes:
        return self._pieces[token]

    def detokenize(self, tokens: Sequence[int] | NDArray[np.integer], *, special: bool = False) -> bytes:
        return b"".join(
            self._names[int(token)] if special and int(token) in self._names else self._pieces[int(token)]
            for token in tokens
        )


class ScriptedBackend(StubBackend):
    """A stub that generates a scripted reply, then an end token.

    Args:
        reply: the token ids that follow the last START of a prompt, or a function from all tokens to the next.
        chat_templates: the templates of its model file.
    """

    def __init__(
        self,
        vocabulary: PieceVocabulary,
        reply: Sequence[int] | Callable[[list[int]], int],
        *,
        chat_templates: Mapping[str, str] | None = None,
        **sizes: int,
    ) -> None:
        super().__init__(**sizes)  # type: ignore[arg-type]
        self.limits = self.limits.__class__(
            **{
                **{name: getattr(self.limits, name) for name in self.limits.__slots__},
                "n_vocab": vocabulary.n_tokens,
            }
        )
        self.vocabulary = vocabulary  # type: ignore[assignment]
        self.namespace: Mapping[str, NamespaceValue] = {"backend": "spelled", "tokens": vocabulary.n_tokens}
        self.chat_templates = dict(chat_templates or {})
        self._reply = reply
        self._batch: Batch | None = None

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        self._batch = batch
        try:
            return super().decode(batch)
        finally:
            self._batch = None

    def _append_cells(self, sequence: int, start: int, cells: NDArray[np.int32]) -> None:
        super()._append_cells(sequence, start, cells)
        if self._batch is not None:
            row = np.flatnonzero((self._batch.sequences == sequence) & (self._batch.positions == start))[0]
            _token_of[int(self._kv[cells[0]])] = int(self._batch.tokens[row])

    def _logits(self, sequence: int) -> NDArray[np.float32]:
        values = self._values(sequence, 0, self._lengths[sequence]).tolist()
        tokens = [_token_of[value] for value in values]
        logits = np.zeros(self.limits.n_vocab, np.float32)
        logits[self._next(tokens)] = 50.0
        return logits

    def _next(self, tokens: list[int]) -> int:
        if not isinstance(self._reply, Sequence):
            return self._reply(tokens)
        n = tokens[::-1].index(START) if START in tokens else 0
        return self._reply[n] if n < len(self._reply) else EOG


def scripted_reply(vocabulary: PieceVocabulary, tokens: Sequence[int]) -> object:
    """Return a reply for ScriptedBackend: these tokens, also after other tokens of the same text."""
    prefixes = [vocabulary.detokenize(tokens[:n], special=True) for n in range(len(tokens) + 1)]

    def next_token(context: list[int]) -> int:
        n = context[::-1].index(START)
        so_far = vocabulary.detokenize(context[len(context) - n :], special=True)
        if so_far in prefixes[:-1]:
            return tokens[prefixes.index(so_far)]
        rest = prefixes[-1].removeprefix(so_far)
        return rest[0] if prefixes[-1].startswith(so_far) and rest else 256

    return next_token
