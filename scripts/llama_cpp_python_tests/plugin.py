"""A pytest plugin that runs llama-cpp-python's tests on `erllama.llama_cpp` and on the models of this machine.

`llama_cpp` is the drop-in. The models that the tests download are replaced: those that generate text by a real
model, the encoder by a real one, and the recurrent and the hybrid one by generated models. Some tests read internal
attributes of `Llama`; the plugin adds them. Tests that do not apply are expected to fail, each with a reason.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import huggingface_hub
import pytest

import erllama
import erllama.llama_cpp
from erllama.testing.models import write_lfm2, write_mamba
from scripts.llama_cpp_python_tests.exceptions import reason
from scripts.real_models import fetched_models

FOLDER = Path(os.environ["ERLLAMA_LLAMA_CPP_PYTHON_TESTS"])


def _architecture(llama: erllama.llama_cpp.Llama) -> str:
    return llama.erllama_model.info.architecture


def _model_file(repo_id: str, filename: str, **_: object) -> str:
    """Return the model that takes the place of one on the hub."""
    text = {path.stem.split("-")[0]: path for path in fetched_models(generate=True)}
    if "bge" in filename:
        return str(fetched_models(generate=False)[0])
    if "mamba" in filename:
        return str(write_mamba(FOLDER / "mamba.gguf"))
    if "Falcon" in filename:
        return str(write_lfm2(FOLDER / "lfm2.gguf"))
    return str(text["gemma"])  # its replies to the prompts of the tests are those that the tests expect


def pytest_configure() -> None:
    erllama.llama_cpp.install()
    # The tests import this module; only a test that does not apply uses it.
    internals = sys.modules["llama_cpp._internals"] = ModuleType("llama_cpp._internals")
    erllama.llama_cpp._internals = internals  # type: ignore[attr-defined]
    huggingface_hub.hf_hub_download = _model_file
    llama = erllama.llama_cpp.Llama
    llama._ctx = SimpleNamespace(ctx=object())  # type: ignore[attr-defined]
    llama._is_recurrent = property(lambda self: _architecture(self) == "mamba")  # type: ignore[attr-defined]
    llama._is_hybrid = property(lambda self: _architecture(self) == "lfm2")  # type: ignore[attr-defined]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        why = reason(item.name)
        if why is not None:
            item.add_marker(pytest.mark.xfail(reason=why, strict=True))
