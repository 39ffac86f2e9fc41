"""Small models in place of those that llama.cpp's tests download.

The tests expect certain words in replies, and certain numbers of tokens. So a stand-in for a model of stories
writes these words after any prompt, and then others at random. Its vocabulary splits the prompts of the tests into
the numbers of tokens that they expect. The stand-ins for encoders have a vocabulary of words.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from erllama.testing._file import new_gguf
from erllama.testing.bert import BertShape, _random_weights, write_encoder
from erllama.testing.models import write_gemma3

# Words after any prompt, in this order.
_FIRST = ("▁blue", "▁going", "▁But", "▁she", "▁couldn't", "▁Suddenly", "▁Whillicter")
# Words after these, at random; each one is most often followed by the next.
_THEN = tuple(
    f"▁{word}"
    for word in (
        *(
            "little",
            "girl",
            "princesses",
            "Anna",
            "small",
            "Dad",
            "park",
            "day",
            "shiny",
            "Jimmy",
            "kids",
            "forest",
        ),
        *("excited", "everyone", "Daddy", "many", "happy", "special", "thing", "gifted", "far", "from", "home"),
        *("away", "bed", "house", "big", "cat", "sky", "tree", "friends", "leaf", "very", "smile", "sun", "play"),
        *("water", "bird", "song", "green", "river", "night", "stone", "wind", "garden", "story"),
    )
)
# Words of prompts that are one token. Their beginnings are tokens, too.
_OF_PROMPTS = (
    *("<|", "|>", "assis", "syst", "use", "Te", "He", "Wh", "he", "▁is", "▁the", "▁believe", "▁mean", "▁best"),
    *("▁about", "▁Write", "▁prompt", "▁which", "▁fr", "▁This", "▁ch", "▁fibonacci", "▁func", "▁But", "▁she"),
    "▁Hel",
)
# After these, a word at random comes first: tests of probabilities need many likely tokens.
_UNSURE = ("a", "▁a", ":")
_GAP_MARKS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
_SPECIAL = ("<unk>", "<s>", "</s>")
_N_BYTES = 256

# Words of the tests of embeddings and rankings. A word with "##" continues another.
_WORDS = (
    *("i", "believe", "the", "meaning", "of", "life", "is", "this", "a", "test", "write", "joke", "about", "ai"),
    *("machine", "learn", "##ing", "which", "city", "?", "par", "##is", ",", "cap", "##it", "##al", "##e", "d"),
    *("la", "hello", "world", "goodbye"),
)


def write_stories(path: Path, *, fills_gaps: bool = False) -> Path:
    """Write a model of stories.

    Args:
        fills_gaps: whether it has the tokens that mark a gap.
    """
    from gguf import TokenType

    pieces = {word[:n] for word in _OF_PROMPTS for n in range(2, len(word) + 1)}
    words = sorted(pieces | set(_FIRST) | set(_THEN), key=lambda word: (len(word), word))
    marks = _GAP_MARKS if fills_gaps else ()
    tokens = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(_N_BYTES)), "▁", *words, *marks]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * _N_BYTES]
    types += [TokenType.NORMAL] * (1 + len(words)) + [TokenType.CONTROL] * len(marks)
    n_embd = -(-len(tokens) // 32) * 32
    with new_gguf(path, "llama") as writer:
        writer.add_name("stories")
        writer.add_context_length(32768)
        writer.add_embedding_length(n_embd)
        writer.add_block_count(1)
        writer.add_feed_forward_length(32)
        writer.add_head_count(1)
        writer.add_head_count_kv(1)
        writer.add_rope_dimension_count(n_embd)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(len(tokens))
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_scores([_score(token, pieces) for token in tokens])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(True)
        if fills_gaps:
            for name, mark in zip(("pre", "suf", "mid"), marks, strict=True):
                writer.add_uint32(f"tokenizer.ggml.fim_{name}_token_id", tokens.index(mark))
        # Each token has its own direction. The layer does not change it, and the output maps it to the next tokens.
        embeddings = np.zeros((len(tokens), n_embd), np.float32)
        embeddings[np.arange(len(tokens)), np.arange(len(tokens))] = 1.0
        output = np.zeros((len(tokens), n_embd), np.float32)
        output[:, : len(tokens)] = _logits(tokens) / np.sqrt(n_embd)
        writer.add_tensor("token_embd.weight", embeddings)
        writer.add_tensor("output_norm.weight", np.ones(n_embd, np.float32))
        writer.add_tensor("output.weight", output)
        for name, n_out, n_in in _layer(n_embd):
            writer.add_tensor(f"blk.0.{name}.weight", np.zeros((n_out, n_in), np.float32))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.0.{name}.weight", np.ones(n_embd, np.float32))
    return path


def _score(token: str, pieces: set[str]) -> float:
    """Return the score of a token: longer pieces are merged first; words of replies alone never."""
    return float(len(token)) if token in pieces else -1.0


def _logits(tokens: Sequence[str]) -> NDArray[np.float32]:
    """Return the logits of each next token, by the last one: shape (next, last)."""
    ids = {token: id for id, token in enumerate(tokens)}
    ids |= {chr(byte): len(_SPECIAL) + byte for byte in range(128)}
    random = np.random.default_rng(0)
    logits = np.zeros((len(tokens), len(tokens)), np.float32)
    later = [ids[word] for word in _THEN]
    logits[later] = 6.0 + random.random((len(later), len(tokens)), np.float32)
    for at, word in enumerate(later):
        logits[later[(at + 1) % len(later)], word] = 8.5
    sure = [id for token, id in ids.items() if token not in _UNSURE and id not in later]
    logits[ids[_FIRST[0]], sure] = 14.0
    for before, after in zip(_FIRST, (*_FIRST[1:], _THEN[0]), strict=True):
        logits[ids[_FIRST[0]], ids[before]] = 0.0
        logits[ids[after], ids[before]] = 14.0
    logits[: len(_SPECIAL)] = -20.0
    logits[[ids[mark] for mark in _GAP_MARKS if mark in ids]] = -20.0
    return logits


def _layer(n_embd: int) -> list[tuple[str, int, int]]:
    square = [(name, n_embd, n_embd) for name in ("attn_q", "attn_k", "attn_v", "attn_output")]
    return [*square, ("ffn_gate", 32, n_embd), ("ffn_up", 32, n_embd), ("ffn_down", n_embd, 32)]


def write_words_encoder(path: Path, *, pooling: str, seed: int) -> Path:
    """Write a BERT with random weights that knows the words of the tests; other words are split into letters."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789.,-'\"?!éèà"
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{each}" for each in characters)]
    words = [*known, *(word for word in dict.fromkeys(_WORDS) if word not in known)]
    weights = _random_weights(BertShape(n_ctx=512), len(words), seed, ranks=pooling == "rank")
    return write_encoder(path, weights, words, n_head=4, pooling=pooling)


# The models of llama.cpp's tests, by a pattern of their repository and file, and the stand-ins. The first one fits.
_MODELS: Mapping[str, tuple[str, Callable[[Path], Path]]] = {
    r"bert-bge-small": ("words", lambda path: write_words_encoder(path, pooling="cls", seed=1)),
    # With this seed, the documents of the tests of rankings have the order that the tests expect.
    r"jina-reranker": ("ranks", lambda path: write_words_encoder(path, pooling="rank", seed=30)),
    r"infill|Coder": ("gaps", lambda path: write_stories(path, fills_gaps=True)),
    r"gemma": ("gemma3", write_gemma3),
    r"": ("stories", write_stories),
}


def stand_in(name: str, folder: Path) -> Path:
    """Return the file of the stand-in for a model, written if it does not exist.

    Args:
        name: repository and file of the model.
    """
    file, write = next(found for pattern, found in _MODELS.items() if re.search(pattern, name))
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    path = folder / f"{file}-{version}.gguf"
    return path if path.exists() else write(path)
