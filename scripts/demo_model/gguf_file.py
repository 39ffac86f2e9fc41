"""Writes the trained model as a GGUF file: Q8_0 matrices, tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType, TokenType
from gguf.quants import quantize
from numpy.typing import NDArray

from erllama.testing._file import new_gguf
from scripts.demo_model import network, tokenizer
from scripts.demo_model.network import Shape

Arrays = dict[str, NDArray[np.float32]]


def write(
    path: Path, weights: Arrays, shape: Shape, words: tokenizer.Tokenizer, template: str, n_ctx_train: int
) -> None:
    """Write the file atomically. The same arguments produce the same bytes."""
    with new_gguf(path, "llama") as writer:
        writer.add_name("erllama demo")
        writer.add_description(
            "Trained from scratch on generated text: short stories, sums, a weather tool, short talk"
        )
        writer.add_license("mit")
        writer.add_languages(["en"])
        writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
        writer.add_quantization_version(2)
        writer.add_context_length(n_ctx_train)
        writer.add_embedding_length(shape.n_embd)
        writer.add_block_count(shape.n_layer)
        writer.add_feed_forward_length(shape.n_ff)
        writer.add_head_count(shape.n_head)
        writer.add_head_count_kv(shape.n_head_kv)
        writer.add_rope_dimension_count(shape.n_dim)
        writer.add_rope_freq_base(network.ROPE_BASE)
        writer.add_layer_norm_rms_eps(network.RMS_EPSILON)
        writer.add_vocab_size(shape.n_vocab)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(tokenizer.PRE_TOKENIZER)
        writer.add_token_list(words.tokens)
        n_plain = len(words.tokens) - len(tokenizer.SPECIAL)
        writer.add_token_types(
            [TokenType.NORMAL] * n_plain
            + [TokenType.CONTROL] * len(tokenizer.CONTROL)
            + [TokenType.USER_DEFINED] * len(tokenizer.MARKERS)
        )
        writer.add_token_merges([f"{left} {right}" for left, right in words.merges])
        writer.add_bos_token_id(words.ids[tokenizer.END])  # never added; libllama would choose another one
        writer.add_eos_token_id(words.ids[tokenizer.END])
        writer.add_add_bos_token(False)
        writer.add_chat_template(template)
        for name, array in _tensors(weights, shape).items():
            if array.ndim == 1:
                writer.add_tensor(name, array)
            else:
                packed = quantize(array, GGMLQuantizationType.Q8_0)
                writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType.Q8_0)


def _tensors(weights: Arrays, shape: Shape) -> Arrays:
    """Return the weights by their GGUF names. The embeddings are also the output matrix."""
    named = {f"{name}.weight": weights[name] for name in ("token_embd", "output_norm")}
    for name, stacked in weights.items():
        if f"{name}.weight" in named:
            continue
        for layer, array in enumerate(stacked):
            turned = _interleave(array, shape.n_dim) if name in ("attn_q", "attn_k") else array
            named[f"blk.{layer}.{name}.weight"] = np.ascontiguousarray(turned)
    return named


def _interleave(matrix: NDArray[np.float32], n_dim: int) -> NDArray[np.float32]:
    """Interleave the two halves of each head, so that the rows that RoPE rotates together are adjacent."""
    n_out, n_in = matrix.shape
    return matrix.reshape(-1, 2, n_dim // 2, n_in).swapaxes(1, 2).reshape(n_out, n_in)
