"""A custom backend: a transformer of the llama architecture in numpy, for the same GGUF files.

This is the example of docs/backends.md. All sequences take their cells from one
pool and can share them. A batch can mix rows of several sequences. The bits of a
row do not depend on the other rows of its batch.

python examples/numpy_backend.py
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import tempfile
from collections.abc import Mapping, Sequence
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from numpy.typing import NDArray

import erllama
from erllama.engine import Batch, Limits
from erllama.errors import BackendError, CellsExhausted, ModelLoadError, StateError
from erllama.testing.models import TINY, write_llama

Floats = NDArray[np.float32]
_HEADER = struct.Struct("<II")  # a payload starts with its positions: start, end
# A character as llama.cpp splits text: the first byte alone determines the number of bytes.
_CHARACTER = re.compile(rb"[\xc0-\xdf].{0,1}|[\xe0-\xef].{0,2}|[\xf0-\xff].{0,3}|.", re.DOTALL)
_LAYER = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")


class Pieces:
    """A SentencePiece vocabulary: pieces of text with scores, and a token for each byte without a piece.

    Immutable, so every thread can use it.
    """

    def __init__(self, reader: GGUFReader) -> None:
        found = _metadata(reader, "tokenizer.ggml.")
        if found.get("model") != "llama":
            raise ModelLoadError(f"the tokenizer model is {found.get('model')!r}; this backend supports 'llama'")
        self._texts: list[str] = found["tokens"]
        self._types: list[int] = found["token_type"]
        written = [text.encode() for text in self._texts]
        self._scores = dict(zip(written, found["scores"], strict=True))
        self._ids = {text: token for token, text in enumerate(written)}
        self._bytes = [self._ids[b"<0x%02X>" % byte] for byte in range(256)]
        self._space_first: bool = found.get("add_space_prefix", True)
        self._first = [found["bos_token_id"]] if found.get("add_bos_token", True) else []
        self._last = [found["eos_token_id"]] if found.get("add_eos_token", False) else []
        self._special = {
            False: self._pattern(TokenType.USER_DEFINED),
            True: self._pattern(TokenType.USER_DEFINED, TokenType.CONTROL, TokenType.UNKNOWN),
        }
        self.n_tokens = len(self._texts)
        self.is_eog: NDArray[np.bool_] = np.zeros(self.n_tokens, bool)
        self.is_eog[[found[name] for name in ("eos_token_id", "eot_token_id") if name in found]] = True

    def _pattern(self, *kinds: TokenType) -> re.Pattern[bytes]:
        named = [text.encode() for text, kind in zip(self._texts, self._types, strict=True) if kind in kinds]
        longest_first = map(re.escape, sorted(named, key=len, reverse=True))
        return re.compile(b"(" + (b"|".join(longest_first) or b"(?!)") + b")")

    def tokenize(
        self, source: str | bytes, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        raw = source.encode("utf-8", "surrogatepass") if isinstance(source, str) else source
        ids = list(self._first) if add_special else []
        # Splitting by a group returns text and special tokens alternately.
        for at, part in enumerate(self._special[parse_special].split(raw)):
            if at % 2:
                ids.append(self._ids[part])
            elif part:
                ids += self._spell((b" " if self._space_first else b"") + part)
        return np.array(ids + (self._last if add_special else []), np.int32)

    def _spell(self, text: bytes) -> list[int]:
        """Join neighbouring parts into pieces: the best score first, and of equal scores the leftmost."""
        parts: list[bytes] = _CHARACTER.findall(text.replace(b" ", "▁".encode()))
        while joined := [
            (self._scores[pair], -at) for at, pair in enumerate(map(add, parts, parts[1:])) if pair in self._scores
        ]:
            at = -max(joined)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids: list[int] = []
        for part in parts:
            known = self._ids.get(part)
            ids += [self._bytes[b] for b in part] if known is None else [known]
        return ids

    def piece(self, token: int) -> bytes:
        text, kind = self._texts[token], self._types[token]
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN):
            return b""
        return bytes([int(text[1:-1], 16)]) if kind == TokenType.BYTE else text.replace("▁", " ").encode()

    def detokenize(self, tokens: Sequence[int] | NDArray[np.integer], *, special: bool = False) -> bytes:
        written = [self.piece(t) or (self._texts[t].encode() if special else b"") for t in map(int, tokens)]
        return b"".join(written).removeprefix(b" " if self._space_first else b"")


class NumpyBackend:
    """A backend that computes with numpy in float32.

    Args:
        path: a GGUF file of the llama architecture. Quantized tensors are unpacked.
        n_ctx: number of cells, shared by all sequences.
        n_batch: maximum number of tokens of one decode.
        n_ubatch: length of a prefill slice.
        n_sequences: maximum number of sequences.

    Raises:
        ModelLoadError: the file is not such a model, or needs a feature that this backend lacks.
    """

    def __init__(
        self, path: str | Path, *, n_ctx: int = 1024, n_batch: int = 512, n_ubatch: int = 128, n_sequences: int = 8
    ) -> None:
        reader, tensors, digest = _read(Path(path))
        shape = _metadata(reader, "llama.")
        try:
            self.vocabulary = Pieces(reader)
            self._heads_kv = int(shape.get("attention.head_count_kv", shape["attention.head_count"]))
            self._epsilon = np.float32(shape["attention.layer_norm_rms_epsilon"])
            self._embeddings = tensors.pop("token_embd")
            self._output_norm, self._output = tensors.pop("output_norm"), tensors.pop("output", self._embeddings)
            self._layers = [
                {name: tensors.pop(f"blk.{layer}.{name}") for name in _LAYER}
                for layer in range(shape["block_count"])
            ]
            self._dim = len(self._layers[0]["attn_q"]) // int(shape["attention.head_count"])
        except KeyError as error:
            raise ModelLoadError(f"{path} has no {error}") from None
        turned = shape.get("rope.dimension_count", self._dim)
        if tensors or turned != self._dim or any(name.startswith("rope.scaling") for name in shape):
            raise ModelLoadError(f"{path} needs features that this backend lacks: {sorted(tensors) or 'its RoPE'}")

        self.limits = Limits(n_ctx, n_batch, n_ubatch, len(self._output), can_trim=True, n_sequences=n_sequences)
        # Everything that changes the content or the layout of a payload. The last entry is a version number.
        self.namespace: Mapping[str, str | int] = {"backend": "numpy", "model": digest, "layout": 1}
        # Everything that changes the bits: the BLAS, the processor and the threads. Batch sizes do not, here.
        threads = sorted(item for item in os.environ.items() if item[0].endswith("_NUM_THREADS"))
        recipe = [np.__version__, np.show_config(mode="dicts"), os.cpu_count(), threads]
        self.recipe = hashlib.sha256(json.dumps(recipe).encode()).digest()[:16]

        # RoPE rotates each pair of adjacent dimensions by an angle that grows with the position. Other formats
        # pair dimension i with i + dim / 2; the converter to GGUF reorders Q and K so that pairs are adjacent.
        frequencies = float(shape.get("rope.freq_base", 10000.0)) ** (-np.arange(0, self._dim, 2) / self._dim)
        angles = np.outer(np.arange(n_ctx), frequencies)
        self._cos, self._sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

        self._keys = np.zeros((len(self._layers), n_ctx, self._heads_kv, self._dim), np.float32)
        self._values = np.zeros_like(self._keys)
        self._table = np.zeros((n_sequences, n_ctx), np.int32)  # the cell of each position of a sequence
        self._n_cached = np.zeros(n_sequences, np.int32)  # positions of each sequence
        self._n_uses = np.zeros(n_ctx, np.int32)  # sequences that use each cell
        self._aborted = self._closed = False

    # --- computing -------------------------------------------------------------------------

    def decode(self, batch: Batch) -> Floats:
        self._check(batch)
        cells = self._free(len(batch.tokens), CellsExhausted)
        self._table[batch.sequences, batch.positions] = cells
        logits = self._forward(batch, cells)
        # The sequences get the rows only here, so an aborted decode changes no sequence.
        self._n_uses[cells] = 1
        np.add.at(self._n_cached, batch.sequences, 1)
        return logits

    def _check(self, batch: Batch) -> None:
        tokens, positions, sequences, _ = batch
        if self._closed:
            raise BackendError("the backend is closed")
        if not 1 <= len(tokens) <= self.limits.n_batch:
            raise BackendError(f"a batch of {len(tokens)} tokens; it must hold 1 to n_batch={self.limits.n_batch}")
        if tokens.min() < 0 or tokens.max() >= self.limits.n_vocab:
            raise BackendError(f"a token outside 0 to {self.limits.n_vocab - 1}")
        if sequences.min() < 0 or sequences.max() >= self.limits.n_sequences:
            raise BackendError(f"a sequence outside 0 to {self.limits.n_sequences - 1}")
        for sequence in np.unique(sequences):
            found, n_cached = positions[sequences == sequence], self._n_cached[sequence]
            if not np.array_equal(found, n_cached + np.arange(len(found))):
                raise BackendError(f"positions {found} of sequence {sequence}, which has {n_cached}")

    def _forward(self, batch: Batch, cells: NDArray[np.integer]) -> Floats:
        rows = self._embeddings[batch.tokens]
        for layer, weights in enumerate(self._layers):
            if self._aborted:
                raise BackendError("the decode was aborted")
            rows = rows + self._attention(layer, self._rms_norm(rows, weights["attn_norm"]), batch, cells)
            normed = self._rms_norm(rows, weights["ffn_norm"])
            gate, up = _product(weights["ffn_gate"], normed), _product(weights["ffn_up"], normed)
            with np.errstate(over="ignore"):  # exp of a large number is infinite; the quotient is then 0
                rows = rows + _product(weights["ffn_down"], gate / (1 + np.exp(-gate)) * up)
        return _product(self._output, self._rms_norm(rows[batch.output != 0], self._output_norm))

    def _attention(self, layer: int, rows: Floats, batch: Batch, cells: NDArray[np.integer]) -> Floats:
        """Store the rows' keys and values in their cells, and return the output of the attention."""
        weights, n = self._layers[layer], len(rows)
        queries = self._apply_rope(_product(weights["attn_q"], rows), batch.positions)
        # Query heads in groups, each of which reads one head of keys and values.
        queries = queries.reshape(n, self._heads_kv, -1, self._dim) / np.float32(np.sqrt(self._dim))
        keys = self._apply_rope(_product(weights["attn_k"], rows), batch.positions)
        self._keys[layer, cells] = keys
        self._values[layer, cells] = _product(weights["attn_v"], rows).reshape(keys.shape)
        mixed = np.empty_like(queries)
        # Row by row: each row sees its own position and all earlier ones.
        for row, (sequence, position) in enumerate(zip(batch.sequences, batch.positions, strict=True)):
            seen = self._table[sequence, : position + 1]
            scores = queries[row] @ self._keys[layer, seen].transpose(1, 2, 0)  # (heads_kv, group, seen)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            shares /= shares.sum(-1, keepdims=True)
            mixed[row] = shares @ self._values[layer, seen].transpose(1, 0, 2)
        return _product(weights["attn_output"], mixed.reshape(n, -1))

    def _apply_rope(self, rows: Floats, positions: NDArray[np.int32]) -> Floats:
        """Apply RoPE; shape (n, heads, dim)."""
        pairs = rows.reshape(len(rows), -1, self._dim // 2, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        cos, sin = self._cos[positions, None], self._sin[positions, None]
        return np.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(len(rows), -1, self._dim)

    def _rms_norm(self, rows: Floats, weight: Floats) -> Floats:
        """Apply the RMS norm."""
        normed: Floats = rows / np.sqrt(np.mean(rows * rows, -1, keepdims=True) + self._epsilon)
        return normed * weight

    # --- memory ----------------------------------------------------------------------------

    def _free(self, n: int, refusal: type[BackendError]) -> NDArray[np.integer]:
        """Return the first `n` free cells."""
        free = np.flatnonzero(self._n_uses == 0)
        if len(free) < n:
            raise refusal(f"{len(free)} free cells of {self.limits.n_ctx} for {n} tokens")
        return free[:n]

    def _hold(self, sequence: int, cells: NDArray[np.integer]) -> None:
        """Append cells to a sequence."""
        start = self._n_cached[sequence]
        self._table[sequence, start : start + len(cells)] = cells
        self._n_uses[cells] += 1
        self._n_cached[sequence] += len(cells)

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        if not 0 <= start < end <= self._n_cached[sequence]:
            raise BackendError(f"positions {start} to {end} of a sequence that holds {self._n_cached[sequence]}")
        cells = self._table[sequence, start:end]
        parts = (_HEADER.pack(start, end), self._keys[:, cells].tobytes(), self._values[:, cells].tobytes())
        return np.frombuffer(bytearray().join(parts), np.uint8)

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        size = 4 * len(self._layers) * (end - start) * self._heads_kv * self._dim
        if payload.nbytes != _HEADER.size + 2 * size or _HEADER.unpack_from(payload) != (start, end):
            raise StateError(f"{payload.nbytes} bytes that are not the state of positions {start} to {end}")
        if self._n_cached[sequence] != start:
            raise StateError(f"positions from {start} on, for a sequence that holds {self._n_cached[sequence]}")
        cells = self._free(end - start, StateError)
        found = np.frombuffer(payload, np.float32, offset=_HEADER.size)
        self._keys[:, cells], self._values[:, cells] = found.reshape(2, -1, end - start, self._heads_kv, self._dim)
        self._hold(sequence, cells)

    def share(self, source: int, target: int, end: int) -> None:
        if self._n_cached[target] or not 0 <= end <= self._n_cached[source]:
            raise BackendError(
                f"{end} positions of {self._n_cached[source]}, for a sequence with {self._n_cached[target]}"
            )
        self._hold(target, self._table[source, :end])

    def cut(self, sequence: int, end: int) -> None:
        self._n_uses[self._table[sequence, end : self._n_cached[sequence]]] -= 1
        self._n_cached[sequence] = min(end, self._n_cached[sequence])

    def drop(self, sequence: int) -> None:
        self.cut(sequence, 0)

    def clear(self) -> None:
        self._n_uses[:] = self._n_cached[:] = 0

    def abort(self, on: bool) -> None:
        self._aborted = on

    def close(self) -> None:
        self._closed = True
        self._layers.clear()
        self._keys = self._values = self._embeddings = self._output = np.zeros((0, 0, 0, 0), np.float32)


def _product(weights: Floats, rows: Floats) -> Floats:
    """Multiply (n_out, n_in) with each row of (n, n_in); returns (n, n_out).

    Each row is one product of a matrix and a vector, instead of one product of two
    matrices. A BLAS chooses the order of its sums by the shapes, and these shapes do
    not depend on the number of rows. So a row has the same bits in every batch.
    """
    products: Floats = weights @ rows[:, :, None]
    return products[:, :, 0]


def _read(path: Path) -> tuple[GGUFReader, dict[str, Floats], str]:
    """Return a GGUF file of the llama architecture, its tensors by name without ".weight", and its digest."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        reader = GGUFReader(path)
        tensors = {
            tensor.name.removesuffix(".weight"): np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
            for tensor in reader.tensors
        }
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise ModelLoadError(f"{path} cannot be read as GGUF: {error}") from error
    architecture = _metadata(reader, "general.").get("architecture")
    if architecture != "llama":
        raise ModelLoadError(f"{path} has the architecture {architecture!r}; this backend supports 'llama'")
    return reader, tensors, digest


def _metadata(reader: GGUFReader, prefix: str) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(prefix)
    }


def main() -> None:
    prompt = "Once upon a time there was a backend"
    with tempfile.TemporaryDirectory() as place, erllama.Cache() as cache:
        path = write_llama(Path(place) / "tiny.gguf", TINY)
        with erllama.load_backend(NumpyBackend(path), cache=cache) as model:
            cold = model.complete(prompt, max_tokens=16, temperature=0)
            warm = model.complete(prompt, max_tokens=16, temperature=0)
        # libllama, also in float32.
        with erllama.load_model(path, cache=cache, kv_type_k="f32", kv_type_v="f32", flash_attn=False) as model:
            theirs = model.complete(prompt, max_tokens=16, temperature=0)
    print(f"numpy, cold:          {cold.text!r}")
    print(f"numpy, {warm.cache.kind} hit:     {warm.text!r}")
    print(f"libllama:             {theirs.text!r}")
    print("the same reply" if cold.tokens == warm.tokens == theirs.tokens else "the replies differ")


if __name__ == "__main__":
    main()
