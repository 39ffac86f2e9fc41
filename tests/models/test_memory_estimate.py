"""The estimate of a model's memory, from the header of its file, agrees with what libllama reports later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import erllama
from erllama.engine.backends.llama_library import llama_ffi
from erllama.engine.backends.memory_estimate import ModelHeader, estimate_memory
from erllama.engine.backends.repacked_weights import weight_sizes
from erllama.testing.bert import write_bert
from erllama.testing.models import SMALL, LlamaShape, write_gemma3, write_lfm2, write_llama, write_mamba
from support.memory_reports import ROUNDING, check, reported

# Its output matrix is repacked by other rules than the others on a processor with AMX.
FOUR_BITS = LlamaShape(n_layer=4, n_embd=512, n_ff=2048, n_head=16, n_head_kv=16, n_vocab=2000)
WIDE_VOCABULARY = LlamaShape(n_layer=2, n_embd=64, n_ff=128, n_head=2, n_head_kv=1, n_vocab=32000)
MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": write_llama,
    "small llama": lambda path: write_llama(path, SMALL),
    "quantized llama": lambda path: write_llama(path, SMALL, quantization="Q8_0"),
    "llama of four bits": lambda path: write_llama(path, FOUR_BITS, quantization="Q4_0"),
    "llama of half precision": lambda path: write_llama(path, SMALL, quantization="F16"),
    "wide vocabulary": lambda path: write_llama(path, WIDE_VOCABULARY),
    "sliding window": write_gemma3,
    "recurrent": write_mamba,
    "hybrid": write_lfm2,
}


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
    check(estimate, buffers, n_ctx)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "f32"])
def test_the_types_of_cells_count(tmp_path: Path, kind: str) -> None:
    path = write_llama(tmp_path / "model.gguf", SMALL)
    options = {"n_ctx": 4096, "kv_type_k": kind, "kv_type_v": kind, "flash_attn": True}
    check(estimate_memory(path, options), *reported(path, options))


def test_without_mmap_nothing_is_mapped(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model.gguf", SMALL, quantization="Q4_0")
    options: dict[str, object] = {"mmap": False}
    estimate = estimate_memory(path, options)
    assert estimate.mapped == 0
    check(estimate, *reported(path, options))


@pytest.mark.parametrize(
    ("features", "copied"),
    [
        ((), {}),
        (("REPACK",), {}),
        (("AVX2", "REPACK"), {"q4_0": 64 * 18, "q4_K": 2 * 64 * 144}),
        (("MATMUL_INT8", "REPACK"), {"q4_0": 64 * 18, "q4_K": 2 * 64 * 144, "q8_0": 64 * 34}),
        (
            ("AMX_INT8", "AVX512_VNNI"),
            {"q4_0": 64 * 18, "q4_K": 2 * 64 * 148, "q8_0": 64 * 38, "f16": 64 * 64},
        ),
    ],
    ids=str,
)
def test_the_processor_decides_what_is_repacked(features: tuple[str, ...], copied: dict[str, int]) -> None:
    """A matrix of 64 rows of each type, and tables and vectors, which are never repacked."""
    shapes = {"q4_0": (32, 18), "q8_0": (32, 34), "f16": (32, 64), "q4_K": (512, 288), "f32": (32, 128)}
    tensors = [
        llama_ffi.Tensor(f"blk.0.{kind}.weight", 0, 64 * row, llama_ffi.ggml_type(kind), (columns, 64, 1, 1))
        for kind, (columns, row) in shapes.items()
    ]
    plain = sum(tensor.n_bytes for tensor in tensors)
    n_file = sum(tensor.n_bytes for tensor in tensors for kind in copied if f".{kind}." in tensor.name)
    table = llama_ffi.Tensor("token_embd.weight", 0, 64 * 18, llama_ffi.ggml_type("q4_0"), (32, 64, 1, 1))
    vector = llama_ffi.Tensor("output_norm.weight", 0, 18, llama_ffi.ggml_type("q4_0"), (32, 1, 1, 1))
    found = weight_sizes([[*tensors, table, vector]], mmap=False, is_tied=False, features=frozenset(features))
    assert found.needed == plain - n_file + sum(copied.values()) + 64 * 18 + 18
    tied = weight_sizes([[*tensors, table, vector]], mmap=False, is_tied=True, features=frozenset(features))
    assert tied.needed == found.needed + copied.get("q4_0", 0), "a table that is the output, too, is copied"


def test_a_model_that_only_encodes_has_no_kv(tmp_path: Path) -> None:
    path = write_bert(tmp_path / "bert.gguf")
    estimate = estimate_memory(path, {})
    buffers, _ = reported(path, {})
    assert (estimate.kv, estimate.state) == (0, 0)
    assert estimate.allocated == pytest.approx(buffers.total(), abs=ROUNDING)


@pytest.mark.parametrize(
    ("architecture", "stated", "window", "n_whole"),
    [
        ("llama4", None, 8192, 3),
        ("llama4", 0, 0, 12),
        ("exaone-moe", None, 128, 3),
        ("plamo3", 512, 512, 1),
        ("phi3", 512, 512, 12),
        ("llama", None, 0, 12),
    ],
)
def test_windows_are_those_of_the_architecture(
    tmp_path: Path, architecture: str, stated: int | None, window: int, n_whole: int
) -> None:
    n_ctx, n_ubatch = 1 << 16, 512
    header = as_architecture(write_llama(tmp_path / "model.gguf", SMALL), architecture)
    if stated is not None:
        header.metadata = {**header.metadata, f"{architecture}.attention.sliding_window": stated}
    estimate = header.estimate({"n_ctx": n_ctx, "n_seq_max": 1})
    in_window = -(-(2 * window + n_ubatch) // 256) * 256  # of a request, and of the sequence that moves blocks
    cells = n_whole * n_ctx + (12 - n_whole) * in_window
    assert estimate.kv == cells * 4 * 64 * 2 * 2, "KV heads, their width, keys and values, bytes"


def test_windows_of_unknown_layers_need_no_free_memory(tmp_path: Path) -> None:
    """Without a pattern, all layers count as seeing the whole context, but a load is not refused for it."""
    header = as_architecture(write_llama(tmp_path / "model.gguf", SMALL), "new")
    options = {"n_ctx": 1 << 16, "mmap": False}
    plain = header.estimate(options)
    header.metadata = {**header.metadata, "new.attention.sliding_window": 512}
    found = header.estimate(options)
    assert found.kv == plain.kv
    assert plain.spare == 0
    assert found.spare > 0.9 * found.kv


def test_latent_attention_has_no_values(tmp_path: Path) -> None:
    header = as_architecture(write_llama(tmp_path / "model.gguf", SMALL), "deepseek2")
    with_values = header.estimate({}).kv
    header.metadata = {
        **header.metadata,
        "deepseek2.attention.key_length_mla": 32,
        "deepseek2.attention.value_length_mla": 32,
    }
    assert header.estimate({}).kv == with_values // 2


def as_architecture(path: Path, architecture: str) -> ModelHeader:
    """Return the header of a llama model as that of another architecture."""
    header = ModelHeader(path)
    renamed = {key.replace("llama.", f"{architecture}."): value for key, value in header.metadata.items()}
    header.metadata = {**renamed, "general.architecture": architecture}
    return header


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
