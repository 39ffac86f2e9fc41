"""What a model's file must be for libllama to load it and compute with it: types of tensors, and hyperparameters.

libllama checks shapes. It trusts the rest, and a wrong type or a zero that it
divides by ends the process, not the load. The tables here state what is
refused, and why. They refuse what no model has; a type that a whole family of
tensors may have is not listed. A hyperparameter that only some architectures
use is checked only for those: libllama, when it saves a model, writes all that
it knows, with 0 for those that the model does not use. What only the graph of a model shows is checked
when a context is made, by `graph_check.cpp`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

import numpy as np

from erllama.llama_ffi.gguf import Tensor
from erllama.llama_ffi.library import LlamaError, ggml_type


class TypeRule(NamedTuple):
    """Tensors whose name matches `name` must be `only` or must not be `never`, for `reason`."""

    name: re.Pattern[str]
    only: tuple[str, ...]
    never: tuple[str, ...]
    reason: str


class Range(NamedTuple):
    """The least and the greatest value of a hyperparameter, and why; with `or_zero`, 0 stands for none."""

    low: float
    high: float
    reason: str
    or_zero: bool = False

    def has(self, number: float) -> bool:
        return self.low <= number <= self.high or (self.or_zero and number == 0)

    def __str__(self) -> str:
        return f"{'0 or ' if self.or_zero else ''}{_shown(self.low)} to {_shown(self.high)}: {self.reason}"


# In this order: the first rule that matches a name is the one that counts.
_TYPES = (
    TypeRule(
        re.compile(r"(^|\.)(ffn_gate_tid2eid|d2t|masked_embd_ordering|masked_embd_centroids)(\.weight)?$"),
        (),
        (),
        "tables of ids, of integers",
    ),
    TypeRule(
        re.compile(r"(norm|norm\d|norm_\d|norm_exps|_ln|\.enorm|\.hnorm)(\.weight|\.bias)?$"),
        ("f32",),
        (),
        "ggml multiplies f32 activations by norms that are f32",
    ),
    TypeRule(re.compile(r"\.bias$"), ("f32",), (), "ggml adds biases that are f32 to f32 activations"),
    TypeRule(
        re.compile(r"\.(scale|input_scale)$"),
        ("f32",),
        (),
        "ggml multiplies f32 activations by scales that are f32",
    ),
    TypeRule(
        re.compile(r"(^|\.)(rope_freqs|rope_factors_long|rope_factors_short|attn_sinks)(\.weight)?$"),
        ("f32",),
        (),
        "ggml reads RoPE factors and attention sinks as f32",
    ),
    TypeRule(
        re.compile(r"\.(ssm_conv1d(_[qkv])?|shortconv\.conv|ssm_a|ssm_d)(\.weight)?$"),
        ("f32",),
        (),
        "ggml computes convolutions and scans of states in f32",
    ),
    TypeRule(
        re.compile(""),
        (),
        ("i8", "i16", "i32", "i64", "f64", "q8_1", "q8_K"),
        "ggml multiplies no weights of this type",
    ),
)

_DIVIDES = "libllama divides by it"
_ALLOCATES = "libllama allocates or loops by it"
_NORMALIZES = "norms divide by a root of it and of a variance"

# Of all architectures. By the name without the architecture. For a value of each layer, each is checked.
_RANGES: Mapping[str, Range] = {
    "block_count": Range(1, 512, _ALLOCATES),
    "context_length": Range(1, 2**31 - 1, _ALLOCATES),
    "embedding_length": Range(1, 2**24, _ALLOCATES),
    "attention.key_length": Range(1, 2**16, _ALLOCATES),
    "attention.value_length": Range(1, 2**16, _ALLOCATES),
    "attention.key_length_swa": Range(1, 2**16, _ALLOCATES),
    "attention.value_length_swa": Range(1, 2**16, _ALLOCATES),
    "rope.dimension_count": Range(0, 2**16, _ALLOCATES),  # `graph_check.cpp` refuses to rotate 0 of them
    "rope.freq_base": Range(1e-9, 1e30, _DIVIDES),
    "rope.freq_base_swa": Range(1e-9, 1e30, _DIVIDES),
    "rope.scaling.factor": Range(1e-9, 1e9, _DIVIDES, or_zero=True),
    "attention.layer_norm_rms_epsilon": Range(0.0, 1.0, _NORMALIZES),
    "attention.layer_norm_epsilon": Range(0.0, 1.0, _NORMALIZES),
    "attention.group_norm_epsilon": Range(0.0, 1.0, _NORMALIZES),
    "full_attention_interval": Range(1, 2**16, _DIVIDES),
    "interleave_moe_layer_step": Range(0, 2**16, _ALLOCATES),  # libllama itself refuses 0 where it divides by it
    "expert_count": Range(0, 1024, _ALLOCATES),
    "expert_used_count": Range(0, 1024, _ALLOCATES),
    "ssm.time_step_rank": Range(0, 2**24, _ALLOCATES),
    "ssm.conv_kernel": Range(0, 2**16, _ALLOCATES),
    "ssm.state_size": Range(0, 2**24, _ALLOCATES),
    "ssm.inner_size": Range(0, 2**24, _ALLOCATES),
}
# Of these architectures. Files of others may state any value of these.
_RANGES_OF: tuple[tuple[tuple[str, ...], Mapping[str, Range]], ...] = (
    (("wavtokenizer-dec",), {"attention.group_norm_groups": Range(1, 2**16, _DIVIDES)}),
    (("grovemoe",), {"experts_per_group": Range(1, 2**16, _DIVIDES)}),
    (("rwkv6", "rwkv7", "rwkv6qwen2", "arwkv7"), {"wkv.head_size": Range(1, 2**16, _DIVIDES)}),
    (("kimi-linear", "kimi-k3", "bailingmoe3"), {"kda.head_dim": Range(1, 2**16, _ALLOCATES)}),
    (("deepseek4",), {"attention.output_group_count": Range(1, 2**16, _DIVIDES)}),
    (("lfm2", "lfm2moe"), {"shortconv.l_cache": Range(1, 2**16, _ALLOCATES)}),
)
# Of these architectures, where a layer has one of the tensors `_STATE_SPACE`. Models without may state 0.
_GROUPED = (
    "mamba2", "granitehybrid", "nemotron_h", "nemotron_h_moe", "falcon-h1", "qwen3next", "qwen35", "qwen35moe",
)  # fmt: skip
_STATE_SPACE = (".ssm_in.weight", ".ssm_out.weight")
_RANGES_OF_STATE_SPACE: tuple[tuple[tuple[str, ...], Mapping[str, Range]], ...] = (
    (_GROUPED, {"ssm.group_count": Range(1, 2**16, _DIVIDES)}),
    ((*_GROUPED, "plamo2"), {"ssm.time_step_rank": Range(1, 2**24, _DIVIDES)}),
)
_HEADS = Range(1, 2**16, _DIVIDES)
_NO_HEADS = Range(0, 2**16, _DIVIDES)  # layers without attention

# Those that a file of an architecture must have, in range.
_REQUIRED: Mapping[str, Mapping[str, Range]] = {
    "afmoe": {"attention.sliding_window": Range(1, 2**31 - 1, "its graph reads the cells of a window")},
}
# Where a file of these does not state how wide an expert is, libllama divides by the number of experts in use.
_WIDTH_BY_EXPERTS = (
    "glm4moe", "grovemoe", "llada-moe", "mellum", "nemotron_h_moe", "qwen2moe", "qwen35moe", "qwen3moe",
    "qwen3next", "qwen3vlmoe", "rnd1",
)  # fmt: skip


class Needed(NamedTuple):
    """A layer of `architectures`, all where empty, that has a tensor `where` needs one of `any_of` too."""

    architectures: tuple[str, ...]
    where: str
    any_of: tuple[str, ...]


# libllama loads these as optional, and its graph uses them all the same.
_NEEDED = (
    Needed((), "ffn_up.weight", ("ffn_down.weight",)),
    Needed((), "ffn_down.weight", ("ffn_up.weight",)),
    Needed((), "ffn_up_shexp.weight", ("ffn_down_shexp.weight",)),
    Needed((), "ffn_down_shexp.weight", ("ffn_up_shexp.weight",)),
    Needed((), "ffn_gate_inp.weight", ("ffn_down_exps.weight",)),
    Needed((), "ffn_down_exps.weight", ("ffn_up_exps.weight", "ffn_gate_up_exps.weight")),
    Needed(
        ("falcon-h1", "granitehybrid", "nemotron_h", "nemotron_h_moe"), "ssm_conv1d.weight", ("ssm_conv1d.bias",)
    ),
    *(
        Needed(("phi3", "pockettts"), "attn_output.weight", ("attn_qkv.weight", f"attn_{part}.weight"))
        for part in "qkv"
    ),
    Needed(("qwen35", "qwen35moe"), "ssm_out.weight", ("attn_qkv.weight",)),
    Needed(("qwen35", "qwen35moe"), "ssm_out.weight", ("attn_gate.weight",)),
    Needed(("qwen3next",), "ssm_out.weight", ("ssm_in.weight", "attn_qkv.weight")),
    Needed(("qwen3next",), "ssm_out.weight", ("ssm_in.weight", "attn_gate.weight")),
    Needed(("step35", "hy_v3", "mimo2"), "attn_output.weight", ("ffn_down.weight", "ffn_down_exps.weight")),
)


def check_hyperparameters(metadata: Mapping[str, object]) -> None:
    """Refuse hyperparameters that libllama would divide by, allocate by or loop over.

    Raises:
        LlamaError: one is out of its range; the message names it, the value and the range.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise LlamaError("the metadata names no architecture")
    states = (f"{architecture}.ssm.", f"{architecture}.wkv.")
    recurrent = any(key.startswith(states) and _not_zero(value) for key, value in metadata.items())
    heads = _NO_HEADS if recurrent else _HEADS
    ranges = {
        "attention.head_count": heads,
        "attention.head_count_kv": heads,
        **_RANGES,
        **_of_architecture(_RANGES_OF, architecture),
    }
    for name, limits in ranges.items():
        key = f"{architecture}.{name}"
        value = metadata.get(key)
        per_layer = isinstance(value, np.ndarray)
        without = per_layer and name.startswith("attention.head_count")  # layers without attention
        if without or (recurrent and name.startswith("attention.") and name.endswith(("_length", "_length_swa"))):
            limits = limits._replace(low=0)
        _check_range(key, value, limits)
    for name, limits in _REQUIRED.get(architecture, {}).items():
        value = metadata.get(f"{architecture}.{name}")
        if not isinstance(value, int) or not limits.has(value):
            raise LlamaError(f"{architecture}.{name} is {value}; it must be {limits}")
    used, width = f"{architecture}.expert_used_count", f"{architecture}.expert_feed_forward_length"
    stated = any(_not_zero(metadata.get(key)) for key in (used, width))
    if architecture in _WIDTH_BY_EXPERTS and not stated:
        raise LlamaError(f"the metadata has neither {used} nor {width}: libllama divides by the former")


