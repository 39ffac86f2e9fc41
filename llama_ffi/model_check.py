"""The check of a model file before libllama loads it: types of tensors, and hyperparameters.

libllama checks shapes and trusts the rest. A wrong type, or a zero that it divides by, ends the process instead of
the load. The tables here state which values are refused, and why. They refuse only values that no real model has,
and do not list types that a whole family of tensors may have. A hyperparameter of some architectures is checked
only for these, because libllama writes all hyperparameters that it knows when it saves a model, with 0 for unused
ones. Faults that only the graph of a model shows are found by `graph_check.cpp` when a context is created.
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
    """Tensors whose names match `name` must have a type in `only`, or none in `never`, because of `reason`."""

    name: re.Pattern[str]
    only: tuple[str, ...]
    never: tuple[str, ...]
    reason: str


class ValueRange(NamedTuple):
    """The range of a hyperparameter, and its reason. With `or_zero`, 0 is also allowed and means unset."""

    low: float
    high: float
    reason: str
    or_zero: bool = False

    def contains(self, number: float) -> bool:
        return self.low <= number <= self.high or (self.or_zero and number == 0)

    def __str__(self) -> str:
        low = f"0 or {_format_bound(self.low)}" if self.or_zero else _format_bound(self.low)
        return f"{low} to {_format_bound(self.high)}: {self.reason}"


# The first rule that matches a name applies.
_TYPES = (
    TypeRule(
        re.compile(r"(^|\.)(ffn_gate_tid2eid|d2t|masked_embd_ordering|masked_embd_centroids)(\.weight)?$"),
        (),
        (),
        "tables of integer ids",
    ),
    TypeRule(
        re.compile(r"(norm|norm\d|norm_\d|norm_exps|_ln|\.enorm|\.hnorm)(\.weight|\.bias)?$"),
        ("f32",),
        (),
        "ggml multiplies f32 activations by f32 norms",
    ),
    TypeRule(re.compile(r"\.bias$"), ("f32",), (), "ggml adds f32 biases to f32 activations"),
    TypeRule(
        re.compile(r"\.(scale|input_scale)$"),
        ("f32",),
        (),
        "ggml multiplies f32 activations by f32 scales",
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
        "ggml computes convolutions and state scans in f32",
    ),
    TypeRule(
        re.compile(""),
        (),
        ("i8", "i16", "i32", "i64", "f64", "q8_1", "q8_K"),
        "ggml cannot multiply weights of this type",
    ),
)

_DIVIDES = "libllama divides by it"
_ALLOCATES = "it sets the size of an allocation or loop in libllama"
_NORMALIZES = "norms divide by the root of it plus a variance"

# Ranges for all architectures, by the name without the architecture. If a key has a value per layer, each is
# checked.
_RANGES: Mapping[str, ValueRange] = {
    "block_count": ValueRange(1, 512, _ALLOCATES),
    "context_length": ValueRange(1, 2**31 - 1, _ALLOCATES),
    "embedding_length": ValueRange(1, 2**24, _ALLOCATES),
    "attention.key_length": ValueRange(1, 2**16, _ALLOCATES),
    "attention.value_length": ValueRange(1, 2**16, _ALLOCATES),
    "attention.key_length_swa": ValueRange(1, 2**16, _ALLOCATES),
    "attention.value_length_swa": ValueRange(1, 2**16, _ALLOCATES),
    "rope.dimension_count": ValueRange(0, 2**16, _ALLOCATES),  # `graph_check.cpp` refuses to rotate 0 dimensions
    "rope.freq_base": ValueRange(1e-9, 1e30, _DIVIDES),
    "rope.freq_base_swa": ValueRange(1e-9, 1e30, _DIVIDES),
    "rope.scaling.factor": ValueRange(1e-9, 1e9, _DIVIDES, or_zero=True),
    "attention.layer_norm_rms_epsilon": ValueRange(0.0, 1.0, _NORMALIZES),
    "attention.layer_norm_epsilon": ValueRange(0.0, 1.0, _NORMALIZES),
    "attention.group_norm_epsilon": ValueRange(0.0, 1.0, _NORMALIZES),
    "full_attention_interval": ValueRange(1, 2**16, _DIVIDES),
    "interleave_moe_layer_step": ValueRange(0, 2**16, _ALLOCATES),  # libllama refuses 0 where it divides by it
    "expert_count": ValueRange(0, 1024, _ALLOCATES),
    "expert_used_count": ValueRange(0, 1024, _ALLOCATES),
    "ssm.time_step_rank": ValueRange(0, 2**24, _ALLOCATES),
    "ssm.conv_kernel": ValueRange(0, 2**16, _ALLOCATES),
    "ssm.state_size": ValueRange(0, 2**24, _ALLOCATES),
    "ssm.inner_size": ValueRange(0, 2**24, _ALLOCATES),
}
# Ranges for these architectures only. Files of others may have any value.
_RANGES_OF: tuple[tuple[tuple[str, ...], Mapping[str, ValueRange]], ...] = (
    (("wavtokenizer-dec",), {"attention.group_norm_groups": ValueRange(1, 2**16, _DIVIDES)}),
    (("grovemoe",), {"experts_per_group": ValueRange(1, 2**16, _DIVIDES)}),
    (("rwkv6", "rwkv7", "rwkv6qwen2", "arwkv7"), {"wkv.head_size": ValueRange(1, 2**16, _DIVIDES)}),
    (("kimi-linear", "kimi-k3", "bailingmoe3"), {"kda.head_dim": ValueRange(1, 2**16, _ALLOCATES)}),
    (("deepseek4",), {"attention.output_group_count": ValueRange(1, 2**16, _DIVIDES)}),
    (("lfm2", "lfm2moe"), {"shortconv.l_cache": ValueRange(1, 2**16, _ALLOCATES)}),
)
# Ranges for these architectures if a layer has one of the tensors `_STATE_SPACE`. Models without them may have 0.
_GROUPED = (
    "mamba2", "granitehybrid", "nemotron_h", "nemotron_h_moe", "falcon-h1", "qwen3next", "qwen35", "qwen35moe",
)  # fmt: skip
_STATE_SPACE = (".ssm_in.weight", ".ssm_out.weight")
_RANGES_OF_STATE_SPACE: tuple[tuple[tuple[str, ...], Mapping[str, ValueRange]], ...] = (
    (_GROUPED, {"ssm.group_count": ValueRange(1, 2**16, _DIVIDES)}),
    ((*_GROUPED, "plamo2"), {"ssm.time_step_rank": ValueRange(1, 2**24, _DIVIDES)}),
)
_HEADS = ValueRange(1, 2**16, _DIVIDES)
_NO_HEADS = ValueRange(0, 2**16, _DIVIDES)  # layers without attention

# Hyperparameters that a file of an architecture must have, in range.
_REQUIRED: Mapping[str, Mapping[str, ValueRange]] = {
    "afmoe": {"attention.sliding_window": ValueRange(1, 2**31 - 1, "its graph uses a sliding window")},
}
# If a file of these has no width of an expert, libllama divides by the number of used experts.
_WIDTH_BY_EXPERTS = (
    "glm4moe", "grovemoe", "llada-moe", "mellum", "nemotron_h_moe", "qwen2moe", "qwen35moe", "qwen3moe",
    "qwen3next", "qwen3vlmoe", "rnd1",
)  # fmt: skip


class TensorRule(NamedTuple):
    """A layer with the tensor `present` also needs a tensor of `any_of`. Empty `architectures` means all."""

    architectures: tuple[str, ...]
    present: str
    any_of: tuple[str, ...]


# libllama loads the `any_of` tensors as optional, but its graph uses them.
_TENSOR_RULES = (
    TensorRule((), "ffn_up.weight", ("ffn_down.weight",)),
    TensorRule((), "ffn_down.weight", ("ffn_up.weight",)),
    TensorRule((), "ffn_up_shexp.weight", ("ffn_down_shexp.weight",)),
    TensorRule((), "ffn_down_shexp.weight", ("ffn_up_shexp.weight",)),
    TensorRule((), "ffn_gate_inp.weight", ("ffn_down_exps.weight",)),
    TensorRule((), "ffn_down_exps.weight", ("ffn_up_exps.weight", "ffn_gate_up_exps.weight")),
    TensorRule(
        ("falcon-h1", "granitehybrid", "nemotron_h", "nemotron_h_moe"), "ssm_conv1d.weight", ("ssm_conv1d.bias",)
    ),
    *(
        TensorRule(("phi3", "pockettts"), "attn_output.weight", ("attn_qkv.weight", f"attn_{part}.weight"))
        for part in "qkv"
    ),
    TensorRule(("qwen35", "qwen35moe"), "ssm_out.weight", ("attn_qkv.weight",)),
    TensorRule(("qwen35", "qwen35moe"), "ssm_out.weight", ("attn_gate.weight",)),
    TensorRule(("qwen3next",), "ssm_out.weight", ("ssm_in.weight", "attn_qkv.weight")),
    TensorRule(("qwen3next",), "ssm_out.weight", ("ssm_in.weight", "attn_gate.weight")),
    TensorRule(("step35", "hy_v3", "mimo2"), "attn_output.weight", ("ffn_down.weight", "ffn_down_exps.weight")),
)


def check_hyperparameters(metadata: Mapping[str, object]) -> None:
    """Check the hyperparameters that set divisors, allocations and loops in libllama.

    Raises:
        LlamaError: a hyperparameter is out of range; the message has its name, value and range.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise LlamaError("the metadata has no architecture")
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
        if not isinstance(value, int) or not limits.contains(value):
            raise LlamaError(f"{architecture}.{name} is {value}; it must be {limits}")
    used, width = f"{architecture}.expert_used_count", f"{architecture}.expert_feed_forward_length"
    stated = any(_not_zero(metadata.get(key)) for key in (used, width))
    if architecture in _WIDTH_BY_EXPERTS and not stated:
        raise LlamaError(f"the metadata has neither {used} nor {width}, and libllama divides by the former")


