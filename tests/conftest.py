"""Models and directories for the tests; everything is generated, nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import erllama
from erllama.testing.models import TINY, write_llama

settings.register_profile(
    "suite", deadline=None, derandomize=True, print_blob=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "tiny.gguf", TINY, seed=1)


@pytest.fixture
def tiny(tiny_gguf: Path) -> Iterator[erllama.Model]:
    with erllama.Cache() as cache, erllama.load_model(tiny_gguf, cache=cache, n_ctx=1024, n_threads=2) as model:
        yield model


@pytest.fixture(autouse=True)
def nothing_left_loaded() -> Iterator[None]:
    before = erllama.list_models()
    yield
    left = [model for model in erllama.list_models() if model not in before]
    for model in left:
        model.unload()
    assert not left, f"a test left models loaded: {left}"
