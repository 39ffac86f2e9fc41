"""Writes BERT models as GGUF, with random or existing weights. Equal seeds give equal files.

BERT models encode texts and do not generate. Tests of embeddings and rankings use them. `write_encoder` converts
existing weights with a WordPiece vocabulary.

Needs the `gguf` package: `pip install 'erllama[models]'`.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

from erllama.testing._file import new_gguf, require_gguf

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation


@dataclass(frozen=True, slots=True)
class BertShape:
    """Sizes of a BERT model; n_embd is a multiple of n_head."""

    n_layer: int = 2
    n_embd: int = 32
    n_ff: int = 64
    n_head: int = 4
    n_ctx: int = 128


def write_bert(path: str | Path, shape: BertShape | None = None, *, pooling: str = "mean", seed: int = 0) -> Path:
    """Write a BERT GGUF with random weights and a vocabulary of characters, in lower case.

    Args:
        path: where to write. The file appears only when it is complete.
        shape: sizes.
        pooling: the pooling in the file's metadata: "none", "mean", "cls", "last", or "rank". With "rank" the model
            has a head that scores a pair of texts.
        seed: two files from the same arguments are equal byte for byte.

    Returns:
        `path`.
    """
    shape = shape or BertShape()
    words = [*_SPECIAL, *_CHARACTERS, *(f"##{character}" for character in _CHARACTERS)]
    weights = _random_weights(shape, len(words), seed, ranks=pooling == "rank")
    return write_encoder(path, weights, words, n_head=shape.n_head, pooling=pooling)


def write_encoder(
    path: str | Path,
    weights: Mapping[str, NDArray[np.float32]],
    words: Sequence[str],
    *,
    n_head: int,
    pooling: str,
    epsilon: float = 1e-12,
) -> Path:
    """Write a BERT GGUF with existing weights.

    Args:
        path: where to write. The file appears only when it is complete.
        weights: float32 arrays by their names in GGUF, such as "blk.0.attn_q.weight". Matrices have shape (out,
            in).
        words: the WordPiece vocabulary in the order of ids, with "##" before pieces that continue a word.
        n_head: attention heads of each layer.
        pooling: the pooling in the file's metadata.
        epsilon: the epsilon of the layers' norms.
    """
    require_gguf()
    from gguf import LlamaFileType, PoolingType, TokenType

    n_ctx, n_embd = weights["position_embd.weight"].shape
    path = Path(path)
    with new_gguf(path, "bert") as writer:
        writer.add_name("bert")
        writer.add_file_type(LlamaFileType.ALL_F32)
        writer.add_context_length(n_ctx)
        writer.add_embedding_length(n_embd)
        writer.add_feed_forward_length(weights["blk.0.ffn_up.weight"].shape[0])
        writer.add_block_count(sum(name.endswith("attn_q.weight") for name in weights))
        writer.add_head_count(n_head)
        writer.add_layer_norm_eps(epsilon)
        writer.add_causal_attention(False)
        writer.add_pooling_type(PoolingType[pooling.upper()])
        writer.add_vocab_size(len(words))
        writer.add_token_type_count(weights["token_types.weight"].shape[0])
        writer.add_tokenizer_model("bert")
        # As libllama expects: a mark before pieces that begin a word, not before those that continue one.
        writer.add_token_list([w if w in _SPECIAL else w[2:] if w.startswith("##") else f"▁{w}" for w in words])
        writer.add_token_types([TokenType.CONTROL if word in _SPECIAL else TokenType.NORMAL for word in words])
        for word, add in zip(
            _SPECIAL,
            (
                writer.add_pad_token_id,
                writer.add_unk_token_id,
                writer.add_bos_token_id,
                writer.add_sep_token_id,
                writer.add_mask_token_id,
            ),
            strict=True,
        ):
            add(words.index(word))
        # [CLS] text [SEP]; [CLS] query [SEP] document [SEP].
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(True)
        writer.add_add_sep_token(False)
        for name, values in weights.items():
            writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
    return path


def _random_weights(shape: BertShape, n_vocab: int, seed: int, *, ranks: bool) -> dict[str, NDArray[np.float32]]:
    random = np.random.Generator(np.random.PCG64(seed))
    weights: dict[str, NDArray[np.float32]] = {}

    def matrix(name: str, n_out: int, n_in: int, gain: float = 1.0) -> None:
        deviation = np.float32(gain / np.sqrt(n_in))
        weights[f"{name}.weight"] = random.standard_normal((n_out, n_in), np.float32) * deviation

    def linear(name: str, n_out: int, n_in: int, gain: float = 1.0) -> None:
        matrix(name, n_out, n_in, gain)
        weights[f"{name}.bias"] = random.standard_normal(n_out, np.float32) * np.float32(0.1)

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = np.ones(shape.n_embd, np.float32)
        weights[f"{name}.bias"] = np.zeros(shape.n_embd, np.float32)

    n_embd = shape.n_embd
    for table, n_rows in (("token_embd", n_vocab), ("position_embd", shape.n_ctx), ("token_types", 2)):
        matrix(table, n_rows, n_embd, gain=np.sqrt(n_embd))
    norm("token_embd_norm")
    for layer in range(shape.n_layer):
        block = f"blk.{layer}"
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            linear(f"{block}.{name}", n_embd, n_embd, gain=2.0)
        norm(f"{block}.attn_output_norm")
        linear(f"{block}.ffn_up", shape.n_ff, n_embd)
        linear(f"{block}.ffn_down", n_embd, shape.n_ff)
        norm(f"{block}.layer_output_norm")
    if ranks:
        linear("cls", n_embd, n_embd)
        linear("cls.output", 1, n_embd)
    return weights
