"""A model's vocabulary: the tokenizer, and the kind and text of each token.

Thread-safe: any thread may call libllama's tokenizer, and all other values are read once, when the object is made.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np

from erllama.llama_ffi.library import LlamaError, check, ffi, lib, text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from erllama.llama_ffi.handle import Handle

_TYPE_NAMES = {0: "none", 1: "spm", 2: "bpe", 3: "wpm", 4: "ugm", 5: "rwkv", 6: "plamo2"}
_SPECIAL = ("bos", "eos", "eot", "nl", "pad", "sep", "mask", "fim_pre", "fim_suf", "fim_mid")
_ATTR_CONTROL = 1 << 3
_INT32_MAX = 2**31 - 1


class Vocabulary:
    """The vocabulary of one model.

    Attributes:
        n_tokens: size; token ids are 0 to n_tokens - 1.
        type: the kind of tokenizer: "spm", "bpe", "wpm", "ugm", "rwkv", "plamo2" or "none".
        bos, eos, eot, nl, pad, sep: ids of special tokens; None if the model lacks one.
        fim_pre, fim_suf, fim_mid: ids of the infill tokens for the text before a gap, after it, and in it; or None.
        special_token_ids: the ids of the model's special tokens by name: the above, and "mask".
        add_bos, add_eos: whether `tokenize(add_special=True)` adds them.
        add_sep: whether the model puts `sep` between two texts.
        is_eog: bool array, shape (n_tokens,): the tokens that end a generation.
        longest_piece: maximum bytes of a text that one token represents; 0 for tokenizers that drop bytes, or
            that represent any number of unknown bytes by one token.
        is_control: bool array, shape (n_tokens,): control tokens, which have no text.
    """

    def __init__(self, model: Handle) -> None:
        self._model = model
        with model.use() as pointer:
            # Lives as long as the model, so it is used only while the model is held.
            self._vocab = lib.erl_vocab(pointer)
            shape = ffi.new("erl_vocab_shape *")
            check(lib.erl_vocab_shape_of(self._vocab, shape), "reading the vocabulary")
            self.n_tokens = int(shape.n_tokens)
            attributes = np.zeros(self.n_tokens, np.int32)
            eog = np.zeros(self.n_tokens, np.int8)
            check(
                lib.erl_vocab_attributes(
                    self._vocab,
                    ffi.from_buffer("int32_t[]", attributes),
                    ffi.from_buffer("int8_t[]", eog),
                    self.n_tokens,
                ),
                "reading the vocabulary",
            )
        self.type = _TYPE_NAMES.get(shape.type, f"type {shape.type}")
        self.bos, self.eos, self.eot = _id(shape.bos), _id(shape.eos), _id(shape.eot)
        self.nl, self.pad, self.sep = _id(shape.nl), _id(shape.pad), _id(shape.sep)
        self.fim_pre, self.fim_suf, self.fim_mid = _id(shape.fim_pre), _id(shape.fim_suf), _id(shape.fim_mid)
        self.special_token_ids = {name: int(id) for name in _SPECIAL if (id := getattr(shape, name)) >= 0}
        self.add_bos, self.add_eos, self.add_sep = bool(shape.add_bos), bool(shape.add_eos), bool(shape.add_sep)
        self.is_eog: NDArray[np.bool_] = eog.astype(bool)
        self.is_control: NDArray[np.bool_] = (attributes & _ATTR_CONTROL) != 0
        self._pieces, self._ends = self._read_pieces()
        self.longest_piece = self._longest_piece()
        self._space_first = False
        if self.type != "none":
            first = self.tokenize("a", add_special=False)[:1]
            self._space_first = bool(len(first)) and self.piece(int(first[0])).startswith(b" ")

    def tokenize(
        self, source: str | bytes, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        """Tokenize a text.

        Args:
            source: text, or its bytes.
            add_special: add BOS and EOS if the model asks for them.
            parse_special: read the text of special tokens as those tokens.

        Returns:
            int32 array, shape (n,).

        Raises:
            LlamaError: the model has no tokenizer, or the text is too long.
        """
        if self.type == "none":
            raise LlamaError("this model has no tokenizer; pass token ids")
        raw = source.encode("utf-8", "surrogatepass") if isinstance(source, str) else bytes(source)
        if len(raw) > _INT32_MAX // 4:
            raise LlamaError(f"a text of {len(raw)} bytes; the tokenizer takes at most {_INT32_MAX // 4}")
        tokens = np.empty(len(raw) + 8, np.int32)
        with self._model.use():
            for _ in range(2):
                out = ffi.from_buffer("int32_t[]", tokens, require_writable=True)
                n = check(
                    lib.erl_tokenize(self._vocab, raw, len(raw), out, len(tokens), add_special, parse_special),
                    "tokenizing",
                )
                if n >= 0:
                    return tokens[:n].copy()
                tokens = np.empty(-n, np.int32)
        raise LlamaError(f"tokenizing a text of {len(raw)} bytes failed")

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Return the bytes of one token; empty for a control token unless `special`."""
        if not 0 <= token < self.n_tokens:
            self._check_ids([token])
        if not special:
            return self._pieces[self._ends[token] : self._ends[token + 1]]
        size = 64
        with self._model.use():
            buffer = ffi.new("char[]", size)
            n = check(lib.erl_token_piece(self._vocab, token, buffer, size, special), "reading a token")
            if n < 0:
                size = -n
                buffer = ffi.new("char[]", size)
                n = check(lib.erl_token_piece(self._vocab, token, buffer, size, special), "reading a token")
        return bytes(ffi.buffer(buffer, n))

    def _read_pieces(self) -> tuple[bytes, array[int]]:
        """Return the concatenated bytes of all tokens, and the offsets of their starts and of the end."""
        ends = np.zeros(self.n_tokens + 1, np.uint32)
        size = 16 * self.n_tokens
        buffer = ffi.new("char[]", 0)
        with self._model.use():
            while self.type != "none":
                buffer = ffi.new("char[]", size)
                ends_at = ffi.from_buffer("uint32_t[]", ends[1:])
                n = check(lib.erl_vocab_pieces(self._vocab, buffer, size, ends_at, self.n_tokens), "reading tokens")
                if n <= size:
                    break
                size = n
        return bytes(ffi.buffer(buffer, int(ends[-1]))), array("I", ends.tobytes())

    def _longest_piece(self) -> int:
        if self.type not in ("spm", "bpe"):
            return 0
        lengths = np.diff(np.frombuffer(self._ends, np.uint32).astype(np.int64))
        named = max((len(self.text(int(id)).encode()) for id in np.flatnonzero(lengths == 0)), default=0)
        return max(int(lengths.max(initial=0)), named)

    def detokenize(self, tokens: Sequence[int] | NDArray[np.integer], *, special: bool = False) -> bytes:
        """Return the text of token ids: their pieces, without the space that some tokenizers put first.

        Args:
            tokens: ids, each 0 to n_tokens - 1.
            special: include the texts of special tokens.

        Raises:
            LlamaError: an id is outside the vocabulary.
        """
        ids = self._check_ids(tokens)
        if not len(ids):
            return b""
        size = 8 * len(ids) + 64
        ids_at = ffi.from_buffer("int32_t[]", ids)
        with self._model.use():
            for _ in range(2):
                buffer = ffi.new("char[]", size)
                n = check(
                    lib.erl_detokenize(self._vocab, ids_at, len(ids), buffer, size, self._space_first, special),
                    "detokenizing",
                )
                if n >= 0:
                    return bytes(ffi.buffer(buffer, n))
                size = -n
        raise LlamaError(f"detokenizing {len(ids)} tokens failed")

    def text(self, token: int) -> str:
        """Return the token's text in the vocabulary file, e.g. "<|im_end|>" or "▁the"."""
        self._check_ids([token])
        with self._model.use():
            return text(lib.erl_vocab_text(self._vocab, token))

    def _check_ids(self, tokens: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int32]:
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= self.n_tokens):
            bad = int(ids[(ids < 0) | (ids >= self.n_tokens)][0])
            raise LlamaError(f"token id {bad} is outside the vocabulary of {self.n_tokens} tokens")
        return np.ascontiguousarray(ids, dtype=np.int32)


def _id(token: int) -> int | None:
    return int(token) if token >= 0 else None
