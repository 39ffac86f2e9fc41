"""Adapters: low-rank changes to a model's weights (LoRA), from GGUF files of their own.

`check_adapter` reads a file's header, and refuses what libllama would trust and
then assert on in the midst of a decode. A `LlamaAdapter` is one that libllama
has loaded; it holds its model, and a context holds those that it computes with,
so closing them in any order is safe. libllama keeps a list of them in the model,
which every context reads: load and close them in the thread that decodes, or
where none does.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

from erllama.llama_ffi.gguf import GGUFHeader, Tensor, check_length, read_header
from erllama.llama_ffi.handle import Handle
from erllama.llama_ffi.library import LlamaError, drain_log, ggml_type, last_error, lib
from erllama.llama_ffi.model import LlamaModel

# Types that weights are multiplied in; of others, as of integers, ggml's loops have no function to call.
_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
_EMBEDDINGS, _OUTPUT = "token_embd.weight", "output.weight"


class LlamaAdapter:
    """A LoRA adapter, loaded for one model.

    Args:
        model: an open model with weights.
        path: the GGUF file, which `check_adapter` has found good.

    Raises:
        LlamaError: libllama cannot load it; the message says why.
    """

    def __init__(self, model: LlamaModel, path: str | Path) -> None:
        if model.vocab_only:
            raise LlamaError("this model was loaded with vocab_only=True: it has no weights to adapt")
        held = model.hold()
        try:
            with model.adapters_lock:
                pointer = lib.erl_adapter_load(held.pointer, os.fsencode(path))
                reason = last_error()
                problems = drain_log()
            if not pointer:
                raise LlamaError(reason or "; ".join(problems[-2:]) or "libllama gave no reason")
        except BaseException:
            held.release()
            raise
        self._model = held
        self._handle = Handle(pointer, _freeing(held, model.adapters_lock), "adapter")
        finalizer = weakref.finalize(self, self._handle.release)
        finalizer.atexit = False  # as for contexts
        self._finalizer: Callable[[], object] = finalizer

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive  # type: ignore[attr-defined]

    def close(self) -> None:
        """Let go of it; its memory is freed once no context computes with it. Idempotent."""
        self._finalizer()

    def hold(self, model: Handle) -> Handle:
        """For contexts of `model`: a hold on the native adapter, to be released by them."""
        if self.closed:
            raise LlamaError("this adapter is closed")
        if model is not self._model:
            raise LlamaError("this adapter was loaded for another model")
        return self._handle.hold()


def _freeing(model: Handle, lock: threading.RLock) -> Callable[[object], None]:
    def free(pointer: object) -> None:
        with lock:
            lib.erl_adapter_free(model.pointer, pointer)
        model.release()

    return free


def check_adapter(path: str | Path, architecture: str, weights: Mapping[str, Tensor]) -> None:
    """Read an adapter's header, and refuse one that is none for a model, or that libllama would stumble over.

    Args:
        path: the GGUF file.
        architecture: the model's.
        weights: the model's tensors, by name.

    Raises:
        LlamaError: it is no GGUF file, no LoRA adapter, cut short, or for another model.
    """
    header = read_header(path)
    _check_kind(header, architecture)
    check_length(path, header)
    parts = {tensor.name: tensor for tensor in header.tensors if not tensor.name.endswith("_norm.weight")}
    if not parts:
        raise LlamaError("it has no tensors that adapt anything")
    for part in sorted(parts):
        name, _, kind = part.rpartition(".lora_")
        if kind not in ("a", "b") or not {f"{name}.lora_a", f"{name}.lora_b"} <= parts.keys():
            raise LlamaError(f"tensor {part!r} is not one of a pair: each weight has a .lora_a and a .lora_b")
        if name not in weights or ".lora_" in name:
            raise LlamaError(f"it adapts {name!r}, which the model does not have: it is for another model")
        if name == _EMBEDDINGS and _OUTPUT not in weights:
            raise LlamaError(f"it adapts {name!r}, which is the model's output, too: libllama cannot do that")
        _check_pair(name, parts[f"{name}.lora_a"], parts[f"{name}.lora_b"], weights[name])


def _check_kind(header: GGUFHeader, architecture: str) -> None:
    metadata = header.metadata
    kind = metadata.get("general.type")
    if kind != "adapter":
        told = f"a {kind!r}" if isinstance(kind, str) else "one that does not say what it is, as models do"
        raise LlamaError(f"the file is no adapter, but {told}; give a LoRA adapter in GGUF")
    if metadata.get("adapter.type") != "lora":
        raise LlamaError(f"an adapter of type {metadata.get('adapter.type')!r}; libllama takes 'lora' alone")
    theirs = metadata.get("general.architecture")
    if theirs != architecture:
        raise LlamaError(f"an adapter for models of architecture {theirs!r}, and this one's is {architecture!r}")
    alpha = metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise LlamaError(f"adapter.lora.alpha is {alpha!r}; it must be a finite number")
    if "adapter.alora.invocation_tokens" in metadata:
        raise LlamaError("an adapter that some tokens of a prompt activate (aLoRA): such are not supported")


def _check_pair(name: str, a: Tensor, b: Tensor, weight: Tensor) -> None:
    for tensor in (a, b):
        if tensor.ggml_type not in {ggml_type(kind) for kind in _TYPES}:
            raise LlamaError(f"tensor {tensor.name!r} is of a type that is none of {', '.join(_TYPES)}")
    n_in, n_out = weight.shape[:2]
    if name.endswith(_EMBEDDINGS):  # rows of A are picked by token
        fits = (a.shape[1], b.shape[1]) == (n_out, n_in) and a.shape[0] == b.shape[0]
    else:
        fits = (a.shape[0], b.shape[1]) == (n_in, n_out) and a.shape[1] == b.shape[0]
    if not fits or not a.shape[2:] == b.shape[2:] == weight.shape[2:] or not all(a.shape + b.shape):
        raise LlamaError(
            f"{name!r} is adapted by tensors of shapes {_shown(a)} and {_shown(b)}, which do not fit the model's "
            f"{_shown(weight)}: it is for another model"
        )


def _shown(tensor: Tensor) -> str:
    n = max((i + 1 for i, size in enumerate(tensor.shape) if size != 1), default=1)
    return "x".join(map(str, tensor.shape[: max(n, 2)]))
