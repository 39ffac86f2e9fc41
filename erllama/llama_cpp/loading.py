"""The options of `Llama(...)` as options of `load_model`.

Each option of llama-cpp-python is converted, has no effect because erllama does what it asks for anyway, or is
refused with the reason if its value differs from the default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from erllama._model.load import load_model
from erllama.cache import Cache
from erllama.checks import integer, real, reject_unknown, shown
from erllama.errors import OptionError
from erllama.llama_cpp import constants

K = TypeVar("K")
V = TypeVar("V")

# The values of erllama's options that the constants stand for.
SPLIT_MODES: Final = {
    constants.LLAMA_SPLIT_MODE_NONE: "none",
    constants.LLAMA_SPLIT_MODE_LAYER: "layer",
    constants.LLAMA_SPLIT_MODE_ROW: "row",
}
ROPE_SCALINGS: Final = {
    constants.LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED: None,
    constants.LLAMA_ROPE_SCALING_TYPE_NONE: "none",
    constants.LLAMA_ROPE_SCALING_TYPE_LINEAR: "linear",
    constants.LLAMA_ROPE_SCALING_TYPE_YARN: "yarn",
}
POOLINGS: Final = {
    constants.LLAMA_POOLING_TYPE_UNSPECIFIED: None,
    constants.LLAMA_POOLING_TYPE_NONE: "none",
    constants.LLAMA_POOLING_TYPE_MEAN: "mean",
    constants.LLAMA_POOLING_TYPE_CLS: "cls",
    constants.LLAMA_POOLING_TYPE_LAST: "last",
}
KV_TYPES: Final = {
    None: "f16",
    constants.GGML_TYPE_F32: "f32",
    constants.GGML_TYPE_F16: "f16",
    constants.GGML_TYPE_Q4_0: "q4_0",
    constants.GGML_TYPE_Q4_1: "q4_1",
    constants.GGML_TYPE_Q5_0: "q5_0",
    constants.GGML_TYPE_Q5_1: "q5_1",
    constants.GGML_TYPE_Q8_0: "q8_0",
    constants.GGML_TYPE_IQ4_NL: "iq4_nl",
    constants.GGML_TYPE_BF16: "bf16",
}


class Refusal(NamedTuple):
    """An option that erllama does not have: the values that ask for nothing, and why others are refused."""

    neutral: tuple[object, ...]
    reason: str


REFUSED: Mapping[str, Refusal] = {
    "attention_type": Refusal((-1,), "the model's file determines whether attention is causal"),
    "chat_handler": Refusal((None,), "erllama renders chats with templates; pass chat_format, or leave both out"),
    "lora_base": Refusal((None,), "an adapter applies to the loaded model; pass lora_path alone"),
    "numa": Refusal((False, 0), "start the process with numactl instead"),
    "op_offload": Refusal((None,), "libllama's default applies"),
    "spm_infill": Refusal((False,), "gaps are filled in the order prefix, suffix, middle"),
    "tokenizer": Refusal((None,), "the tokenizer of the model's file applies"),
}
# Options of older versions that llama-cpp-python accepts and ignores, and that LangChain passes.
LEGACY: Mapping[str, Refusal] = {
    "n_parts": Refusal((-1,), "the parts of a split model are found by their names"),
    "f16_kv": Refusal((True,), "pass type_k and type_v instead"),
    "low_vram": Refusal((False,), "libllama removed it"),
    "mul_mat_q": Refusal((True,), "libllama removed it"),
}


class _Layout(NamedTuple):
    n_ctx: int
    n_batch: int
    n_ubatch: int


def load_options(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `load_model` for checked options of `Llama`.

    Raises:
        OptionError: an option cannot be honoured, has the wrong type or is out of range.
    """
    for name, refusal in REFUSED.items():
        _refuse(name, values[name], refusal)
    if values["vocab_only"]:
        return {"vocab_only": True, "overrides": values["kv_overrides"]}
    if values["offload_kqv"] is not True and values["n_gpu_layers"] != 0:
        raise OptionError("offload_kqv=False with layers on a GPU: erllama keeps KV where the layers are")
    sizes = _layout(path, values)
    options: dict[str, Any] = {
        **sizes._asdict(),
        "n_threads": values["n_threads"],
        "n_threads_batch": values["n_threads_batch"],
        "n_gpu_layers": values["n_gpu_layers"],
        "split_mode": _named("split_mode", values["split_mode"], SPLIT_MODES),
        "tensor_split": values["tensor_split"],
        "mmap": values["use_mmap"],
        "mlock": values["use_mlock"],
        "overrides": values["kv_overrides"],
        "swa_full": bool(values["swa_full"]),
        "kv_type_k": _named("type_k", values["type_k"], KV_TYPES),
        "kv_type_v": _named("type_v", values["type_v"], KV_TYPES),
        "flash_attn": "auto" if values["flash_attn"] is None else values["flash_attn"],
        "check_memory": False,  # llama-cpp-python has no such check, and `Llama` no option to leave it out
        "rope_scaling": _named("rope_scaling_type", values["rope_scaling_type"], {**ROPE_SCALINGS, None: None}),
    }
    if values["main_gpu"] or options["split_mode"] == "none":
        options["main_gpu"] = values["main_gpu"]
    # The defaults stand for the model's own values.
    for name, default in _ROPE_DEFAULTS.items():
        if real(name, values[name]) != default:
            options[name] = values[name]
    return options


