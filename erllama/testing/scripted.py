"""Writes tiny GGUF models with scripted replies: each token determines the next one.

So a test can use a real model file, on libllama, that thinks, calls a tool and answers, or that writes a word in
other tokens than its tokenizer would.

Needs the `gguf` package: `pip install 'erllama[models]'`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from erllama.testing._file import new_gguf, require_gguf

if TYPE_CHECKING:
    from gguf import GGUFWriter

END = "</s>"
# The logit of the next token. Those of all others are zero, so that sampling at usual temperatures finds it, too.
_LOGIT = 40.0
_SPECIAL = ["<unk>", "<s>", END]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def write_scripted(
    path: str | Path,
    follows: Mapping[str, str],
    *,
    words: Sequence[str] = (),
    special: Sequence[str] = (),
    chat_template: str | None = None,
    n_ctx_train: int = 8192,
) -> Path:
    """Write a llama-architecture GGUF in which each token has exactly one successor.

    Tokens are named by their texts. Every byte, such as "a", is a token, and so are `words`, `special` tokens, and
    END, which ends a reply. END follows every token without an entry in `follows`. Text is tokenized to the longest
    matching words, and otherwise to bytes. BOS is never added.

    Args:
        path: where to write.
        follows: the successor of each token.
        words: texts of at least two characters that are tokens. Their prefixes become tokens, too.
        special: texts of tokens that tokenization matches only with `parse_special`.
        chat_template: the chat template in the file's metadata.
        n_ctx_train: the context length in the file's metadata.

    Raises:
        ValueError: `follows` contains a text that is not a token.
    """
    require_gguf()
    begun = sorted({word[:n] for word in words for n in range(2, len(word) + 1)})
    # The tokenizer writes a space as another character, which has no byte token.
    tokens = [*_SPECIAL, *_BYTES, "▁", *(word.replace(" ", "▁") for word in begun), *special]
    ids = {END: 2} | {chr(byte): len(_SPECIAL) + byte for byte in range(128)}
    first = len(_SPECIAL) + len(_BYTES)
    ids |= {text: first + i for i, text in enumerate([" ", *begun, *special])}
    unknown = sorted((set(follows) | set(follows.values())) - set(ids))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a token of this model")
    n_vocab = len(tokens)
    n_embd = -(-(len(follows) + 1) // 32) * 32
    # Each token in `follows` has a direction of its own, and all others share the first one, which END follows. The
    # layers do not change it, the norm scales it to the square root of its length, and the output maps it to the
    # next token.
    embeddings, output = np.zeros((n_vocab, n_embd), np.float32), np.zeros((n_vocab, n_embd), np.float32)
    embeddings[:, 0] = 1.0
    output[ids[END], 0] = _LOGIT / n_embd**0.5
    for direction, (token, text) in enumerate(follows.items(), 1):
        embeddings[ids[token]] = np.eye(n_embd, dtype=np.float32)[direction]
        output[ids[text], direction] = _LOGIT / n_embd**0.5

    path = Path(path)
    with new_gguf(path, "llama") as writer:
        writer.add_name("scripted")
        writer.add_context_length(n_ctx_train)
        writer.add_embedding_length(n_embd)
        writer.add_block_count(1)
        writer.add_feed_forward_length(32)
        writer.add_head_count(1)
        writer.add_head_count_kv(1)
        writer.add_rope_dimension_count(n_embd)
        writer.add_layer_norm_rms_eps(1e-5)
        _add_tokenizer(writer, tokens, len(begun), len(special))
        if chat_template is not None:
            writer.add_chat_template(chat_template)
        writer.add_tensor("token_embd.weight", embeddings)
        writer.add_tensor("output_norm.weight", np.ones(n_embd, np.float32))
        writer.add_tensor("output.weight", output)
        _add_neutral_layer(writer, n_embd)
    return path


def _add_tokenizer(writer: GGUFWriter, tokens: Sequence[str], n_words: int, n_special: int) -> None:
    """Add a tokenizer that prefers longer words, and the types of its tokens, in the order of `tokens`."""
    from gguf import TokenType

    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * len(_BYTES)
    types += [TokenType.NORMAL] * (1 + n_words) + [TokenType.CONTROL] * n_special
    n_first = len(_SPECIAL) + len(_BYTES)
    words = tokens[n_first + 1 : n_first + 1 + n_words]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_scores([0.0] * n_first + [-1.0] + [float(len(word)) for word in words] + [0.0] * n_special)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def _add_neutral_layer(writer: GGUFWriter, n_embd: int) -> None:
    """Add layer 0 with weights of zero, so that it adds zero to each token's direction."""
    for name, shape in {
        "attn_q": (n_embd, n_embd),
        "attn_k": (n_embd, n_embd),
        "attn_v": (n_embd, n_embd),
        "attn_output": (n_embd, n_embd),
        "ffn_gate": (32, n_embd),
        "ffn_up": (32, n_embd),
        "ffn_down": (n_embd, 32),
    }.items():
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros(shape, np.float32))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(n_embd, np.float32))
