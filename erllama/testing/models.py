"""Writes small GGUF models with random weights. Equal seeds give equal files.

Their replies make no sense, but libllama loads them like any model: every token depends on every token before it,
and any prompt has a reply. Tests and benchmarks use them instead of trained models.

Needs the `gguf` package: `pip install 'erllama[models]'`. From the shell:

    python -m erllama.testing.models 1.1b model.gguf --quantization Q4_0
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from erllama.testing._file import new_gguf, require_gguf

if TYPE_CHECKING:
    from numpy.typing import NDArray

Quantization = Literal["F32", "F16", "Q8_0", "Q4_0"]

BOS, EOS = 1, 2
FIRST_BYTE = 3  # the token of byte b is FIRST_BYTE + b
SPACE = FIRST_BYTE + 256  # the token of a space, which the tokenizer writes as "▁"
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

    Every byte is a token, so that any text has tokens and any tokens have bytes. A space has a second token, and
    the ids after it are words of the form "⟨n⟩". The query and key weights are large enough for attention to select
    single positions, so that a reply changes when any one token of its prompt changes.

    Args:
        path: where to write. The file appears only when it is complete.
        shape: sizes, such as those in SHAPES.
        seed: two files from the same arguments are equal byte for byte.
        quantization: type of the weight matrices.

    Returns:
        `path`.
    """
    n_embd, n_kv = shape.n_embd, shape.n_embd // shape.n_head * shape.n_head_kv
    with _ModelFile(path, "llama", shape.n_vocab, n_embd, shape.n_layer, seed, quantization) as file:
        file.writer.add_context_length(shape.n_ctx_train)
        file.writer.add_feed_forward_length(shape.n_ff)
        file.writer.add_head_count(shape.n_head)
        file.writer.add_head_count_kv(shape.n_head_kv)
        file.writer.add_rope_dimension_count(n_embd // shape.n_head)
        file.writer.add_rope_freq_base(10000.0)
        for layer in range(shape.n_layer):
            block = f"blk.{layer}"
            file.norm(f"{block}.attn_norm", n_embd)
            file.attention(block, n_embd, n_embd, n_kv)
            file.norm(f"{block}.ffn_norm", n_embd)
            file.feed_forward(block, n_embd, shape.n_ff)
    return Path(path)


def write_gemma3(path: str | Path, *, window: int = 64, seed: int = 0) -> Path:
    """Write a tiny gemma3: five of six layers see only a sliding window of `window` tokens."""
    n_layer, n_embd, n_ff, n_head, n_head_kv, n_dim = 6, 64, 128, 4, 2, 16
    with _ModelFile(path, "gemma3", 320, n_embd, n_layer, seed, "F32") as file:
        file.writer.add_context_length(32768)
        file.writer.add_feed_forward_length(n_ff)
        file.writer.add_head_count(n_head)
        file.writer.add_head_count_kv(n_head_kv)
        file.writer.add_key_length(n_dim)
        file.writer.add_value_length(n_dim)
        file.writer.add_sliding_window(window)
        file.writer.add_rope_freq_base(10000.0)
        for layer in range(n_layer):
            block = f"blk.{layer}"
            for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
                file.norm(f"{block}.{norm}", n_embd)
            for norm in ("attn_q_norm", "attn_k_norm"):
                file.norm(f"{block}.{norm}", n_dim, value=2.0)
            file.attention(block, n_embd, n_head * n_dim, n_head_kv * n_dim)
            file.feed_forward(block, n_embd, n_ff)
    return Path(path)


def write_mamba(path: str | Path, *, seed: int = 0) -> Path:
    """Write a tiny mamba: a recurrent state without attention."""
    n_layer, n_embd, n_inner, n_state, n_rank, n_conv = 3, 64, 128, 16, 8, 4
    with _ModelFile(path, "mamba", 320, n_embd, n_layer, seed, "F32") as file:
        file.writer.add_context_length(32768)
        file.writer.add_feed_forward_length(0)
        file.writer.add_head_count(0)
        file.writer.add_ssm_conv_kernel(n_conv)
        file.writer.add_ssm_inner_size(n_inner)
        file.writer.add_ssm_state_size(n_state)
        file.writer.add_ssm_time_step_rank(n_rank)
        for layer in range(n_layer):
            block = f"blk.{layer}"
            file.norm(f"{block}.attn_norm", n_embd)
            file.matrix(f"{block}.ssm_in", 2 * n_inner, n_embd)
            file.matrix(f"{block}.ssm_conv1d", n_inner, n_conv)
            file.constant(f"{block}.ssm_conv1d.bias", np.zeros(n_inner))
            file.matrix(f"{block}.ssm_x", n_rank + 2 * n_state, n_inner)
            file.matrix(f"{block}.ssm_dt", n_inner, n_rank)
            # Slow decay and small steps, so that the state remembers hundreds of tokens.
            file.constant(f"{block}.ssm_dt.bias", np.full(n_inner, -2.0))
            file.constant(f"{block}.ssm_a", -np.tile(np.linspace(0.05, 1, n_state), (n_inner, 1)))
            file.constant(f"{block}.ssm_d", np.ones(n_inner))
            file.matrix(f"{block}.ssm_out", n_embd, n_inner)
    return Path(path)


def write_lfm2(path: str | Path, *, seed: int = 0) -> Path:
    """Write a tiny lfm2: layers of attention alternate with layers of short convolutions, which have a state."""
    n_layer, n_embd, n_ff, n_head, n_head_kv, n_conv = 4, 64, 128, 4, 2, 3
    n_dim = n_embd // n_head
    with _ModelFile(path, "lfm2", 320, n_embd, n_layer, seed, "F32", output_norm="token_embd_norm") as file:
        file.writer.add_context_length(32768)
        file.writer.add_feed_forward_length(n_ff)
        file.writer.add_head_count(n_head)
        file.writer.add_head_count_kv([n_head_kv * (layer % 2) for layer in range(n_layer)])
        file.writer.add_shortconv_l_cache(n_conv)
        file.writer.add_rope_freq_base(10000.0)
        for layer in range(n_layer):
            block = f"blk.{layer}"
            file.norm(f"{block}.attn_norm", n_embd)
            if layer % 2:
                file.norm(f"{block}.attn_q_norm", n_dim, value=2.0)
                file.norm(f"{block}.attn_k_norm", n_dim, value=2.0)
                file.attention(block, n_embd, n_embd, n_head_kv * n_dim)
            else:
                file.matrix(f"{block}.shortconv.in_proj", 3 * n_embd, n_embd)
                file.matrix(f"{block}.shortconv.conv", n_embd, n_conv)
                file.matrix(f"{block}.shortconv.out_proj", n_embd, n_embd, gain=2.0)
            file.norm(f"{block}.ffn_norm", n_embd)
            file.feed_forward(block, n_embd, n_ff)
    return Path(path)


# Weights of a llama's layers that adapters usually change.
ADAPTED = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def write_lora(
    path: str | Path,
    shape: LlamaShape = TINY,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    seed: int = 0,
    weights: Sequence[str] = ADAPTED,
    gain: float = 1.0,
    architecture: str = "llama",
) -> Path:
    """Write a LoRA adapter with random weights for a llama of `write_llama`.

    With scale 1 it changes each weight by alpha / rank times B A, about as much as `gain` times the weight itself.
    Replies then differ from those of the model from the first token on.

    Args:
        path: where to write. The file appears only when it is complete.
        shape: sizes of the model.
        rank: columns of B and rows of A.
        alpha: the alpha in the file's metadata.
        seed: two files from the same arguments are equal byte for byte.
        weights: the weights to change: names within a layer, or "token_embd" and "output".
        gain: size of the change, relative to the weight.
        architecture: the architecture in the file's metadata. Other architectures have other weight names and
            sizes.

    Returns:
        `path`.
    """
    path = Path(path)
    random = np.random.Generator(np.random.PCG64(seed))
    with new_gguf(path, architecture) as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for name, n_out, n_in in _lora_weights(shape, weights):
            # A row of A times an input of length 1 is about 1 / sqrt(n_in); the scale undoes alpha / rank.
            a = random.standard_normal((rank, n_in), np.float32) / np.float32(np.sqrt(n_in))
            b = random.standard_normal((n_out, rank), np.float32) * np.float32(gain * np.sqrt(rank) / alpha)
            if name == "token_embd":  # its rows are looked up, so the two matrices are stored in exchanged order
                a, b = np.ascontiguousarray(b), np.ascontiguousarray(a.T)
            writer.add_tensor(f"{name}.weight.lora_a", a)
            writer.add_tensor(f"{name}.weight.lora_b", b)
    return path


def _lora_weights(shape: LlamaShape, weights: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return the names of the weights to adapt, with their rows and columns."""
    n_embd, n_kv = shape.n_embd, shape.n_embd // shape.n_head * shape.n_head_kv
    sizes = {
        "attn_q": (n_embd, n_embd),
        "attn_k": (n_kv, n_embd),
        "attn_v": (n_kv, n_embd),
        "attn_output": (n_embd, n_embd),
        "ffn_gate": (shape.n_ff, n_embd),
        "ffn_up": (shape.n_ff, n_embd),
        "ffn_down": (n_embd, shape.n_ff),
    }
    whole = [(name, shape.n_vocab, n_embd) for name in ("token_embd", "output") if name in weights]
    in_layers = [(name, *size) for name, size in sizes.items() if name in weights]
    layers = range(shape.n_layer)
    return whole + [(f"blk.{layer}.{name}", n_out, n_in) for layer in layers for name, n_out, n_in in in_layers]


class _ModelFile(AbstractContextManager["_ModelFile"]):
    """A GGUF that is being written. The constructor writes vocabulary, embeddings and output; exit finishes it."""

    def __init__(
        self,
        path: str | Path,
        architecture: str,
        n_vocab: int,
        n_embd: int,
        n_layer: int,
        seed: int,
        quantization: Quantization,
        output_norm: str = "output_norm",
    ) -> None:
        require_gguf()
        from gguf import GGMLQuantizationType, LlamaFileType

        self._file = new_gguf(Path(path), architecture)
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._quantization = quantization
        self._kind = GGMLQuantizationType[quantization]
        self.writer = self._file.__enter__()
        self.writer.add_name(f"random {architecture}, seed {seed}")
        self.writer.add_file_type(LlamaFileType["ALL_F32" if quantization == "F32" else f"MOSTLY_{quantization}"])
        self.writer.add_embedding_length(n_embd)
        self.writer.add_block_count(n_layer)
        self.writer.add_layer_norm_rms_eps(1e-5)
        self.writer.add_vocab_size(n_vocab)
        _add_byte_vocabulary(self.writer, n_vocab)
        # Small embeddings and a separate output, so that the layers have more effect than the last token itself.
        self.matrix("token_embd", n_vocab, n_embd, gain=0.3 * np.sqrt(n_embd))
        self.norm(output_norm, n_embd)
        self.matrix("output", n_vocab, n_embd, gain=2.5)

    def norm(self, name: str, n: int, value: float = 1.0) -> None:
        self.constant(f"{name}.weight", np.full(n, value))

    def constant(self, name: str, values: NDArray[np.floating]) -> None:
        self.writer.add_tensor(name, np.ascontiguousarray(values, np.float32))

    def matrix(self, name: str, n_out: int, n_in: int, gain: float = 1.0) -> None:
        packed = _random_matrix(self._random, n_out, n_in, gain / np.sqrt(n_in), self._quantization)
        self.writer.add_tensor(f"{name}.weight", packed, raw_dtype=self._kind)

    def attention(self, block: str, n_embd: int, n_q: int, n_kv: int) -> None:
        self.matrix(f"{block}.attn_q", n_q, n_embd, gain=2.0)
        self.matrix(f"{block}.attn_k", n_kv, n_embd, gain=2.0)
        self.matrix(f"{block}.attn_v", n_kv, n_embd, gain=2.0)
        self.matrix(f"{block}.attn_output", n_embd, n_q, gain=2.0)

    def feed_forward(self, block: str, n_embd: int, n_ff: int) -> None:
        self.matrix(f"{block}.ffn_gate", n_ff, n_embd)
        self.matrix(f"{block}.ffn_up", n_ff, n_embd)
        self.matrix(f"{block}.ffn_down", n_embd, n_ff)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)


def _add_byte_vocabulary(writer: object, n_vocab: int) -> None:
    require_gguf()
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
    """Return random weights, shape (n_out, n_in), or (n_out, bytes of a row) for a type that packs blocks."""
    if quantization in ("F32", "F16"):
        weights = rng.standard_normal((n_out, n_in), np.float32) * np.float32(std)
        return weights if quantization == "F32" else weights.astype(np.float16)
    if n_in % _BLOCK:
        raise ValueError(f"{quantization} packs blocks of {_BLOCK}; a row of {n_in} is not a multiple")
    # Drawn in packed form: uniform integers, times a scale that gives the requested deviation.
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
    arguments = parser.parse_args()
    write_llama(arguments.path, SHAPES[arguments.shape], seed=arguments.seed, quantization=arguments.quantization)


if __name__ == "__main__":
    main()
