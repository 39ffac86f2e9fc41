"""Builds a tiny model of any architecture of libllama, guided by libllama's error messages.

A file with the commonest hyperparameters is loaded; the message of the failure
names a key, a tensor or a shape; the file gets it, and is loaded again.
"""

from __future__ import annotations

import re
from pathlib import Path

from erllama import llama_ffi
from erllama.testing.models import LlamaShape, write_llama
from support.gguf.editable_gguf import ARRAY, BOOL, F32, I32, STRING, U32, EditableGGUF, TensorEntry, read

_SHAPE = LlamaShape(n_layer=2, n_embd=64, n_ff=128, n_head=4, n_head_kv=2, n_ctx_train=512)
_COMMON: dict[str, int | float] = {
    "context_length": 512,
    "embedding_length": 64,
    "block_count": 2,
    "feed_forward_length": 128,
    "vocab_size": 320,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.layer_norm_epsilon": 1e-5,
    "rope.dimension_count": 16,
}
_ON_DEMAND: dict[str, int | float | list[int]] = {
    "expert_count": 4,
    "expert_feed_forward_length": 64,
    "expert_shared_feed_forward_length": 64,
    "expert_gating_func": 1,
    "expert_shared_count": 1,
    "leading_dense_block_count": 1,
    "attention.q_lora_rank": 32,
    "attention.kv_lora_rank": 32,
    "attention.decay_lora_rank": 32,
    "attention.iclr_lora_rank": 32,
    "attention.value_residual_mix_lora_rank": 32,
    "attention.gate_lora_rank": 32,
    "attention.key_length": 16,
    "attention.value_length": 16,
    "attention.key_length_swa": 16,
    "attention.value_length_swa": 16,
    "attention.sliding_window": 64,
    "embedding_length_per_layer_input": 32,
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 128,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 8,
    "ssm.group_count": 2,
    "wkv.head_size": 16,
    "shortconv.l_cache": 3,
    "kda.head_dim": 16,
    "rope.dimension_sections": [2, 2, 2, 2],
}
_KINDS = {"f32": F32, "u32": U32, "i32": I32, "bool": BOOL, "str": STRING, "u64": 10}
_LACKS_KEY = re.compile(r"key not found in model: ([^\s;]+)")
_WRONG_KIND = re.compile(r"key ([^\s;]+) has wrong type \w+ but expected type (\w+)")
_LACKS_TENSOR = re.compile(r"missing tensor '([^']+)'|tensor '([^']+)' not found|tensor '([^']+)' is missing")
_WRONG_SHAPE = re.compile(r"tensor '([^']+)' has wrong shape; expected ([\d, ]+), got")
_MAX_STEPS = 400
# Tensors that libllama loads as optional but uses, so no message names them.
_OPTIONAL_BUT_USED = {
    "phi3": {"attn_qkv.weight": [64, 128]},
    "falcon-h1": {"ssm_conv1d.bias": [192]},
    "qwen35": {"attn_qkv.weight": [64, 192], "attn_gate.weight": [64, 128]},
    "qwen3next": {"ssm_in.weight": [64, 320]},
}


def minimal_model(architecture: str, place: Path) -> EditableGGUF | None:
    """Return a tiny model of an architecture without weights yet, or None if the messages do not lead to one.

    In hybrid models, every second layer has attention: libllama's default is every fourth, and there are two.
    """
    base = read(write_llama(place / "base.gguf", _SHAPE))
    file = EditableGGUF({key: value for key, value in base.metadata.items() if not key.startswith("llama.")})
    file.metadata["general.architecture"] = (STRING, architecture)
    del file.metadata["general.file_type"]
    common = {**_COMMON, "full_attention_interval": 2} if architecture.startswith("qwen3") else _COMMON
    for name, value in common.items():
        _put(file, name, value)
    path, before = place / "incomplete.gguf", ""
    for _ in range(_MAX_STEPS):
        file.write(path)
        try:
            metadata = llama_ffi.check_header(path).metadata
            llama_ffi.check_hyperparameters(metadata)
            llama_ffi.LlamaModel(path).close()
        except llama_ffi.LlamaError as error:
            message = str(error)
        else:
            return file
        if message == before or not _amended(file, message):
            return None
        before = message
    return None


def _put(file: EditableGGUF, name: str, value: float | list[int]) -> None:
    kind = ARRAY if isinstance(value, list) else U32 if isinstance(value, int) else F32
    file.metadata[f"{file.architecture}.{name}"] = (kind, (U32, value) if isinstance(value, list) else value)


def _amended(file: EditableGGUF, message: str) -> bool:
    """Add to a file what a message reports as missing."""
    architecture = file.architecture
    if found := _LACKS_KEY.search(message):
        name = found[1].removeprefix(f"{architecture}.")
        real = 1e-5 if "eps" in name else 1.0 if re.search("scal|softcap|clamp", name) else None
        _put(file, name, _ON_DEMAND.get(name, real or 2))
    elif found := _WRONG_KIND.search(message):
        kind, value = _KINDS.get(found[2]), file.metadata[found[1]][1]
        if kind is None or isinstance(value, tuple):
            return False
        made = {F32: float, BOOL: bool, STRING: str}.get(kind, int)
        file.metadata[found[1]] = (kind, made(value))  # type: ignore[operator]
    elif found := _WRONG_SHAPE.search(message):
        file.tensors[found[1]].shape = [int(size) for size in found[2].split(",")]
    elif found := _LACKS_TENSOR.search(message):
        file.tensors[found[1] or found[2] or found[3]] = TensorEntry([1])
    elif "expert" in message or "n_ids_used" in message or "transposed(as)" in message:
        if f"{architecture}.expert_used_count" in file.metadata:
            return False
        _put(file, "expert_count", 4)
        _put(file, "expert_used_count", 2)
    elif "token type count" in message:
        file.metadata["tokenizer.ggml.token_type_count"] = (U32, 2)
    else:
        return False
    return True


def with_optional_tensors(file: EditableGGUF) -> EditableGGUF:
    """Add the tensors that libllama uses without requiring them."""
    layers = sorted({name.split(".")[1] for name in file.tensors if name.startswith("blk.")})
    for name, shape in _OPTIONAL_BUT_USED.get(file.architecture, {}).items():
        for layer in layers:
            attention = f"blk.{layer}.attn_output.weight" in file.tensors
            linear = f"blk.{layer}.ssm_out.weight" in file.tensors
            if linear if name.startswith("ssm") or file.architecture == "qwen35" else attention:
                file.tensors[f"blk.{layer}.{name}"] = TensorEntry(list(shape))
    return file