_ROPE_DEFAULTS: Mapping[str, float] = {
    "rope_freq_base": 0.0,
    "rope_freq_scale": 0.0,
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": 1.0,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_orig_ctx": 0,
}


def check_extra_options(extra: Mapping[str, object], known: Mapping[str, object]) -> None:
    """Refuse options that `Llama` does not have, except older ones with a value that asks for nothing."""
    reject_unknown({name: value for name, value in extra.items() if name not in LEGACY}, known, "Llama")
    for name, value in extra.items():
        _refuse(name, value, LEGACY[name])


def _refuse(name: str, value: object, refusal: Refusal) -> None:
    if not any(value is each or (type(value) is type(each) and value == each) for each in refusal.neutral):
        raise OptionError(f"{name}={shown(value)} cannot be honoured: {refusal.reason}")


def checked_path(model_path: object) -> Path:
    """Return the path of a model file that exists.

    Raises:
        OptionError: it does not.
    """
    if not isinstance(model_path, str | os.PathLike) or not os.fspath(model_path):
        raise OptionError(f"model_path={shown(model_path)}; pass the path of a GGUF file")
    path = Path(os.fspath(model_path)).expanduser()
    if not path.exists():
        raise OptionError(f"Model path does not exist: {path}")
    return path


def checked_pooling(pooling_type: object) -> str | None:
    """Return how vectors are pooled; None for the model's own way."""
    return _named("pooling_type", pooling_type, POOLINGS)


def _layout(path: Path, values: Mapping[str, Any]) -> _Layout:
    """Return the sizes of context and batches, cut to each other as llama-cpp-python does."""
    n_ctx = integer("n_ctx", values["n_ctx"], 0) or _training_context(path)
    n_batch = min(n_ctx, integer("n_batch", values["n_batch"], 1))
    return _Layout(n_ctx, n_batch, min(n_batch, integer("n_ubatch", values["n_ubatch"], 1)))


def _training_context(path: Path) -> int:
    with Cache(ram=0) as cache, load_model(path, vocab_only=True, cache=cache) as vocabulary:
        return vocabulary.info.n_ctx_train or 4096


def _named(name: str, value: object, known: Mapping[K, V]) -> V:
    if isinstance(value, bool) or value not in known:
        raise OptionError(f"{name}={shown(value)} cannot be honoured; it takes {', '.join(map(str, known))}")
    return known[value]  # type: ignore[index]
