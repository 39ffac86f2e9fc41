"""Makes small GGUF models with random weights, the same from the same seed.

They say nothing sensible, but they are real: libllama loads them, every token
depends on every token before it, and any prompt has a reply. Tests, benchmarks
and the demonstration use them where no trained model is at hand.

Needs the `gguf` package: `pip install 'erllama[models]'`. From the shell:

    python -m erllama.testing.models 1.1b model.gguf --quantization Q4_0
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Quantization = Literal["F32", "F16", "Q8_0", "Q4_0"]

BOS, EOS = 1, 2
FIRST_BYTE = 3  # the token of byte b is FIRST_BYTE + b
SPACE = FIRST_BYTE + 256  # what the tokenizer makes of a space, which it writes as "▁"
_BLOCK = 32  # elements of one Q8_0 or Q4_0 block


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """Sizes of a llama-architecture model; n_embd and n_ff are multiples of 32."""

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_vocab: int = 320
    n_ctx_train: int = 32768


TINY = LlamaShape(n_layer=2, n_embd=64, n_ff=128, n_head=2, n_head_kv=1)
SMALL = LlamaShape(n_layer=12, n_embd=512, n_ff=1408, n_head=8, n_head_kv=4)
SHAPE_135M = LlamaShape(n_layer=30, n_embd=576, n_ff=1536, n_head=9, n_head_kv=3, n_vocab=49152)
SHAPE_1B = LlamaShape(n_layer=22, n_embd=2048, n_ff=5632, n_head=32, n_head_kv=4, n_vocab=32000)
SHAPES = {"tiny": TINY, "small": SMALL, "135m": SHAPE_135M, "1.1b": SHAPE_1B}


def write_llama(
    path: str | Path, shape: LlamaShape = TINY, *, seed: int = 0, quantization: Quantization = "F32"
) -> Path:
    """Write a llama-architecture GGUF with random weights and a vocabulary of bytes.

    Every byte is a token, so any text has tokens and any tokens have bytes; a
    space has a second one, and ids beyond stand for words of the form "⟨n⟩". The query and key
    weights are drawn wide enough for attention to pick single positions, so
    that a reply changes when any one token of its prompt does.

    Args:
        path: where to write; appears whole or not at all.
        shape: sizes; see SHAPES for some.
        seed: two files from the same arguments are equal byte for byte.
        quantization: type of the weight matrices.

    Returns:
        `path`.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    rng = np.random.Generator(np.random.PCG64(seed))
    kind = GGMLQuantizationType[quantization]
    writer = GGUFWriter(partial, "llama")
    writer.add_name(f"random llama, seed {seed}")
    writer.add_file_type(LlamaFileType["ALL_F32" if quantization == "F32" else f"MOSTLY_{quantization}"])
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.n_embd // shape.n_head)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(shape.n_vocab)
    _add_byte_vocabulary(writer, shape.n_vocab)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(shape.n_embd, np.float32))

    def matrix(name: str, n_out: int, n_in: int, gain: float = 1.0) -> None:
        packed = _random_matrix(rng, n_out, n_in, gain / np.sqrt(n_in), quantization)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)

    n_kv = shape.n_embd // shape.n_head * shape.n_head_kv
    # Small embeddings and a separate output: what attention gathers outweighs the last token itself.
    matrix("token_embd", shape.n_vocab, shape.n_embd, gain=0.3 * np.sqrt(shape.n_embd))
    norm("output_norm")
    matrix("output", shape.n_vocab, shape.n_embd, gain=2.5)
    for layer in range(shape.n_layer):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm")
        matrix(f"{block}.attn_q", shape.n_embd, shape.n_embd, gain=2.0)
        matrix(f"{block}.attn_k", n_kv, shape.n_embd, gain=2.0)
        matrix(f"{block}.attn_v", n_kv, shape.n_embd, gain=2.0)
        matrix(f"{block}.attn_output", shape.n_embd, shape.n_embd, gain=2.0)
        norm(f"{block}.ffn_norm")
        matrix(f"{block}.ffn_gate", shape.n_ff, shape.n_embd)
        matrix(f"{block}.ffn_up", shape.n_ff, shape.n_embd)
        matrix(f"{block}.ffn_down", shape.n_embd, shape.n_ff)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _add_byte_vocabulary(writer: object, n_vocab: int) -> None:
    from gguf import GGUFWriter, TokenType

    assert isinstance(writer, GGUFWriter)
    if n_vocab <= SPACE:
        raise ValueError(f"n_vocab={n_vocab}; the bytes and special tokens need {SPACE + 1}")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁"]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256 + [TokenType.NORMAL]
    n_words = n_vocab - len(tokens)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens + [f"⟨{i}⟩" for i in range(n_words)])
    writer.add_token_types(types + [TokenType.NORMAL] * n_words)
    writer.add_token_scores([0.0] * len(tokens) + [-1000.0] * n_words)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def _random_matrix(
    rng: np.random.Generator, n_out: int, n_in: int, std: float, quantization: Quantization
) -> NDArray[np.generic]:
    """Shape (n_out, n_in), or (n_out, bytes of a row) where the type packs blocks."""
    if quantization in ("F32", "F16"):
        weights = rng.standard_normal((n_out, n_in), np.float32) * np.float32(std)
        return weights if quantization == "F32" else weights.astype(np.float16)
    if n_in % _BLOCK:
        raise ValueError(f"{quantization} packs blocks of {_BLOCK}; a row of {n_in} is not a multiple")
    # Drawn in packed form: uniform integers times a scale that gives them the wanted deviation.
    n_blocks = n_out * n_in // _BLOCK
    if quantization == "Q8_0":
        quants = rng.integers(-127, 128, (n_blocks, _BLOCK), np.int8).view(np.uint8)
        deviation = np.sqrt((255**2 - 1) / 12)
    else:
        quants = rng.integers(0, 256, (n_blocks, _BLOCK // 2), np.uint8)
        deviation = np.sqrt((16**2 - 1) / 12)
    scales = np.full((n_blocks, 1), std / deviation, np.float16).view(np.uint8)
    return np.concatenate([scales.reshape(n_blocks, 2), quants], axis=1).reshape(n_out, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a GGUF model with random weights.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--quantization", choices=get_args(Quantization), default="Q8_0")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write_llama(given.path, SHAPES[given.shape], seed=given.seed, quantization=given.quantization)


if __name__ == "__main__":
    main()
