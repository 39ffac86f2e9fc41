"""Real models with generated LoRA adapters: replies change with them, and their KV is cached apart.

`make test-models` runs this file on the models that `make real-models` fetches.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import erllama
from erllama.testing.models import LlamaShape, write_lora
from support.adapters import logprob_distance
from support.real_models import BLOCK, GREEDY, load, model_parameters, small_blocks, text_prompt

N_PROMPT = BLOCK + 30


@pytest.fixture(scope="module", params=model_parameters())
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


@pytest.fixture(scope="module")
def adapter(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the feed-forward weights, which have the same names and sizes in most architectures."""
    with erllama.load_model(path, vocab_only=True) as model:
        about = dict(model.metadata)
    kind = str(about["general.architecture"])

    def size(name: str) -> int:
        found = about[f"{kind}.{name}"]
        if not isinstance(found, int):
            pytest.skip(f"{name} differs by layer: {found}")
        return found

    shape = LlamaShape(size("block_count"), size("embedding_length"), size("feed_forward_length"), 1, 1)
    folder = tmp_path_factory.mktemp("adapter")
    weights = ("ffn_gate", "ffn_up", "ffn_down")
    return write_lora(folder / "ffn.gguf", shape, architecture=kind, weights=weights, gain=0.5, seed=1)


@pytest.fixture
def model(path: Path) -> Iterator[erllama.Model]:
    with small_blocks() as cache, load(path, cache) as found:
        yield found


def complete(model: erllama.Model, **options: object) -> erllama.Completion:
    prompt = text_prompt(model, N_PROMPT)
    return model.complete(prompt, max_tokens=4, logprobs=20, **GREEDY, **options)  # type: ignore[arg-type]


def test_an_adapters_replies_are_cached_apart(model: erllama.Model, adapter: Path) -> None:
    plain = complete(model)
    loaded = model.load_adapter(adapter, scale=0.5)
    cold = complete(model)
    assert cold.cache.kind == "cold", "KV of the model alone is not used"
    assert logprob_distance(cold.logprobs, plain.logprobs) > 0.5
    model.evict()
    warm = complete(model)
    assert (warm.cache.kind, warm.cache.tier) == ("exact", "ram")
    assert (warm.tokens, warm.logprobs) == (cold.tokens, cold.logprobs)
    loaded.scale = 1.0
    assert complete(model).cache.kind == "cold", "another scale has other KV"
    loaded.unload()
    again = complete(model, reproducible=True)
    assert again.cache.kind == "exact"
    assert (again.tokens, again.logprobs) == (plain.tokens, plain.logprobs)