def check_tensors(metadata: Mapping[str, object], tensors: Iterable[Tensor]) -> None:
    """Check that ggml can compute with the types of tensors, and that layers have the tensors that the graph uses.

    Also checks the hyperparameters that libllama divides by for layers with some tensors.

    Raises:
        LlamaError: the message has the tensor or the hyperparameter, and the requirement.
    """
    names: set[str] = set()
    for tensor in tensors:
        names.add(tensor.name)
        kind = _type_name(tensor.ggml_type)
        rule = next(rule for rule in _TYPES if rule.name.search(tensor.name))
        if (rule.only and kind not in rule.only) or kind in rule.never:
            must = f"must be {' or '.join(rule.only)}" if rule.only else "must have another type"
            raise LlamaError(
                f"tensor {tensor.name!r} has type {kind}; it {must}: {rule.reason}. Convert the model again"
            )
    architecture = metadata.get("general.architecture")
    if any(name.endswith(_STATE_SPACE) for name in names):
        for name, limits in _of_architecture(_RANGES_OF_STATE_SPACE, architecture).items():
            _check_range(f"{architecture}.{name}", metadata.get(f"{architecture}.{name}"), limits)
    for name in sorted(names):
        for needs in _TENSOR_RULES:
            if (not needs.architectures or architecture in needs.architectures) and name.endswith(
                f".{needs.present}"
            ):
                layer = name.removesuffix(needs.present)
                if not any(f"{layer}{other}" in names for other in needs.any_of):
                    wanted = " or ".join(repr(f"{layer}{other}") for other in needs.any_of)
                    raise LlamaError(
                        f"tensor {wanted} is missing; a model of architecture {architecture!r} needs it"
                    )


def _of_architecture(
    table: tuple[tuple[tuple[str, ...], Mapping[str, ValueRange]], ...], architecture: object
) -> dict[str, ValueRange]:
    return {name: limits for which, ranges in table if architecture in which for name, limits in ranges.items()}


def _not_zero(value: object) -> bool:
    return bool(value.any()) if isinstance(value, np.ndarray) else isinstance(value, int | float) and value != 0


def _check_range(key: str, value: object, limits: ValueRange) -> None:
    for number in value.tolist() if isinstance(value, np.ndarray) else [value]:
        if isinstance(number, int | float) and not isinstance(number, bool) and not limits.contains(number):
            raise LlamaError(f"{key} is {number}; it must be {limits}")


@cache
def _type_names() -> dict[int, str]:
    listed = {kind for rule in _TYPES for kind in (*rule.only, *rule.never)} | {"f16", "bf16"}
    return {ggml_type(kind): kind for kind in listed}


def _type_name(kind: int) -> str:
    return _type_names().get(kind, f"number {kind} of ggml")


def _format_bound(bound: float) -> str:
    return str(bound) if isinstance(bound, int) or math.isinf(bound) else f"{bound:g}"
