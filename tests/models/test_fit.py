"""A model that cannot fit the free memory is refused with figures and ways out; n_ctx="fit" takes what fits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import erllama
from erllama.cache.pressure.memory import available_memory
from erllama.engine.backends.memory_estimate import ModelHeader, estimate_memory
from erllama.models import fit, fit_model
from erllama.testing.bert import write_bert
from erllama.testing.models import SMALL, write_gemma3, write_llama
from support.cli import Command

MIB = 1 << 20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of 20 MiB, whose context of 32,768 tokens takes 384 MiB."""
    return write_llama(tmp_path / "model.gguf", SMALL, quantization="Q4_0")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the free memory, in bytes."""

    def set_free(n_bytes: int) -> None:
        monkeypatch.setattr("erllama.models.fit.available_memory", lambda: n_bytes)

    return set_free


def test_a_model_that_fits_is_loaded(model: Path, free: Callable[[int], None]) -> None:
    free(estimate_memory(model, {"n_ctx": 512}).least)
    erllama.load_model(model, n_ctx=512, n_threads=1).unload()


def test_a_model_that_does_not_fit_is_refused(model: Path, free: Callable[[int], None]) -> None:
    free(estimate_memory(model, {"n_ctx": 16384}).least - 1)
    with pytest.raises(erllama.MemoryLimitExceeded, match=r"model\.gguf needs about .* are free") as caught:
        erllama.load_model(model, n_ctx=16384, n_threads=1)
    error = caught.value
    assert error.n_bytes == estimate_memory(model, {"n_ctx": 16384}).least == error.limit + 1
    assert not fit_model(model, n_ctx=16384).fits
    assert fit_model(model, n_ctx=512).fits
    parts = ("weights ", "context of 16384 tokens ", "computing ", "must be free")
    assert all(part in str(error) for part in parts)
    assert "check_memory=False" in str(error)


def test_mapped_weights_need_no_free_memory(tmp_path: Path, free: Callable[[int], None]) -> None:
    """The kernel drops them and reads them again: a model may be larger than the memory, or be in /dev/shm."""
    model = write_llama(tmp_path / "model.gguf", SMALL)  # f32, which libllama does not copy
    estimate = estimate_memory(model, {"n_ctx": 256})
    table_and_all = sum(tensor.n_bytes for file in ModelHeader(model).files for tensor in file)
    assert estimate.least == estimate.total - table_and_all
    for options in ({"mmap": False}, {"mlock": True}):
        assert estimate_memory(model, {"n_ctx": 256, **options}).spare == 0
    free(estimate.least)
    assert fit_model(model, n_ctx=256).fits
    erllama.load_model(model, n_ctx=256, n_threads=1).unload()
    with pytest.raises(erllama.MemoryLimitExceeded, match="Or pass a number of tokens"):
        erllama.load_model(model, n_ctx="fit")


def test_the_ways_out_are_such(model: Path, free: Callable[[int], None]) -> None:
    """What the error advises is loaded."""
    free(200 * MIB)
    with pytest.raises(erllama.MemoryLimitExceeded) as caught:
        erllama.load_model(model, n_ctx=32768)
    smaller = int(re.search(r"use n_ctx=(\d+), which fits", str(caught.value))[1])  # type: ignore[index]
    other = re.search(r'or kv_type_k="(\w+)" and kv_type_v="(\w+)" with n_ctx=(\d+)', str(caught.value))
    assert other is not None
    erllama.load_model(model, n_ctx=smaller, n_threads=1).unload()
    assert int(other[3]) > smaller
    erllama.load_model(model, n_ctx=int(other[3]), kv_type_k=other[1], kv_type_v=other[2], n_threads=1).unload()


def test_a_model_larger_than_the_memory_has_other_ways_out(model: Path, free: Callable[[int], None]) -> None:
    free(MIB)
    for n_ctx in (512, "fit"):
        with pytest.raises(erllama.MemoryLimitExceeded, match="use a smaller model, or one with a smaller quant"):
            erllama.load_model(model, n_ctx=n_ctx)


def test_the_check_can_be_left_out(model: Path, free: Callable[[int], None]) -> None:
    free(0)
    erllama.load_model(model, n_ctx=256, check_memory=False, n_threads=1).unload()
    with pytest.raises(erllama.OptionError, match="check_memory must be True or False"):
        erllama.load_model(model, check_memory="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("process", [False, True])
def test_fit_takes_the_largest_context(model: Path, free: Callable[[int], None], process: bool) -> None:
    free(150 * MIB)
    with erllama.load_model(model, n_ctx="fit", n_threads=1, process=process) as loaded:
        n_ctx = loaded.n_ctx
    assert 256 <= n_ctx < 32768
    limit = int(0.9 * 150 * MIB)
    assert estimate_memory(model, {"n_ctx": n_ctx}).total <= limit
    assert estimate_memory(model, {"n_ctx": n_ctx + 256}).total > limit


def test_fit_takes_at_most_the_training_context(tmp_path: Path, free: Callable[[int], None]) -> None:
    free(1 << 50)
    assert fit_model(write_llama(tmp_path / "l.gguf"), n_ctx="fit").estimate.n_ctx == 32768
    bert = fit_model(write_bert(tmp_path / "b.gguf"), n_ctx="fit")
    assert bert.estimate.kv == 0
    assert bert.fits


def test_fit_counts_other_options(model: Path, free: Callable[[int], None]) -> None:
    free(150 * MIB)
    found = fit_model(model)
    assert list(found.largest_n_ctx) == ["f16", "q8_0", "q4_0"]
    assert 0 < found.largest_n_ctx["f16"] < found.largest_n_ctx["q8_0"] < found.largest_n_ctx["q4_0"]
    assert list(fit_model(model, kv_type_k="q8_0", kv_type_v="q8_0").largest_n_ctx) == ["q8_0", "q4_0"]
    assert list(fit_model(model, flash_attn=False).largest_n_ctx) == ["f16"], "quantized values need it"
    assert fit_model(model, flash_attn=False).largest_n_ctx["f16"] < found.largest_n_ctx["f16"]


def test_types_that_a_model_cannot_use_are_not_offered(tmp_path: Path) -> None:
    """The heads of the small gemma3 have 16 values, and the blocks of quantized types 32."""
    assert list(fit_model(write_gemma3(tmp_path / "g.gguf")).largest_n_ctx) == ["f16"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_ctxx": 1}, "did you mean 'n_ctx'"),
        ({"n_ctx": "fitt"}, "n_ctx must be an integer"),
        ({"n_ctx": 0}, "n_ctx=0"),
        ({"n_seq_max": -1}, "n_seq_max=-1"),
        ({"kv_type_k": "q8"}, "kv_type_k='q8'"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(model: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(erllama.OptionError, match=message):
        fit_model(model, **options)


def test_a_text_that_is_not_fit_is_refused(model: Path) -> None:
    with pytest.raises(erllama.OptionError, match=r"n_ctx='fitt'; pass a number of tokens, \"fit\", or None"):
        erllama.load_model(model, n_ctx="fitt")
    with pytest.raises(erllama.OptionError, match='n_ctx="fit" with rpc_servers'):
        fit.fitting_n_ctx(model, {"rpc_servers": ["127.0.0.1:1"]})


@pytest.mark.parametrize("value", [2**31, -1, 0, float("inf"), float("nan"), "many", [1, 2]], ids=str)
@pytest.mark.parametrize("key", ["block_count", "attention.head_count", "embedding_length", "context_length"])
def test_absurd_headers_do_not_stop_the_estimate(model: Path, key: str, value: object) -> None:
    header = ModelHeader(model)
    header.metadata = {**header.metadata, f"llama.{key}": value}
    assert header.estimate({}).total > 0
    assert header.n_ctx_train >= 0
    assert fit.largest_n_ctx(header, {}, 1 << 40) >= 0


def test_the_memory_of_cgroups_counts(tmp_path: Path) -> None:
    """All page cache counts as free: it may be the very file of the model."""
    (tmp_path / "cgroup").write_text("0::/box\n")
    box = tmp_path / "mount" / "box"
    box.mkdir(parents=True)
    for name, value in (("memory.max", 100 * MIB), ("memory.current", 90 * MIB)):
        (box / name).write_text(f"{value}\n")
    (box / "memory.stat").write_text(f"anon 1\ninactive_file {10 * MIB}\nactive_file {30 * MIB}\n")
    assert available_memory(tmp_path / "cgroup", tmp_path / "mount") == 50 * MIB
    assert available_memory(tmp_path / "none", tmp_path / "none") > 50 * MIB


def test_the_server_takes_the_context_that_fits(model: Path, free: Callable[[int], None]) -> None:
    from erllama.server.models import ModelEntry, ModelPool

    free(150 * MIB)
    entry = ModelEntry(path=model, options={"n_ctx": "fit", "n_threads": 1})
    with erllama.Cache(ram=0) as cache:
        pool = ModelPool([entry], cache=cache, memory_limit=100 * MIB)
        try:
            pool.load_at_start()
            (served,) = pool.loaded()
            n_ctx = served.model.n_ctx
        finally:
            pool.close()
    needed = estimate_memory(model, {"n_ctx": n_ctx}).total
    assert needed <= 100 * MIB, "the limit of the server bounds the context"
    assert needed > 80 * MIB


@pytest.fixture
def erllama_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command `erllama` in this process."""
    return Command(tmp_path, monkeypatch, capsys)


def test_the_command_shows_what_fits(model: Path, free: Callable[[int], None], erllama_command: Command) -> None:
    free(150 * MIB)
    done = erllama_command("fit", model, "--n-ctx", "2048", "--n-seq-max", "1")
    assert done.status == 0
    assert "It fits. The model was trained with a context of 32,768 tokens." in done.out
    done = erllama_command("fit", model, "--n-ctx", "32768")
    assert done.status == 1
    assert re.search(r"largest context with q8_0: [\d,]+ tokens", done.out)
    assert "It does not fit. These fit: --n-ctx " in done.out
    plain = erllama_command("fit", model, "--n-ctx", "fit", "--json").json
    assert plain["fits"]
    assert plain["least_bytes"] < plain["needed_bytes"]
    assert plain["n_ctx"] == plain["largest_n_ctx"]["f16"]
    assert plain["free_bytes"] == 150 * MIB
    assert erllama_command("fit", model, "--load", "n_thread=1").status == 1
    assert erllama_command("fit", model, "--n-ctx", "many").status == 2
