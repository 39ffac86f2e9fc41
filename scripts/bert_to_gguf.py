"""Converts a BERT encoder from the files of sentence-transformers to GGUF, with float32 weights.

    python -m scripts.bert_to_gguf DIRECTORY model.gguf

The directory holds model.safetensors, config.json and vocab.txt. The embedding of a text is the mean over its
tokens, as in most models of sentence-transformers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from erllama.testing.bert import write_encoder

# The parts of a layer and of the embeddings, by their names in transformers and in GGUF.
_PARTS = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
    "word_embeddings": "token_embd",
    "position_embeddings": "position_embd",
    "token_type_embeddings": "token_types",
    "LayerNorm": "token_embd_norm",
}


def gguf_name(name: str) -> str | None:
    """Return the GGUF name of a weight of transformers' BertModel.

    None for weights that GGUF omits: the pooler, which sentence embeddings skip, and the list of position ids.
    """
    stem, _, kind = name.rpartition(".")
    if stem.startswith("embeddings."):
        return f"{_PARTS[stem.removeprefix('embeddings.')]}.{kind}"
    if stem.startswith("encoder.layer."):
        layer, _, part = stem.removeprefix("encoder.layer.").partition(".")
        return f"blk.{layer}.{_PARTS[part]}.{kind}"
    if stem in ("pooler.dense", "embeddings"):
        return None
    raise ValueError(f"{name!r} is not a weight of BertModel")


def convert(directory: Path, path: Path) -> Path:
    """Write the model of `directory` to `path`, which appears only when it is complete. Returns `path`.

    Raises:
        ValueError: the model is not a BertModel with GELU and absolute positions.
    """
    config = json.loads((directory / "config.json").read_text())
    for name, expected in (("model_type", "bert"), ("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if config[name] != expected:
            raise ValueError(f"{name} is {config[name]!r}; only {expected!r} can be converted")
    weights = {}
    for name, values in load_file(directory / "model.safetensors").items():
        if (renamed := gguf_name(name)) is not None:
            weights[renamed] = values.astype(np.float32)
    words = (directory / "vocab.txt").read_text(encoding="utf-8").splitlines()
    return write_encoder(
        path,
        weights,
        words,
        n_head=config["num_attention_heads"],
        pooling="mean",
        epsilon=config["layer_norm_eps"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.bert_to_gguf", description="Convert a BERT to GGUF.")
    parser.add_argument("directory", type=Path, help="directory with model.safetensors, config.json and vocab.txt")
    parser.add_argument("path", type=Path, help="GGUF file to write")
    options = parser.parse_args()
    print(convert(options.directory, options.path))


if __name__ == "__main__":
    main()
