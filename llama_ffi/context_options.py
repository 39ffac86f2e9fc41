"""The options that decoding and embedding contexts share, and the creation of a native context."""

from __future__ import annotations

from typing import Protocol, TypedDict, Unpack

from erllama.llama_ffi.handle import Handle
from erllama.llama_ffi.library import LlamaError, drain_log, last_error, lib

_ROPE_SCALINGS = {None: -1, "none": 0, "linear": 1, "yarn": 2}


class RopeOptions(TypedDict, total=False):
    """How a context encodes positions. Missing options take the model's values.

    rope_freq_base, rope_freq_scale: 0 for the model's value.
    rope_scaling: "none", "linear" or "yarn"; None for the model's value.
    yarn_ext_factor, yarn_attn_factor, yarn_beta_fast, yarn_beta_slow: -1 for the model's value.
    yarn_orig_ctx: tokens; 0 for the model's value.
    """

    rope_freq_base: float
    rope_freq_scale: float
    rope_scaling: str | None
    yarn_ext_factor: float
    yarn_attn_factor: float
    yarn_beta_fast: float
    yarn_beta_slow: float
    yarn_orig_ctx: int


class _ContextOptions(Protocol):
    rope_freq_base: float
    rope_freq_scale: float
    rope_scaling: int
    yarn_ext_factor: float
    yarn_attn_factor: float
    yarn_beta_fast: float
    yarn_beta_slow: float
    yarn_orig_ctx: int


def set_rope_options(options: _ContextOptions, **rope: Unpack[RopeOptions]) -> None:
    """Set all RoPE fields of a context's options. libllama's defaults are not zeros, so every field is set."""
    options.rope_freq_base = rope.get("rope_freq_base", 0.0)
    options.rope_freq_scale = rope.get("rope_freq_scale", 0.0)
    options.rope_scaling = _ROPE_SCALINGS[rope.get("rope_scaling")]
    options.yarn_ext_factor = rope.get("yarn_ext_factor", -1.0)
    options.yarn_attn_factor = rope.get("yarn_attn_factor", -1.0)
    options.yarn_beta_fast = rope.get("yarn_beta_fast", -1.0)
    options.yarn_beta_slow = rope.get("yarn_beta_slow", -1.0)
    options.yarn_orig_ctx = rope.get("yarn_orig_ctx", 0)


def create_context(model: Handle, options: object) -> object:
    """Create a native context over a held model.

    Raises:
        LlamaError: libllama refused; the message has its reason.
    """
    pointer = lib.erl_context_new(model.pointer, options)
    reason = last_error()
    problems = drain_log()
    if not pointer:
        raise LlamaError(reason or "; ".join(problems[-3:]) or "libllama could not create a context")
    return pointer
