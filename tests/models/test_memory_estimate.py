"""The estimate of a model's memory, from the header of its file, agrees with what libllama reports later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import erllama
from erllama.engine.backends.memory_estimate import estimate_memory
from erllama.testing.bert import write_bert
from erllama.testing.models import SMALL, LlamaShape, write_gemma3, write_lfm2, write_llama, write_mamba

# libllama reports buffers to a hundredth of a MiB, which matters for models of a megabyte.
_TOLERANCE = 0.25
_REPORTED = 11_000  # bytes, of one buffer

WIDE_VOCABULARY = LlamaShape(n_layer=2, n_embd=64, n_ff=128, n_head=2, n_head_kv=1, n_vocab=32000)
MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": write_llama,
    "small llama": lambda path: write_llama(path, SMALL),
    "quantized llama": lambda path: write_llama(path, SMALL, quantization="Q8_0"),
    "wide vocabulary": lambda path: write_llama(path, WIDE_VOCABULARY),
    "sliding window": write_gemma3,
    "recurrent": write_mamba,
    "hybrid": write_lfm2,
}


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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_ctx": 9000, "n_seq_max": 2},
        {"n_ctx": 2048, "n_ubatch": 128, "n_seq_max": 8},
        {"n_ctx": 4096, "swa_full": True, "flash_attn": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", MODELS)
def test_the_estimate_agrees_with_what_is_reported(tmp_path: Path, name: str, options: dict[str, object]) -> None:
    path = MODELS[name](tmp_path / "model.gguf")
    estimate = estimate_memory(path, options)
    buffers, n_ctx = reported(path, options)
    assert estimate.n_ctx == n_ctx
    assert estimate.kv == pytest.approx(buffers["kv"], abs=2 * _REPORTED)
    assert estimate.state == pytest.approx(buffers["state"], abs=2 * _REPORTED)
    assert estimate.total == pytest.approx(buffers.total(), rel=_TOLERANCE)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "f32"])
def test_the_types_of_cells_count(tmp_path: Path, kind: str) -> None:
    path = write_llama(tmp_path / "model.gguf", SMALL)
    options = {"n_ctx": 4096, "kv_type_k": kind, "kv_type_v": kind, "flash_attn": True}
    buffers, _ = reported(path, options)
    assert estimate_memory(path, options).kv == pytest.approx(buffers["kv"], abs=2 * _REPORTED)


def test_a_model_that_only_encodes_has_no_kv(tmp_path: Path) -> None:
    path = write_bert(tmp_path / "bert.gguf")
    estimate = estimate_memory(path, {})
    buffers, _ = reported(path, {})
    assert (estimate.kv, estimate.state) == (0, 0)
    assert estimate.total == pytest.approx(buffers.total(), rel=0.5)


def test_overrides_count(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model.gguf")
    assert estimate_memory(path, {"overrides": {"llama.context_length": 512}}).n_ctx == 512
    assert estimate_memory(path, {"n_ctx": 1}).n_ctx == 256


def test_a_file_that_is_not_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model")
    (tmp_path / "short.gguf").write_bytes(b"GGUF" + b"\3\0\0\0" + b"\xff" * 8)
    for name in ("missing.gguf", "text.gguf", "short.gguf"):
        with pytest.raises(erllama.ModelLoadError, match=name):
            estimate_memory(tmp_path / name, {})
