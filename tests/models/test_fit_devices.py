"""With GPUs, the memory of those that hold the layers bounds the context of n_ctx="fit"."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import erllama
from erllama.engine.backends import llama_options
from erllama.engine.backends.llama_library import llama_ffi
from erllama.engine.backends.memory_estimate import estimate_memory
from erllama.models import Fit, fit, fit_model
from erllama.testing.models import SMALL, write_llama
from support.cli import Command

MIB = 1 << 20
RAM = 1000 * MIB


def gpu(name: str, free: int, id: str = "", server: str = "", kind: str = "gpu") -> llama_ffi.Device:
    return llama_ffi.Device(name, "a device", kind, free * MIB, 2000 * MIB, id, server)


CPU = gpu("CPU", 1000, kind="cpu")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of 20 MiB, whose context of 32,768 tokens takes 384 MiB; 1000 MiB of the machine are free."""
    monkeypatch.setattr("erllama.models.fit.available_memory", lambda: RAM)
    return write_llama(tmp_path / "model.gguf", SMALL, quantization="Q4_0")


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the devices of the machine beside the CPU."""
    return lambda *devices: monkeypatch.setattr(llama_options, "devices", lambda: [*devices, CPU])


def assert_bounded(found: Fit, mebibytes: float) -> None:
    """Check that a context is the largest one within nine tenths of some memory."""
    limit = 0.9 * mebibytes * MIB
    n_ctx = found.estimate.n_ctx
    assert found.estimate.total <= limit
    assert n_ctx == found.largest_n_ctx["f16"] < 32768
    step = found.estimate.kv / n_ctx * 256
    assert found.estimate.total + 2 * step > limit, "a step more does not fit"


def test_all_layers_on_a_gpu_are_bounded_by_its_memory(model: Path, has: Callable[..., None]) -> None:
    has(gpu("CUDA0", 150))
    for options in ({}, {"n_gpu_layers": 99}, {"devices": ["CUDA0"]}):
        assert_bounded(fit_model(model, n_ctx="fit", **options), 150)
    found = fit_model(model, n_ctx="fit")
    assert found.free == RAM + 150 * MIB
    assert fit.fitting_n_ctx(model, {}) == found.estimate.n_ctx
    assert fit_model(model, n_ctx="fit", n_gpu_layers=0).estimate.n_ctx == 32768, "the machine's memory holds all"


def test_the_context_is_bounded_by_the_chosen_gpus(model: Path, has: Callable[..., None]) -> None:
    has(gpu("CUDA0", 100), gpu("CUDA1", 140))
    assert_bounded(fit_model(model, n_ctx="fit"), 240)
    assert_bounded(fit_model(model, n_ctx="fit", devices=["CUDA1"]), 140)
    assert_bounded(fit_model(model, n_ctx="fit", split_mode="none"), 100)
    assert_bounded(fit_model(model, n_ctx="fit", split_mode="none", main_gpu=1), 140)
    assert_bounded(fit_model(model, n_ctx="fit", tensor_split=[1, 3]), 140 * 4 / 3)
    with pytest.raises(erllama.OptionError, match="did you mean"):
        fit_model(model, devices=["CUDA7"])


def test_only_devices_that_the_model_uses_count(model: Path, has: Callable[..., None]) -> None:
    """Not the second driver of a card, not the servers of other models, and not a memory twice."""
    has(
        gpu("CUDA0", 100, "0000:01:00.0"),
        gpu("Vulkan0", 100, "0000:01:00.0"),
        gpu("RPC0", 500, server="10.0.0.2:50052"),
        gpu("iGPU", 900, kind="igpu"),
    )
    assert fit.free_memory({}) == RAM + 100 * MIB
    assert_bounded(fit_model(model, n_ctx="fit"), 100)
    has(gpu("RPC0", 500, server="10.0.0.2:50052"))
    assert fit.free_memory({}) == RAM
    assert estimate_memory(model, {}) == estimate_memory(model, {"n_gpu_layers": 0}), "the CPU has all layers"
    has(gpu("MTL0", 150))
    assert fit.free_memory({}) == RAM, "an Apple GPU uses the machine's memory"
    assert_bounded(fit_model(model, n_ctx="fit"), 150)
    has(gpu("iGPU", 150, kind="igpu"))
    assert fit.free_memory({}) == RAM


def test_fit_is_refused_if_the_split_is_unknown(model: Path, has: Callable[..., None]) -> None:
    has(gpu("CUDA0", 150))
    with pytest.raises(erllama.OptionError, match='n_ctx="fit" with a part of the layers on GPUs'):
        erllama.load_model(model, n_ctx="fit", n_gpu_layers=1)
    found = fit_model(model, n_ctx=512, n_gpu_layers=1)
    assert (found.largest_n_ctx, found.fits) == ({}, True)
    has(llama_ffi.Device("CUDA0", "of a driver that reports no memory", "gpu", 0, 0))
    with pytest.raises(erllama.OptionError, match="that do not report their memory"):
        fit_model(model, n_ctx="fit")


def test_the_command_says_what_is_unknown(
    model: Path,
    has: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    has(gpu("CUDA0", 150))
    done = Command(tmp_path, monkeypatch, capsys)("fit", model, "--load", "n_gpu_layers=1")
    assert "unknown: GPUs hold some of the layers" in done.out
