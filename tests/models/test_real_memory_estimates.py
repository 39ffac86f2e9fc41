"""The estimates of the memory of real models agree within 5 % with what libllama reports after loading.

`make test-models` runs this file on the models that `make real-models` fetches.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from erllama.engine.backends.memory_estimate import estimate_memory
from support.memory_reports import check, reported
from support.real_models import model_parameters

OPTIONS: list[dict[str, object]] = [
    {},
    {"n_ctx": 512, "n_seq_max": 1},
    {"n_ctx": 16384, "kv_type_k": "q8_0", "kv_type_v": "q8_0", "flash_attn": True},
    {"n_ctx": 8192, "kv_type_k": "q4_0", "kv_type_v": "q4_0", "flash_attn": True, "n_ubatch": 128},
    {"n_ctx": 4096, "flash_attn": False, "n_ubatch": 256},
    {"n_ctx": 2048, "n_seq_max": 16, "mmap": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("model_file", model_parameters())
def test_the_estimate_of_a_real_model_agrees(model_file: Path, options: dict[str, object]) -> None:
    check(estimate_memory(model_file, options), *reported(model_file, options))
