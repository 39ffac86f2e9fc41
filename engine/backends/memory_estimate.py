"""Estimates the memory of a model from the header of its file, before anything is loaded.

`erllama.models.fit` compares the estimate with the free memory, and the server with its limit. Weights, KV and
recurrent state follow libllama's formulas. Compute buffers are an approximation: libllama plans them when it builds
the graph of an architecture. Where the header does not say how a layer keeps its context, the estimate is the
larger of the possibilities. The memory of the process itself is not counted.
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
from erllama.engine.backends.llama_options import LlamaOptions
from erllama.engine.backends.repacked_weights import weight_sizes
from erllama.errors import ModelLoadError

_DEFAULT_N_CTX = 4096
_N_CTX_STEP = 256
_SPARE_SEQUENCES = 12  # of `load_model`, for models whose sequences take no memory of their own
_KV_BLOCK = 32  # values of a quantized type of KV that are stored together
# Bytes of a KV value, by type: those of a block of 32 values, divided by 32.
KV_BYTES = {
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
# numbers are part of libllama's code of each architecture. Other architectures count as if all layers saw all; what
# they then have more than with windows in all layers is `spare`.
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
    "cohere2moe": 4,
    "exaone-moe": 4,
    "laguna": 4,
    "llama4": 4,
    "mellum": 4,
    "phi3": 1,
    "plamo3": 8,
}
_WHOLE_FIRST = ("cohere2moe", "laguna", "smallthinker")  # of each period, the first layer sees all, not the last
# Windows in tokens that libllama's code fixes.
_FIXED_WINDOWS = {"exaone-moe": 128, "llama4": 8192}
_DEVICE_OPTIONS = ("devices", "n_gpu_layers", "split_mode", "main_gpu", "tensor_split")
_MOST_LAYERS = 4096
_LARGEST = 2**40  # of the numbers that a header states
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_ATTENTION = ("attn_k.", "attn_kv_", "attn_k_b.")
_RECURRENT = ("ssm_", "shortconv.", "time_mix_")
_EMBEDDERS = ("bert", "embedding")  # in names of architectures without KV


class MemoryEstimate(NamedTuple):
    """The memory that a model needs, in bytes.

    Attributes:
        n_ctx: size of its context in tokens.
        weights: of all tensors; of their copies where the CPU computes with copies in another order.
        kv: of the cells of the context.
        state: of recurrent layers.
        compute: of intermediate results.
        mapped: of the mapped file, beyond `weights`. It is not read after loading, and the kernel reclaims it.
        spare: of the others, what may take no free memory: mapped weights, which the kernel drops and reads again,
            and KV that the model may not have, where the header leaves this open.
    """

    n_ctx: int
    weights: int
    kv: int
    state: int
    compute: int
    mapped: int = 0
    spare: int = 0

    @property
    def total(self) -> int:
        """The memory that the model needs: all of it but `mapped`."""
        return self.weights + self.kv + self.state + self.compute

    @property
    def least(self) -> int:
        """The free memory without which the model cannot be loaded: `total` without `spare`."""
        return self.total - self.spare

    @property
    def allocated(self) -> int:
        """The memory that libllama reports after loading: all of it."""
        return self.total + self.mapped


def estimate_memory(path: Path, options: Mapping[str, object]) -> MemoryEstimate:
    """Return what a model needs. Reads the headers of its files only.

    Args:
        path: the GGUF file; the first part of a split model.
        options: of `load_model`, by name. Those that do not change memory are ignored.

    Raises:
        ModelLoadError: a file is missing, or is not GGUF.
    """
    return ModelHeader(path).estimate(options)


class ModelHeader:
    """The headers of a model's files, for several estimates.

    Args:
        path: the GGUF file; the first part of a split model.

    Attributes:
        metadata: of the file.
        files: the tensors of each file of the model that exists.

    Raises:
        ModelLoadError: a file is missing, or is not GGUF.
    """

    def __init__(self, path: Path) -> None:
        check_file(path)
        with translate_errors(ModelLoadError, f"{path} cannot be read"):
            header = llama_ffi.read_header(path, lists_of_texts=False)
            others = [part for part in parts(path) if part != path and part.exists()]
            self.files = [header.tensors, *(llama_ffi.read_tensor_table(part)[1] for part in others)]
        self.metadata: Mapping[str, object] = header.metadata

    def estimate(self, options: Mapping[str, object]) -> MemoryEstimate:
        """Return what the model needs with options of `load_model`."""
        overrides = options.get("overrides")
        metadata = {**self.metadata, **(overrides if isinstance(overrides, Mapping) else {})}
        return _Model(metadata, self.files, options).estimate()

    def is_on_devices(self, options: Mapping[str, object]) -> bool:
        """Return whether all layers are on GPUs, if there are any, with options of `load_model`."""
        return _Model(self.metadata, self.files, options).is_on_devices()

    @property
    def takes_quantized_kv(self) -> bool:
        """Whether the blocks of 32 values of a quantized KV type divide a head's keys and values."""
        return _Model(self.metadata, self.files, {}).takes_quantized_kv()

    @property
    def n_ctx_train(self) -> int:
        """The context that the model was trained with, in tokens; 0 if the file does not say."""
        value = self.metadata.get(f"{self.metadata.get('general.architecture', '')}.context_length")
        return _checked(value)


