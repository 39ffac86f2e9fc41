"""A trained encoder, all-MiniLM-L6-v2: its tokens and vectors are those of the reference, and have its meaning.

The tests skip where `make real-models` has not fetched the model. They take some seconds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

import erllama
from support.paths import ROOT

sys.path.append(str(ROOT))

from scripts.real_models import MODELS, models_directory

_MINILM = next(model for model in MODELS if model.name == "minilm")
PATH = models_directory() / _MINILM.gguf
SOURCE = (models_directory() / _MINILM.files[0].path).parent
SENTENCES = [
    "The cat sits on the mat.",
    "A kitten is resting on a rug.",
    "Stock markets fell sharply on Tuesday.",
    "Café Ångström, naïve — déjà-vu?! 東京 $12.50",
    "unbelievably hyperparameterization " * 9,
    "x",
]
# The reference computes in float64. libllama computes in float32, with a table of GELU in half precision, whose
# entries are 2**-11 of their value apart. Components of these vectors of length 1 differed by up to 3.4e-4.
TOLERANCE = 1e-3

pytestmark = pytest.mark.skipif(not PATH.is_file(), reason="`make real-models` fetches the model")


@pytest.fixture(scope="module")
def model() -> Iterator[erllama.Model]:
    with erllama.load_model(PATH, n_threads=1) as found:
        yield found


class Reference(NamedTuple):
    """The model as transformers stores it: weights in float64 by their names, and the configuration."""

    weights: dict[str, NDArray[np.float64]]
    config: dict[str, int]


@pytest.fixture(scope="module")
def reference() -> Reference:
    from safetensors.numpy import load_file

    weights = load_file(SOURCE / "model.safetensors")
    return Reference(
        {name: values.astype(np.float64) for name, values in weights.items() if values.dtype == np.float32},
        json.loads((SOURCE / "config.json").read_text()),
    )


def gelu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return GELU, with the error function of Abramowitz and Stegun, 7.1.26, which is exact to 1.5e-7."""
    z = np.abs(x) / 2**0.5
    t = 1 / (1 + 0.3275911 * z)
    series = t * np.polyval([1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592], t)
    return x * 0.5 * (1 + np.sign(x) * (1 - series * np.exp(-z * z)))


def forward(reference: Reference, ids: list[int]) -> NDArray[np.float64]:
    """Compute BERT's forward pass, from its paper: the outputs of the last layer, shape (tokens, n_embd)."""
    w, config = reference

    def norm(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config["layer_norm_eps"])
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    n, n_head = len(ids), config["num_attention_heads"]
    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][:n]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for layer in range(config["num_hidden_layers"]):
        block = f"encoder.layer.{layer}"
        q, k, v = (
            linear(x, f"{block}.attention.self.{name}").reshape(n, n_head, -1).transpose(1, 0, 2)
            for name in ("query", "key", "value")
        )
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(n, -1)
        x = norm(x + linear(mixed, f"{block}.attention.output.dense"), f"{block}.attention.output.LayerNorm")
        inner = gelu(linear(x, f"{block}.intermediate.dense"))
        x = norm(x + linear(inner, f"{block}.output.dense"), f"{block}.output.LayerNorm")
    return x


def test_texts_have_the_tokens_of_the_reference(model: erllama.Model) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(SOURCE / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for sentence in SENTENCES:
        assert model.tokenize(sentence).tolist() == tokenizer.encode(sentence).ids


def test_embeddings_are_those_of_the_reference(model: erllama.Model, reference: Reference) -> None:
    found = model.embed(SENTENCES)
    for sentence, row in zip(SENTENCES, found, strict=True):
        mean = forward(reference, model.tokenize(sentence).tolist()).mean(axis=0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), rtol=0, atol=TOLERANCE, err_msg=sentence)


def test_token_embeddings_are_those_of_the_reference(model: erllama.Model, reference: Reference) -> None:
    (found,) = model.embed(SENTENCES[:1], pooling="none", normalize=False)
    expected = forward(reference, model.tokenize(SENTENCES[0]).tolist())
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_a_vector_does_not_depend_on_other_texts_of_the_call(model: erllama.Model) -> None:
    together = model.embed(SENTENCES * 3)
    for at, row in enumerate(together):
        np.testing.assert_allclose(row, model.embed(SENTENCES[at % len(SENTENCES)])[0], rtol=0, atol=TOLERANCE)


RELATED = [
    ("A man is playing a guitar on stage.", "A musician performs a song with his guitar."),
    ("How do I reset my password?", "I forgot my login and need a new password."),
    ("The recipe needs two eggs and some flour.", "Mix flour with eggs to make the dough."),
    ("The rocket was launched into orbit this morning.", "A spacecraft lifted off at dawn."),
]


def test_related_texts_are_closer_than_unrelated_ones(model: erllama.Model) -> None:
    firsts, seconds = (model.embed([pair[at] for pair in RELATED]) for at in (0, 1))
    similarity = firsts @ seconds.T
    assert similarity.argmax(axis=1).tolist() == [0, 1, 2, 3]
    related = similarity.diagonal().min()
    unrelated = similarity[~np.eye(len(RELATED), dtype=bool)].max()
    assert related > 0.5 > 0.2 > unrelated
