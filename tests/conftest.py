"""Fixtures of all tests: generated models and adapters, and a check that each test unloads its models."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import erllama
import support.encrypted_caches  # noqa: F401 - encrypts all caches where ERLLAMA_TEST_KEY_FILE is set
from erllama.testing.models import TINY, write_llama, write_lora
from support.examples import examples

# For a libllama with OpenMP, such as one of the user's own checkout: its threads wait for each other asleep, here
# and in child processes. A thread that spins while the other one waits for a core makes a decode hundreds of times
# slower beside busy processes. libgomp reads this variable when it is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

# Python writes compiled files here and in child processes, whatever the user's environment says: hundreds of child
# processes import erllama, and each would compile its sources again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

settings.register_profile(
    "suite",
    max_examples=examples(40),
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("suite")


def pytest_collection_finish() -> None:
    """Leave what the collection of the tests made out of later garbage collections: millions of objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def models_on_rpc() -> Iterator[None]:
    """With ERLLAMA_TEST_RPC=1, put the layers and the KV of all models on an RPC server, in its memory."""
    if os.environ.get("ERLLAMA_TEST_RPC") != "1":
        yield
        return
    from support.rpc import all_models_on, rpc_server

    with rpc_server() as server, all_models_on(server):
        yield


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama model with random weights, written once per run."""
    return write_llama(tmp_path_factory.mktemp("models") / "tiny.gguf", TINY, seed=1)


@pytest.fixture
def tiny(tiny_gguf: Path) -> Iterator[erllama.Model]:
    """The tiny model, loaded on libllama with a context of 1024 tokens and an in-memory cache of its own."""
    with erllama.Cache() as cache, erllama.load_model(tiny_gguf, cache=cache, n_ctx=1024, n_threads=1) as model:
        yield model


@pytest.fixture(scope="session")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four LoRA adapters for the tiny model: two of all weights, one of attention, one of embeddings and output."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        write_lora(folder / "all.gguf", seed=1),
        write_lora(folder / "wide.gguf", seed=2, rank=16, alpha=4.0),
        write_lora(folder / "attention.gguf", seed=3, weights=("attn_q", "attn_v"), gain=2.0),
        write_lora(folder / "ends.gguf", seed=4, weights=("token_embd", "output")),
    ]


@pytest.fixture
def stub_adapters(tmp_path: Path) -> list[Path]:
    """Four adapter files for stub backends, named a.bin to d.bin."""
    paths = [tmp_path / f"{name}.bin" for name in "abcd"]
    for path in paths:
        path.write_bytes(b"adapter " + path.name.encode())
    return paths


@pytest.fixture(autouse=True)
def no_model_stays_loaded() -> Iterator[None]:
    """Fail a test that leaves a model loaded, and unload the model, so that later tests do not see it."""
    before = erllama.list_models()
    yield
    leaked = [model for model in erllama.list_models() if model not in before]
    for model in leaked:
        model.unload()
    assert not leaked, f"the test left models loaded: {leaked}"