class _Model:
    """The sizes of one model."""

    def __init__(
        self,
        metadata: Mapping[str, object],
        files: Sequence[Sequence[llama_ffi.Tensor]],
        options: Mapping[str, object],
    ) -> None:
        tensors = [tensor for file in files for tensor in file]
        self._metadata, self._files, self._tensors, self._options = metadata, files, tensors, options
        self._architecture = str(metadata.get("general.architecture", ""))
        self._parts: dict[int, set[str]] = defaultdict(set)  # names of tensors, by layer
        for tensor in tensors:
            found = _LAYER.match(tensor.name)
            if found:
                self._parts[int(found[1])].add(found[2])
        self._is_embedder = any(word in self._architecture for word in _EMBEDDERS)
        # A damaged file may state any number.
        self._n_layer = max(min(self._number("block_count"), _MOST_LAYERS), len(self._parts))
        self._n_embd = self._number("embedding_length")
        self._recurrent = [layer for layer in range(self._n_layer) if self._has(layer, _RECURRENT)]
        self._window = self._window_size()
        running = self._option("n_seq_max", 4)
        can_trim = not self._recurrent and not self._window
        # One more sequence moves blocks.
        self._n_sequences = running + 1 + (_SPARE_SEQUENCES if can_trim else 0)
        asked = self._option("n_ctx", 0) or min(self._number("context_length") or _DEFAULT_N_CTX, _DEFAULT_N_CTX)
        self._n_ctx = _round_up(asked)
        self._n_ubatch = min(self._option("n_ubatch", 512), self._option("n_batch", 2048), self._n_ctx)

    def estimate(self) -> MemoryEstimate:
        weights, mapped, spare = self._weights()
        kv = self._kv()
        spare += kv - self._kv(windows_if_open=True)
        return MemoryEstimate(self._n_ctx, weights, kv, self._state(), self._compute(), mapped, spare)

    def is_on_devices(self) -> bool:
        asked = self._options.get("n_gpu_layers", -1)
        return not isinstance(asked, int) or asked < 0 or asked > self._n_layer

    def takes_quantized_kv(self) -> bool:
        widths = {
            self._head_width(name, layer, in_window)
            for layer in range(self._n_layer)
            for name in ("key_length", "value_length")
            for in_window in (False, True)
        }
        return all(width % _KV_BLOCK == 0 for width in widths)

    # --- sizes ---------------------------------------------------------------------------------

    def _weights(self) -> tuple[int, int, int]:
        """Return the bytes of weights, those of the mapped file beyond them, and those that the kernel can drop."""
        mmap = self._options.get("mmap") is not False
        can_drop = mmap and not self._options.get("mlock")
        if layer_devices(self._options):  # which compute with the weights as they are in the file
            n_bytes = sum(each.n_bytes for each in self._tensors)
            return n_bytes, 0, n_bytes if can_drop and not self.is_on_devices() else 0
        is_tied = not self._is_embedder and not any(each.name == "output.weight" for each in self._tensors)
        needed, mapped, copies = weight_sizes(self._files, mmap=mmap, is_tied=is_tied)
        return needed, mapped, needed - copies if can_drop else 0

    def _kv(self, *, windows_if_open: bool = False) -> int:
        """Return the bytes of KV.

        Args:
            windows_if_open: count layers as those with a window where nothing says which ones have it.
        """
        if self._is_embedder:
            return 0
        key_bytes, value_bytes = (
            KV_BYTES.get(str(self._options.get(name, "f16")), 4.0) for name in ("kv_type_k", "kv_type_v")
        )
        total = 0.0
        for layer in range(self._n_layer):
            if layer in self._recurrent and not self._has(layer, _ATTENTION):
                continue
            in_window = self._sees_window(layer, if_open=windows_if_open)
            n_kv = self._of_layer("attention.head_count_kv", layer) or self._of_layer("attention.head_count", layer)
            key, value = (self._head_width(name, layer, in_window) for name in ("key_length", "value_length"))
            if self._has_latent_kv:  # libllama computes values from the keys
                value = 0
            total += self._cells(in_window) * n_kv * (key * key_bytes + value * value_bytes)
        return round(total)

    def _cells(self, in_window: bool) -> int:
        if not in_window or self._options.get("swa_full"):
            return self._n_ctx
        return min(self._n_ctx, _round_up(self._window * self._n_sequences + self._n_ubatch))

    @property
    def _has_latent_kv(self) -> bool:
        return bool(self._number("attention.key_length_mla") and self._number("attention.value_length_mla"))

    def _window_size(self) -> int:
        """Return the tokens of the sliding window; 0 without one."""
        fixed = _FIXED_WINDOWS.get(self._architecture, 0)
        stated = self._metadata.get(f"{self._architecture}.attention.sliding_window")
        # A stated 0 means no window to llama4 alone.
        return fixed if fixed and (stated != 0 or self._architecture != "llama4") else _checked(stated)

    def _sees_window(self, layer: int, *, if_open: bool) -> bool:
        if not self._window:
            return False
        pattern = self._metadata.get(f"{self._architecture}.attention.sliding_window_pattern")
        if isinstance(pattern, np.ndarray | list):
            return layer < len(pattern) and bool(pattern[layer])
        period = pattern if isinstance(pattern, int) and pattern > 0 else _WINDOW_PERIODS.get(self._architecture, 0)
        if not period:
            return if_open
        at = layer % period
        return at > 0 if self._architecture in _WHOLE_FIRST else at < period - 1

    def _head_width(self, name: str, layer: int, in_window: bool) -> int:
        in_windows = self._number(f"attention.{name}_swa") if in_window else 0
        n_head = self._of_layer("attention.head_count", layer) or 1
        return in_windows or self._number(f"attention.{name}") or self._n_embd // n_head

    def _state(self) -> int:
        """Return the bytes of recurrent layers: for each sequence, a convolution's inputs and the state, as f32."""
        return self._layer_state() * self._n_sequences * len(self._recurrent)

    def _layer_state(self) -> int:
        """Return the bytes of one recurrent layer for one sequence."""
        number = self._number
        if number("wkv.head_size"):
            values = (number("token_shift_count") or 2) * self._n_embd + self._n_embd * number("wkv.head_size")
        elif number("shortconv.l_cache"):
            values = self._n_embd * (number("shortconv.l_cache") - 1)
        else:
            inner, size = number("ssm.inner_size"), number("ssm.state_size")
            channels = inner + 2 * number("ssm.group_count") * size
            values = max(number("ssm.conv_kernel") - 1, 0) * channels + inner * size
        return 4 * values

    def _compute(self) -> int:
        """Return about the bytes of intermediate results.

        libllama plans memory for a slice of prefill and reuses it from step to step, so that the largest of the
        steps counts: the logits, a layer's feed-forward part, its attention without flash attention, or its
        recurrent part. The numbers of values of a token were fitted to what libllama reports.
        """
        n_tokens, n_embd, n_ff = self._n_ubatch, self._n_embd, self._widest_layer()
        n_vocab = max((each.shape[1] for each in self._tensors if each.name == "token_embd.weight"), default=0)
        n_head = self._of_layer("attention.head_count", 0)
        # An encoder's tokens see each other, and all others the cells.
        cells = n_tokens if self._is_embedder else self._n_ctx
        if self._window:
            cells += self._cells(True)
        flash = self._options.get("flash_attn") is not False
        mask = n_tokens * cells * (2 if flash else 4) if n_head else 0
        logits = 0 if self._is_embedder else 4 * n_tokens * (n_vocab + 2 * n_embd)
        feed_forward = mask + 4 * n_tokens * ((1 if self._is_embedder else 3) * n_ff + 4 * n_embd)
        attention = recurrent = 0
        if not flash:
            scores = n_tokens if self._is_embedder else self._n_ctx
            attention = mask + 4 * n_head * scores * (n_tokens + 16) + 4 * n_tokens * 6 * n_embd
        if self._number("ssm.inner_size"):
            recurrent = 4 * n_tokens * (6 * self._number("ssm.inner_size") + n_embd * 3 // 2)
            recurrent += self._layer_state() * self._n_sequences * 3 // 2
        return max(logits, feed_forward, attention, recurrent) + 4 * self._n_sequences * n_vocab

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
        return _checked(value)

    def _of_layer(self, name: str, layer: int) -> int:
        value = self._metadata.get(f"{self._architecture}.{name}")
        if isinstance(value, np.ndarray) and layer < value.size:
            return _checked(value[layer].item())
        return self._number(name)

    def _option(self, name: str, default: int) -> int:
        value = self._options.get(name)
        return value if isinstance(value, int) and value > 0 else default


def layer_devices(options: Mapping[str, object]) -> list[llama_ffi.Device]:
    """Return the devices of this machine, beside the CPU, that hold layers of a model.

    Args:
        options: of `load_model`, by name. [] with `rpc_servers`, whose devices take an unknown part.

    Raises:
        OptionError: the options for devices do not fit the devices.
    """
    if options.get("rpc_servers"):
        return []
    chosen = {name: options[name] for name in _DEVICE_OPTIONS if options.get(name) is not None}
    return LlamaOptions(**chosen).computing_devices()  # type: ignore[arg-type]


def _checked(value: object) -> int:
    """Return a number of a header as an integer; 0 if it is none, or absurd."""
    return int(value) if isinstance(value, int | float) and 0 < value < _LARGEST else 0


def _round_up(n: int) -> int:
    return -(-n // _N_CTX_STEP) * _N_CTX_STEP