def check_tensors(metadata: Mapping[str, object], tensors: Iterable[Tensor]) -> None:
    """Refuse tensors of types that ggml cannot compute with in their role, and layers that lack one that is used.

    Hyperparameters that libllama divides by for layers with some tensors are checked here too.

    Raises:
        LlamaError: the message names the tensor or the hyperparameter, and what it must be.
    """
    names: set[str] = set()
    for tensor in tensors:
        names.add(tensor.name)
        kind = _type_name(tensor.ggml_type)
        rule = next(rule for rule in _TYPES if rule.name.search(tensor.name))
        if (rule.only and kind not in rule.only) or kind in rule.never:
            must = f"must be {' or '.join(rule.only)}" if rule.only else "must be of another type"
            raise LlamaError(
                f"tensor {tensor.name!r} is of type {kind}; it {must}: {rule.reason}. Convert the model anew"
            )
    architecture = metadata.get("general.architecture")
    if any(name.endswith(_STATE_SPACE) for name in names):
        for name, limits in _of_architecture(_RANGES_OF_STATE_SPACE, architecture).items():
            _check_range(f"{architecture}.{name}", metadata.get(f"{architecture}.{name}"), limits)
    for name in sorted(names):
        for needed in _NEEDED:
            if (not needed.architectures or architecture in needed.architectures) and name.endswith(
                f".{needed.where}"
            ):
                layer = name.removesuffix(needed.where)
                if not any(f"{layer}{other}" in names for other in needed.any_of):
                    wanted = " or ".join(repr(f"{layer}{other}") for other in needed.any_of)
                    raise LlamaError(
                        f"tensor {wanted} is missing; a model of architecture {architecture!r} needs it"
                    )


def _of_architecture(
    table: tuple[tuple[tuple[str, ...], Mapping[str, Range]], ...], architecture: object
) -> dict[str, Range]:
    return {name: limits for which, ranges in table if architecture in which for name, limits in ranges.items()}


def _not_zero(value: object) -> bool:
    return bool(value.any()) if isinstance(value, np.ndarray) else isinstance(value, int | float) and value != 0


def _check_range(key: str, value: object, limits: Range) -> None:
    for number in value.tolist() if isinstance(value, np.ndarray) else [value]:
        if isinstance(number, int | float) and not isinstance(number, bool) and not limits.has(number):
            raise LlamaError(f"{key} is {number}; it must be {limits}")


@cache
def _type_names() -> dict[int, str]:
    listed = {kind for rule in _TYPES for kind in (*rule.only, *rule.never)} | {"f16", "bf16"}
    return {ggml_type(kind): kind for kind in listed}


def _type_name(kind: int) -> str:
    return _type_names().get(kind, f"number {kind} of ggml")


def _shown(bound: float) -> str:
    return str(bound) if isinstance(bound, int) or math.isinf(bound) else f"{bound:g}"
