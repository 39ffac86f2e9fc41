"""Estimates the memory of a model from the header of its file, before anything is loaded.

The server compares the estimate with its memory limit. Weights, KV and recurrent state follow libllama's formulas.
Compute buffers are an approximation: libllama plans them when it builds the graph of an architecture. Where the
header does not say how a layer keeps its context, the estimate is the larger of the possibilities. Not counted: the
process of a model, and the copies of weights that libllama keeps in another order while the file stays mapped.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from erllama.engine.backends.gguf_parts import parts
from erllama.engine.backends.llama_file import check_file
from erllama.engine.backends.llama_library import llama_ffi, translate_errors
from erllama.errors import ModelLoadError

_DEFAULT_N_CTX = 4096
_N_CTX_STEP = 256
_SPARE_SEQUENCES = 12  # of `load_model`, for models whose sequences take no memory of their own
# Bytes of a KV value, by type: those of a block of 32 values, divided by 32.
_KV_BYTES = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}
# Every n-th layer sees the whole context, and the others a sliding window, where the file has no pattern. These
# numbers are part of libllama's code of each architecture. Other architectures count as if all layers saw all.
_WINDOW_PERIODS = {
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "cohere2": 4,
    "exaone4": 4,
    "gpt-oss": 2,
    "olmo2": 4,
    "smallthinker": 4,
    "afmoe": 4,
}
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_ATTENTION = ("attn_k.", "attn_kv_", "attn_k_b.")
_RECURRENT = ("ssm_", "shortconv.", "time_mix_")
_EMBEDDERS = ("bert", "embedding")  # in names of architectures without KV


class MemoryEstimate(NamedTuple):
    """The memory that a model needs, in bytes.

    Attributes:
        n_ctx: size of its context in tokens.
        weights: of all tensors.
        kv: of the cells of the context.
        state: of recurrent layers.
        compute: of intermediate results.
    """

    n_ctx: int
    weights: int
    kv: int
    state: int
    compute: int

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return self.weights + self.kv + self.state + self.compute


def estimate_memory(path: Path, options: Mapping[str, object]) -> MemoryEstimate:
    """Return what a model needs. Reads the headers of its files only.

    Args:
        path: the GGUF file; the first part of a split model.
        options: of `load_model`, by name. Those that do not change memory are ignored.

    Raises:
        ModelLoadError: a file is missing, or is not GGUF.
    """
    check_file(path)
    with translate_errors(ModelLoadError, f"{path} cannot be read"):
        header = llama_ffi.read_header(path)
        others = [part for part in parts(path) if part != path and part.exists()]
        tensors = [*header.tensors, *(each for part in others for each in llama_ffi.read_tensor_table(part)[1])]
    metadata = {**header.metadata, **_mapping(options.get("overrides"))}
    return _Model(metadata, tensors, options).estimate()


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


class _Model:
    """The sizes of one model."""

    def __init__(
        self, metadata: Mapping[str, object], tensors: Sequence[llama_ffi.Tensor], options: Mapping[str, object]
    ) -> None:
        self._metadata, self._tensors, self._options = metadata, tensors, options
        self._architecture = str(metadata.get("general.architecture", ""))
        self._parts: dict[int, set[str]] = defaultdict(set)  # names of tensors, by layer
        for tensor in tensors:
            found = _LAYER.match(tensor.name)
            if found:
                self._parts[int(found[1])].add(found[2])
        self._is_embedder = any(word in self._architecture for word in _EMBEDDERS)
        self._n_layer = max(self._number("block_count"), len(self._parts))
        self._n_embd = self._number("embedding_length")
        self._recurrent = [layer for layer in range(self._n_layer) if self._has(layer, _RECURRENT)]
        self._window = self._number("attention.sliding_window")
        running = self._option("n_seq_max", 4)
        can_trim = not self._recurrent and not self._window
        # One more sequence moves blocks.
        self._n_sequences = running + 1 + (_SPARE_SEQUENCES if can_trim else 0)
        asked = self._option("n_ctx", 0) or min(self._number("context_length") or _DEFAULT_N_CTX, _DEFAULT_N_CTX)
        self._n_ctx = _round_up(asked)
        self._n_ubatch = min(self._option("n_ubatch", 512), self._option("n_batch", 2048), self._n_ctx)

    def estimate(self) -> MemoryEstimate:
        return MemoryEstimate(
            self._n_ctx, sum(each.n_bytes for each in self._tensors), self._kv(), self._state(), self._compute()
        )

    # --- sizes ---------------------------------------------------------------------------------

    def _kv(self) -> int:
        if self._is_embedder:
            return 0
        key_bytes, value_bytes = (
            _KV_BYTES.get(str(self._options.get(name, "f16")), 4.0) for name in ("kv_type_k", "kv_type_v")
        )
        total = 0.0
        for layer in range(self._n_layer):
            if layer in self._recurrent and not self._has(layer, _ATTENTION):
                continue
            in_window = self._sees_window(layer)
            n_kv = self._of_layer("attention.head_count_kv", layer) or self._of_layer("attention.head_count", layer)
            key, value = (self._head_width(name, layer, in_window) for name in ("key_length", "value_length"))
            total += self._cells(in_window) * n_kv * (key * key_bytes + value * value_bytes)
        return round(total)

    def _cells(self, in_window: bool) -> int:
        if not in_window or self._options.get("swa_full"):
            return self._n_ctx
        return min(self._n_ctx, _round_up(self._window * self._n_sequences + self._n_ubatch))

    def _sees_window(self, layer: int) -> bool:
        if not self._window:
            return False
        pattern = self._metadata.get(f"{self._architecture}.attention.sliding_window_pattern")
        if isinstance(pattern, np.ndarray | list):
            return layer < len(pattern) and bool(pattern[layer])
        period = pattern if isinstance(pattern, int) and pattern > 0 else _WINDOW_PERIODS.get(self._architecture, 0)
        return bool(period) and layer % period < period - 1

    def _head_width(self, name: str, layer: int, in_window: bool) -> int:
        in_windows = self._number(f"attention.{name}_swa") if in_window else 0
        n_head = self._of_layer("attention.head_count", layer) or 1
        return in_windows or self._number(f"attention.{name}") or self._n_embd // n_head

    def _state(self) -> int:
        """Return the bytes of recurrent layers: for each sequence, a convolution's inputs and the state, as f32."""
        number = self._number
        if number("wkv.head_size"):
            values = (number("token_shift_count") or 2) * self._n_embd + self._n_embd * number("wkv.head_size")
        elif number("shortconv.l_cache"):
            values = self._n_embd * (number("shortconv.l_cache") - 1)
        else:
            inner, size = number("ssm.inner_size"), number("ssm.state_size")
            channels = inner + 2 * number("ssm.group_count") * size
            values = max(number("ssm.conv_kernel") - 1, 0) * channels + inner * size
        return 4 * values * self._n_sequences * len(self._recurrent)

    def _compute(self) -> int:
        """Return about the bytes of intermediate results: those of the widest step of a slice of prefill."""
        n_vocab = max((each.shape[1] for each in self._tensors if each.name == "token_embd.weight"), default=0)
        n_vocab = 0 if self._is_embedder else n_vocab
        n_head = self._of_layer("attention.head_count", 0)
        widest = max(n_vocab, 3 * self._widest_layer())
        mask = 2 * (self._n_ctx + (self._cells(True) if self._window else 0)) if n_head else 0
        if self._options.get("flash_attn") is False:  # all scores at once, and masks of f32
            widest, mask = max(widest, n_head * self._n_ctx), 2 * mask
        step = self._n_ubatch * (4 * (widest + 4 * self._n_embd) + mask)
        return step + 4 * self._n_sequences * n_vocab

    def _widest_layer(self) -> int:
        """Return the number of values of a token in the widest step of a layer."""
        names = ("feed_forward_length", "ssm.inner_size")
        widths = [self._number(name) for name in names]
        experts = self._number("expert_used_count") * self._number("expert_feed_forward_length")
        return max(*widths, experts, self._n_embd)

    # --- the header ----------------------------------------------------------------------------

    def _has(self, layer: int, prefixes: tuple[str, ...]) -> bool:
        return any(name.startswith(prefixes) for name in self._parts[layer])

    def _number(self, name: str) -> int:
        """Return a number of the header; the largest of a list, and 0 without one."""
        value = self._metadata.get(f"{self._architecture}.{name}")
        if isinstance(value, np.ndarray):
            value = value.max().item() if value.size else 0
        return int(value) if isinstance(value, int | float) else 0

    def _of_layer(self, name: str, layer: int) -> int:
        value = self._metadata.get(f"{self._architecture}.{name}")
        if isinstance(value, np.ndarray) and layer < value.size:
            return int(value[layer])
        return self._number(name)

    def _option(self, name: str, default: int) -> int:
        value = self._options.get(name)
        return value if isinstance(value, int) and value > 0 else default


def _round_up(n: int) -> int:
    return -(-n // _N_CTX_STEP) * _N_CTX_STEP
