"""LoRA adapters: low-rank changes to a model's weights, from separate GGUF files.

`check_adapter` reads a file's header and refuses files that libllama would accept, and then fail an assertion on
during a decode. A `LlamaAdapter` is an adapter that libllama has loaded. It holds its model, and a context holds
the adapters that it uses, so they may be closed in any order. libllama keeps a list of adapters in the model, which
every context reads. So load and close adapters in the thread that decodes, or while no thread decodes.
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

# Types of weights that ggml multiplies. For others, such as integers, its loops have no function.
_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
_EMBEDDINGS, _OUTPUT = "token_embd.weight", "output.weight"


class LlamaAdapter:
    """A LoRA adapter, loaded for one model.

    Args:
        model: an open model with weights.
        path: the GGUF file, already checked by `check_adapter`.

    Raises:
        LlamaError: libllama cannot load the file; the message says why.
    """

    def __init__(self, model: LlamaModel, path: str | Path) -> None:
        if model.vocab_only:
            raise LlamaError("this model was loaded with vocab_only=True: it has no weights to adapt")
        model_handle = model.hold()
        try:
            with model.adapters_lock:
                pointer = lib.erl_adapter_load(model_handle.pointer, os.fsencode(path))
                reason = last_error()
                problems = drain_log()
            if not pointer:
                raise LlamaError(reason or "; ".join(problems[-2:]) or "libllama gave no reason")
        except BaseException:
            model_handle.release()
            raise
        self._model = model_handle
        self._handle = Handle(pointer, _make_free(model_handle, model.adapters_lock), "adapter")
        finalizer = weakref.finalize(self, self._handle.release)
        finalizer.atexit = False  # as for contexts
        self._finalizer: Callable[[], object] = finalizer

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive  # type: ignore[attr-defined]

    def close(self) -> None:
        """Release the adapter. Its memory is freed when no context uses it. Idempotent."""
        self._finalizer()

    def hold(self, model: Handle) -> Handle:
        """Add a hold on the native adapter, for a context of `model`, which must release it."""
        if self.closed:
            raise LlamaError("this adapter is closed")
        if model is not self._model:
            raise LlamaError("this adapter was loaded for another model")
        return self._handle.hold()


def _make_free(model: Handle, lock: threading.RLock) -> Callable[[object], None]:
    def free(pointer: object) -> None:
        with lock:
            lib.erl_adapter_free(model.pointer, pointer)
        model.release()

    return free


def check_adapter(path: str | Path, architecture: str, weights: Mapping[str, Tensor]) -> None:
    """Read an adapter's header, and check that libllama can use the adapter with a model.

    Args:
        path: the GGUF file.
        architecture: the model's architecture.
        weights: the model's tensors, by name.

    Raises:
        LlamaError: the file is not a GGUF file, not a LoRA adapter, truncated, or for another model.
    """
    header = read_header(path)
    _check_kind(header, architecture)
    check_length(path, header)
    parts = {tensor.name: tensor for tensor in header.tensors if not tensor.name.endswith("_norm.weight")}
    if not parts:
        raise LlamaError("the file has no tensors that adapt a weight")
    for part in sorted(parts):
        name, _, kind = part.rpartition(".lora_")
        if kind not in ("a", "b") or not {f"{name}.lora_a", f"{name}.lora_b"} <= parts.keys():
            raise LlamaError(
                f"tensor {part!r} is not one of a pair: each adapted weight needs a .lora_a and a .lora_b"
            )
        if name not in weights or ".lora_" in name:
            raise LlamaError(f"the file adapts {name!r}, which the model lacks: it is for another model")
        if name == _EMBEDDINGS and _OUTPUT not in weights:
            raise LlamaError(
                f"the file adapts {name!r}, which is also the model's output: libllama does not support that"
            )
        _check_pair(name, parts[f"{name}.lora_a"], parts[f"{name}.lora_b"], weights[name])


def _check_kind(header: GGUFHeader, architecture: str) -> None:
    metadata = header.metadata
    kind = metadata.get("general.type")
    if kind != "adapter":
        found = f"of type {kind!r}" if isinstance(kind, str) else "without general.type, as some models are"
        raise LlamaError(f"the file is not an adapter, but {found}; pass a LoRA adapter in GGUF")
    if metadata.get("adapter.type") != "lora":
        raise LlamaError(f"an adapter of type {metadata.get('adapter.type')!r}; libllama supports only 'lora'")
    theirs = metadata.get("general.architecture")
    if theirs != architecture:
        raise LlamaError(f"the adapter is for models of architecture {theirs!r}; this model's is {architecture!r}")
    alpha = metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise LlamaError(f"adapter.lora.alpha is {alpha!r}; it must be a finite number")
    if "adapter.alora.invocation_tokens" in metadata:
        raise LlamaError("the adapter is activated by tokens of a prompt (aLoRA), which is not supported")


def _check_pair(name: str, a: Tensor, b: Tensor, weight: Tensor) -> None:
    for tensor in (a, b):
        if tensor.ggml_type not in {ggml_type(kind) for kind in _TYPES}:
            raise LlamaError(f"tensor {tensor.name!r} has a type other than {', '.join(_TYPES)}")
    n_in, n_out = weight.shape[:2]
    if name.endswith(_EMBEDDINGS):  # tokens index the rows of A
        fits = (a.shape[1], b.shape[1]) == (n_out, n_in) and a.shape[0] == b.shape[0]
    else:
        fits = (a.shape[0], b.shape[1]) == (n_in, n_out) and a.shape[1] == b.shape[0]
    if not fits or not a.shape[2:] == b.shape[2:] == weight.shape[2:] or not all(a.shape + b.shape):
        raise LlamaError(
            f"{name!r} is adapted by tensors of shapes {_format_shape(a)} and {_format_shape(b)}, which do not fit "
            f"the model's {_format_shape(weight)}: it is for another model"
        )


def _format_shape(tensor: Tensor) -> str:
    n = max((i + 1 for i, size in enumerate(tensor.shape) if size != 1), default=1)
    return "x".join(map(str, tensor.shape[: max(n, 2)]))
