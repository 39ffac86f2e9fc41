"""The memory that libllama reports for a loaded model, and its comparison with an estimate."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import erllama
from erllama.engine.backends.memory_estimate import MemoryEstimate

_TOLERANCE = 0.05
_REPORTED = 11_000  # bytes; libllama reports each buffer to a hundredth of a MiB
ROUNDING = 6 * _REPORTED  # of all buffers of a model, which matters for models of a megabyte


def reported(path: Path, options: dict[str, object]) -> tuple[Counter[str], int]:
    """Return the bytes of the buffers of a loaded model by purpose, and the size of its context."""
    with (
        erllama.Cache(ram=0) as none,
        erllama.load_model(path, cache=none, n_threads=1, **options) as model,  # type: ignore[arg-type]
    ):
        found: Counter[str] = Counter()
        for buffer in model.info.buffers:
            found[buffer.holds] += buffer.n_bytes
        return found, model.n_ctx


def check(estimate: MemoryEstimate, buffers: Counter[str], n_ctx: int) -> None:
    """Check an estimate against what libllama reports after loading."""
    assert estimate.n_ctx == n_ctx
    assert estimate.weights + estimate.mapped == pytest.approx(buffers["weights"], abs=ROUNDING)
    assert estimate.kv == pytest.approx(buffers["kv"], abs=2 * _REPORTED)
    assert estimate.state == pytest.approx(buffers["state"], abs=2 * _REPORTED)
    tolerance = max(_TOLERANCE * buffers.total(), ROUNDING)
    assert estimate.allocated == pytest.approx(buffers.total(), abs=tolerance)
