"""Models and directories for the tests; everything is generated, nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import erllama
from erllama.testing.models import TINY, write_llama, write_lora

# Models with several threads, here and in child processes, wait for each other asleep: a thread that spins while
# the other one waits for a core makes a decode hundreds of times slower beside busy processes. libgomp reads this
# when it is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

settings.register_profile(
    "suite", deadline=None, derandomize=True, print_blob=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "tiny.gguf", TINY, seed=1)


@pytest.fixture
def tiny(tiny_gguf: Path) -> Iterator[erllama.Model]:
    with erllama.Cache() as cache, erllama.load_model(tiny_gguf, cache=cache, n_ctx=1024, n_threads=1) as model:
        yield model


@pytest.fixture(scope="session")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four adapters for the tiny model: of all weights, of some, and of embeddings and output."""
    place = tmp_path_factory.mktemp("adapters")
    return [
        write_lora(place / "all.gguf", seed=1),
        write_lora(place / "wide.gguf", seed=2, rank=16, alpha=4.0),
        write_lora(place / "attention.gguf", seed=3, weights=("attn_q", "attn_v"), gain=2.0),
        write_lora(place / "ends.gguf", seed=4, weights=("token_embd", "output")),
    ]


@pytest.fixture
def stub_adapters(tmp_path: Path) -> list[Path]:
    """Adapters for stubs."""
    paths = [tmp_path / f"{name}.bin" for name in "abcd"]
    for path in paths:
        path.write_bytes(b"adapter " + path.name.encode())
    return paths


@pytest.fixture(autouse=True)
def nothing_left_loaded() -> Iterator[None]:
    before = erllama.list_models()
    yield
    left = [model for model in erllama.list_models() if model not in before]
    for model in left:
        model.unload()
    assert not left, f"a test left models loaded: {left}"
