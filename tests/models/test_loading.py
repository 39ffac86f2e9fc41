"""Loading: options passed on or refused, fingerprints, devices, and models without weights."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import erllama
from erllama.engine import Batch
from erllama.engine.backends import fingerprint as _fingerprint
from erllama.engine.backends import llama_options
from erllama.engine.backends.fingerprint import Fingerprint
from erllama.engine.backends.llama import LlamaBackend, _recipe
from erllama.engine.backends.llama_options import LlamaOptions
from erllama.llama_ffi import Device
from erllama.testing.models import TINY, LlamaShape, write_gemma3, write_llama, write_mamba
from support.paths import SHARED
from support.recording_backend import llama_backend
from support.subprocesses import must_run
from support.threads import in_threads

PROMPT = [5 + i % 200 for i in range(100)]
SEPARATOR = "\n__ggml_vocab_test__\n"
GPUS = [
    Device("CUDA0", "a GPU", "gpu", 1, 2, "0000:01:00.0"),
    Device("CUDA1", "a GPU", "gpu", 1, 2, "0000:02:00.0"),
    Device("Vulkan0", "the first again", "gpu", 1, 2, "0000:01:00.0"),
    Device("iGPU", "integrated", "igpu", 1, 2),
    Device("BLAS", "a library", "accel", 0, 0),
    Device("CPU", "a CPU", "cpu", 1, 2),
]


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_options, "devices", lambda: GPUS)


def opened(path: Path, **options: object) -> LlamaBackend:
    return llama_backend(path, **{"n_ctx": 256, "n_batch": 256, **options})


def logits(backend: LlamaBackend) -> NDArray[np.float32]:
    """Return the reply to PROMPT, computed cold."""
    n = len(PROMPT)
    backend.clear()
    output = np.zeros(n, np.int8)
    output[-1] = 1
    rows = np.array(PROMPT, np.int32), np.arange(n, dtype=np.int32), np.zeros(n, np.int32)
    return backend.decode(Batch(*rows, output))[0].copy()


def refused(path: Path, kind: type[erllama.Error] = erllama.OptionError, **options: object) -> str:
    read: list[float] = []
    with pytest.raises(kind) as caught:
        erllama.load_model(path, on_progress=read.append, **options)  # type: ignore[arg-type]
    assert not any(read), "nothing was loaded before"
    return str(caught.value)


# --- options reach libllama, and keep what they compute apart --------------------------------------

YARN = {"rope_scaling": "yarn", "rope_freq_scale": 0.25}


@pytest.mark.parametrize(
    ("options", "beside"),
    [
        ({"rope_freq_base": 5000.0}, {}),
        ({"rope_freq_scale": 0.5}, {}),
        ({"rope_scaling": "none"}, {"overrides": {"llama.rope.scaling.factor": 4.0}}),
        ({"rope_scaling": "yarn"}, {"rope_freq_scale": 0.25}),
        ({"yarn_ext_factor": 0.5}, YARN),
        ({"yarn_beta_fast": 16.0}, {**YARN, "yarn_orig_ctx": 256}),
        ({"yarn_beta_slow": 4.0}, {**YARN, "yarn_orig_ctx": 256}),
        ({"yarn_orig_ctx": 64}, YARN),
        ({"yarn_attn_factor": 1.5}, {**YARN, "yarn_ext_factor": 0.0}),
        ({"overrides": {"llama.rope.freq_base": 5000.0}}, {}),
        ({"overrides": {"llama.attention.layer_norm_rms_epsilon": 0.1}}, {}),
        ({"kv_type_k": "q8_0"}, {}),
        ({"kv_type_v": "q8_0"}, {}),
        ({"kv_type_k": "bf16", "kv_type_v": "bf16"}, {}),
        ({"flash_attn": False}, {"flash_attn": True}),
    ],
    ids=lambda options: ",".join(options) or "nothing",
)
def test_options_that_change_kv_have_their_own_namespace(
    tiny_gguf: Path, options: dict[str, object], beside: dict[str, object]
) -> None:
    without, given = opened(tiny_gguf, **beside), opened(tiny_gguf, **{**beside, **options})
    assert not np.array_equal(logits(without), logits(given))
    assert without.namespace != given.namespace
    again = opened(tiny_gguf, **{**beside, **options})
    assert np.array_equal(logits(again), logits(given))
    assert (again.namespace, again.recipe) == (given.namespace, given.recipe)
    for backend in (without, given, again):
        backend.close()


@pytest.mark.parametrize(
    "options",
    [
        {"n_gpu_layers": 0},
        {"split_mode": "none"},
        {"split_mode": "row"},
        {"n_threads": 2},
        {"n_threads_batch": 2},
        {"n_ubatch": 64},
    ],
    ids=str,
)
def test_options_that_may_change_bits_are_in_the_recipe(tiny_gguf: Path, options: dict[str, object]) -> None:
    one, other = opened(tiny_gguf), opened(tiny_gguf, **options)
    assert one.recipe != other.recipe
    assert one.namespace == other.namespace
    one.close()
    other.close()


def test_layer_placement_is_in_the_recipe(two_gpus: None) -> None:
    options = [
        {},
        {"split_mode": "none"},
        {"split_mode": "none", "main_gpu": 1},
        {"tensor_split": [3, 1]},
        {"tensor_split": [1, 3]},
    ]
    assert len({_recipe(LlamaOptions(**given), 512) for given in options}) == len(options)  # type: ignore[arg-type]


def test_kv_types_have_their_own_layouts(tiny_gguf: Path) -> None:
    """Even if the results are equal."""
    half, whole = opened(tiny_gguf), opened(tiny_gguf, kv_type_k="f32", kv_type_v="f32")
    assert half.namespace != whole.namespace
    assert whole.facts.kv_bytes == pytest.approx(2 * half.facts.kv_bytes, abs=2**20 / 50)
    half.close()
    whole.close()


def test_full_window_cells_have_their_own_layout(tmp_path: Path) -> None:
    path = write_gemma3(tmp_path / "gemma.gguf", window=64, seed=1)
    short, full = opened(path, n_ctx=1024), opened(path, n_ctx=1024, swa_full=True)
    assert short.namespace != full.namespace
    assert full.facts.kv_bytes > short.facts.kv_bytes
    short.close()
    full.close()


def test_kv_with_load_options_is_restored_exactly(tmp_path: Path, tiny_gguf: Path) -> None:
    gemma = write_gemma3(tmp_path / "gemma.gguf", window=64, seed=1)
    yarn = {**YARN, "yarn_orig_ctx": 64, "yarn_ext_factor": 0.7}
    prompt = [5 + i * 7 % 200 for i in range(300)]
    for path, options in ((gemma, {"swa_full": True}), (tiny_gguf, yarn)):
        replies = []
        for _ in range(2):
            with (
                erllama.Cache(ram=0, disk=tmp_path / "kv", block_size=32) as cache,
                erllama.load_model(path, cache=cache, n_ctx=512, n_ubatch=32, n_threads=1, **options) as model,
            ):
                replies.append(
                    model.complete(prompt, max_tokens=20, temperature=0.0, logprobs=1, reproducible=True)
                )
        cold, warm = replies
        assert (cold.cache.kind, warm.cache.kind) == ("cold", "exact")
        assert (warm.tokens, warm.logprobs) == (cold.tokens, cold.logprobs)


def test_yarn_options_match_yarn_of_the_file(tiny_gguf: Path) -> None:
    by_options = opened(tiny_gguf, **YARN, yarn_orig_ctx=128)
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 128}
    by_file = opened(tiny_gguf, overrides={f"llama.rope.scaling.{key}": value for key, value in scaling.items()})
    assert np.array_equal(logits(by_options), logits(by_file))
    by_options.close()
    by_file.close()
    # Its factors apply also if the file, not the caller, chooses YaRN.
    with opened_model(tiny_gguf, overrides={"llama.rope.scaling.type": "yarn"}, yarn_beta_fast=16.0) as model:
        assert model.metadata["llama.rope.scaling.type"] == "yarn"


def opened_model(path: Path, **options: object) -> erllama.Model:
    return erllama.load_model(path, **{"n_ctx": 256, **options})  # type: ignore[arg-type]


def test_overrides_are_typed_by_value_and_reported(tiny_gguf: Path) -> None:
    overrides = {
        "llama.context_length": 512,
        "llama.rope.freq_base": 1e6,
        "tokenizer.ggml.add_bos_token": False,
        "general.name": "renamed",
    }
    with opened_model(tiny_gguf, n_ctx=None, overrides=overrides) as model:
        assert model.n_ctx == 512
        assert model.tokenize("a").tolist() == [3 + ord("a")]
        assert {key: model.metadata[key] for key in overrides} == overrides
        assert (model.info.name, model.info.n_ctx_train) == ("renamed", 512)
        assert model.metadata["llama.block_count"] == 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"llama.rope.freq_base": 10000}, "expected float but got int"),
        ({"llama.context_length": 4096.0}, "expected int but got float"),
        ({"llama.context_length": True}, "expected int but got bool"),
        ({"general.name": 1}, "expected str but got int"),
        ({"llama.rope.freq_bass": 1e4}, "did you mean 'llama.rope.freq_base'"),
        ({"lama.context": 1}, "does not read this key from this file; leave it out"),
        ({"tokenizer.ggml.tokens": "a"}, "does not read this key"),
        ({"freq_base": 1e4}, "is not a metadata key"),
        ({"llama..rope": 1e4}, "is not a metadata key"),
        ({"llama.rope.freq base": 1e4}, "is not a metadata key"),
        ({5: 1}, "5 is not a metadata key"),
        ({f"llama.{'x' * 122}": 1}, "a key of 128 bytes; libllama takes at most 127"),
        ({"general.name": "é" * 64}, "at most 127 bytes"),
        ({"general.name": "a\0b"}, "bytes of UTF-8 without 0"),
        ({"llama.context_length": -1}, "must be at least 0"),
        ({"llama.context_length": 2**32}, "must be at most"),
        ({"llama.rope.freq_base": float("nan")}, "finite"),
        ({"llama.rope.freq_base": 1e300}, "must be at most"),
        ({"llama.rope.freq_base": None}, "an int, a float, a bool or a string"),
        ({"llama.rope.freq_base": [1.0]}, "an int, a float, a bool or a string"),
        ([("llama.rope.freq_base", 1.0)], "pass a mapping"),
    ],
)
def test_overrides_without_effect_are_refused(tiny_gguf: Path, overrides: object, words: str) -> None:
    assert words in refused(tiny_gguf, overrides=overrides)


def test_impossible_overrides_are_refused_as_in_a_file(tiny_gguf: Path) -> None:
    zero = {"llama.attention.head_count": 0}
    assert "head_count is 0" in refused(tiny_gguf, erllama.ModelLoadError, overrides=zero)
    longest = "x" * 127
    with opened_model(tiny_gguf, overrides={"general.name": longest}) as model:
        assert model.info.name == longest
    # Not a name that libllama knows; it would fail an assertion.
    scaling = {"llama.rope.scaling.type": "stretch"}
    assert "failed" in refused(tiny_gguf, erllama.ModelLoadError, overrides=scaling)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"devices": ["CUDA7"]}, "devices='CUDA7'; it takes"),
        ({"devices": ["CPUs"]}, "did you mean 'CPU'"),
        ({"devices": "CPU"}, "pass a list of names"),
        ({"devices": 5}, "pass a list of names"),
        ({"devices": ["CPU"], "n_gpu_layers": 3}, "which has no GPU"),
        ({"split_mode": "layers"}, "did you mean 'layer'"),
        ({"main_gpu": 0}, "split_mode='layer'"),
        ({"main_gpu": -1, "split_mode": "none"}, "at least 0"),
        ({"main_gpu": 99, "split_mode": "none"}, "main_gpu=99, but there are"),
        ({"tensor_split": [1, 2], "split_mode": "none"}, "leave out one of them"),
        ({"tensor_split": [1] * 99}, "99 shares, but there are"),
        ({"tensor_split": []}, "has no share above 0"),
        ({"tensor_split": [0.0, 0.0]}, "has no share above 0"),
        ({"tensor_split": [1, -1]}, "tensor_split[1]=-1.0; it must be at least 0"),
        ({"tensor_split": [1, "2"]}, "must be a number"),
        ({"tensor_split": 0.5}, "pass a list of numbers"),
        ({"rope_scaling": "yaarn"}, "did you mean 'yarn'"),
        ({"rope_scaling": "none", "rope_freq_scale": 0.5}, "disables scaling"),
        ({"rope_freq_base": 1e300}, "at most"),
        ({"yarn_ext_factor": 0.5}, "this model's own scaling, 'linear'; use rope_scaling='yarn'"),
        ({"yarn_orig_ctx": 512, "rope_scaling": "linear"}, "no effect with rope_scaling='linear'"),
        ({**YARN, "yarn_attn_factor": 1.0}, "without yarn_ext_factor=0"),
        ({**YARN, "yarn_ext_factor": -1}, "at least 0"),
        ({**YARN, "yarn_beta_fast": 1.0, "yarn_beta_slow": 2.0}, "must be more than yarn_beta_slow"),
        ({**YARN, "yarn_orig_ctx": 0}, "at least 1"),
        ({"kv_type_k": "q4_k"}, "did you mean 'q4_"),
        ({"kv_type_v": "q4_0", "flash_attn": False}, "needs flash attention"),
        ({"swa_full": 1}, "True or False"),
        ({"fingerprint": "save"}, "did you mean 'safe'"),
        ({"fingerprint": "fast_unsafe"}, "pass the text or bytes"),
        ({"fingerprint": "fast_unsafe", "own_fingerprint": ""}, "pass the text or bytes"),
        ({"fingerprint": "fast_unsafe", "own_fingerprint": 5}, "pass the text or bytes"),
        ({"own_fingerprint": "x"}, "fingerprint='safe', which computes the name"),
        ({"vocab_only": 1}, "True or False"),
        ({"vocab_only": True, "n_ctx": 512}, "n_ctx=512 with vocab_only=True"),
        ({"vocab_only": True, "kv_type_k": "q8_0"}, "kv_type_k='q8_0' with vocab_only=True"),
        ({"vocab_only": True, "warmup": False}, "warmup=False with vocab_only=True"),
        ({"vocab_only": True, "policy": {}}, "policy={} with vocab_only=True"),
        ({"vocab_only": True, "fingerprint": "gguf_chunked"}, "fingerprint='gguf_chunked' with vocab_only"),
        ({"vocab_onyl": True}, "did you mean 'vocab_only'"),
    ],
)
def test_contradictory_options_are_refused(tiny_gguf: Path, options: dict[str, object], words: str) -> None:
    assert words in refused(tiny_gguf, **options)


# --- devices ---------------------------------------------------------------------------------------


def test_devices_are_listed_before_a_model_is_loaded() -> None:
    printed = must_run(
        """
        import erllama
        found = erllama.devices()
        (cpu,) = [device for device in found if device.kind == "cpu"]
        assert cpu.name == "CPU" and cpu.description
        assert 0 < cpu.free_bytes <= cpu.total_bytes
        assert {device.kind for device in found} <= {"cpu", "gpu", "igpu", "accel"}
        print(len({device.name for device in found}) == len(found))
        """
    )
    assert printed == "True\n"


def test_listing_devices_reports_a_missing_library() -> None:
    must_run(
        """
        import sys
        sys.modules["erllama.llama_ffi._binding"] = None
        import erllama
        try:
            erllama.devices()
        except erllama.LibraryNotBuilt as error:
            assert "make setup" in str(error)
        else:
            raise SystemExit("not refused")
        """
    )


def test_excess_layers_and_missing_devices_are_accepted(tiny_gguf: Path) -> None:
    for options in ({"n_gpu_layers": 999}, {"devices": ["CPU"]}, {"devices": []}, {"n_gpu_layers": 0}):
        with opened_model(tiny_gguf, **options) as model:
            assert model.complete("hello", max_tokens=2).tokens
            assert "CPU" in model.info.devices


def names(options: LlamaOptions) -> list[str]:
    return [device.name for device in options.computing_devices()]


def test_devices_are_chosen_by_name_and_counted_once(two_gpus: None) -> None:
    assert names(LlamaOptions()) == ["CUDA0", "CUDA1"], "a device that two drivers offer counts once"
    assert names(LlamaOptions(n_gpu_layers=0)) == []
    assert names(LlamaOptions(devices=["CUDA1", "CPU"])) == ["CUDA1"]
    assert names(LlamaOptions(devices=["iGPU"])) == ["iGPU"]
    assert names(LlamaOptions(devices=[])) == names(LlamaOptions(devices=["CPU"])) == []
    assert names(LlamaOptions(split_mode="none")) == ["CUDA0"]
    assert names(LlamaOptions(split_mode="none", main_gpu=1)) == ["CUDA1"]
    assert names(LlamaOptions(devices=["CUDA1", "CUDA0"], split_mode="none", main_gpu=0)) == ["CUDA1"]
    chosen = LlamaOptions(devices=["CUDA1", "iGPU"], tensor_split=np.array([3, 1]))
    assert [number for number, _ in chosen.offload_devices()] == [1, 3]
    assert chosen.tensor_split == (3.0, 1.0)
    for options, words in (
        ({"devices": ["CUDA2"]}, "did you mean 'CUDA"),
        ({"devices": ["CUDA1", "CUDA1"]}, "listed twice"),
        ({"devices": ["BLAS"]}, "accelerates the CPU automatically"),
        ({"devices": ["CUDA1"], "tensor_split": [1, 1]}, "2 shares, but there are 1 devices: CUDA1"),
        ({"main_gpu": 2, "split_mode": "none"}, "there are 2 devices: CUDA0, CUDA1"),
    ):
        with pytest.raises(erllama.OptionError) as caught:
            LlamaOptions(**options)  # type: ignore[arg-type]
        assert words in str(caught.value)


def test_integrated_gpus_are_used_if_there_are_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_options, "devices", lambda: GPUS[3:])
    assert names(LlamaOptions()) == ["iGPU"]


# --- fingerprints ----------------------------------------------------------------------------------


def nothing(_: float) -> None: ...


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[erllama.Cache]:
    with erllama.Cache(ram=0, disk=tmp_path / "kv", block_size=32) as cache:
        yield cache


def test_a_fingerprint_reads_the_file_once(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    for _ in range(2):  # the second time with a reopened cache
        with erllama.Cache(ram=0, disk=tmp_path / "kv") as cache, opened_model(tiny_gguf, cache=cache):
            pass
        monkeypatch.setattr(_fingerprint, "_sha256", lambda *_: pytest.fail("read again"))
    monkeypatch.undo()
    copy = tmp_path / "copy.gguf"
    shutil.copy(tiny_gguf, copy)
    with erllama.Cache(ram=0, disk=tmp_path / "kv") as cache:
        with opened_model(copy, cache=cache, on_progress=seen.append):
            pass
        assert (seen[0], seen[-1]) == (0.0, 1.0)
        assert seen == sorted(seen)
        assert 0.5 in seen, "reading is the first half"
        assert Fingerprint().of(copy, cache, nothing) == Fingerprint().of(tiny_gguf, cache, nothing)


@pytest.mark.parametrize("enough", [0.0, 0.4])
def test_fingerprinting_can_be_cancelled(tiny_gguf: Path, disk: erllama.Cache, enough: float) -> None:
    with pytest.raises(erllama.LoadCancelled):
        opened_model(tiny_gguf, cache=disk, on_progress=lambda fraction: fraction < enough)
    with opened_model(tiny_gguf, cache=disk) as model:
        assert model.complete("hello", max_tokens=2).tokens


def test_different_kinds_of_fingerprint_share_nothing(tiny_gguf: Path, disk: erllama.Cache) -> None:
    digest = Fingerprint().of(tiny_gguf, disk, nothing)
    kinds: list[dict[str, object]] = [
        {},
        {"fingerprint": "gguf_chunked"},
        {"fingerprint": "fast_unsafe", "own_fingerprint": "mine"},
        {"fingerprint": "fast_unsafe", "own_fingerprint": digest},
        {"fingerprint": "fast_unsafe", "own_fingerprint": b"\xff mine"},
    ]
    for options in kinds:
        with opened_model(tiny_gguf, cache=disk, **options) as model:
            assert model.complete(PROMPT, max_tokens=1).cache.kind == "cold"
        with opened_model(tiny_gguf, cache=disk, **options) as model:
            assert model.complete(PROMPT, max_tokens=1).cache.kind == "exact"


def test_a_custom_fingerprint_never_joins_two_layouts(tmp_path: Path, disk: erllama.Cache) -> None:
    """A custom fingerprint stands for the content, not for the values read from the file."""
    shapes = {
        "a": TINY,
        "deeper": LlamaShape(n_layer=3, n_embd=64, n_ff=128, n_head=2, n_head_kv=1),
        "heads": LlamaShape(n_layer=2, n_embd=64, n_ff=128, n_head=4, n_head_kv=2),
    }
    own = {"fingerprint": "fast_unsafe", "own_fingerprint": "mine"}
    for name, shape in shapes.items():
        with opened_model(write_llama(tmp_path / name, shape, seed=1), cache=disk, **own) as model:
            assert model.complete(PROMPT, max_tokens=1).cache.kind == "cold"
    for quantization in ("Q8_0", "Q4_0"):
        path = write_llama(tmp_path / quantization, TINY, seed=1, quantization=quantization)  # type: ignore[arg-type]
        with opened_model(path, cache=disk, **own) as model:
            assert model.complete(PROMPT, max_tokens=1).cache.kind == "cold"
    other = write_llama(tmp_path / "other", TINY, seed=2)
    with opened_model(other, cache=disk, **own) as model:
        assert model.complete(PROMPT, max_tokens=1).cache.kind == "exact", "the caller chose it"


def changed(source: Path, target: Path, at: int) -> Path:
    content = bytearray(source.read_bytes())
    content[at] ^= 1
    target.write_bytes(content)
    return target


def test_gguf_chunked_covers_metadata_and_tensor_beginnings(
    tiny_gguf: Path, tmp_path: Path, disk: erllama.Cache
) -> None:
    from erllama.llama_ffi import read_header

    header = read_header(tiny_gguf)
    tensor = max(header.tensors, key=lambda tensor: tensor.n_bytes)
    begin = header.data_offset + tensor.offset
    assert tensor.n_bytes > 5000
    name = tiny_gguf.read_bytes().index(b"random llama")
    chunked = Fingerprint("gguf_chunked")
    own = chunked.of(tiny_gguf, disk, nothing)
    for at, seen in ((name, True), (begin, True), (begin + 4095, True), (begin + 4096, False)):
        path = changed(tiny_gguf, tmp_path / "changed.gguf", at)
        assert (chunked.of(path, disk, nothing) != own) == seen, f"byte {at}"
        assert Fingerprint().of(path, disk, nothing) != Fingerprint().of(tiny_gguf, disk, nothing)


@pytest.mark.parametrize("kind", ["safe", "gguf_chunked"])
def test_a_fingerprint_covers_every_part_of_a_split_model(
    tiny_gguf: Path, tmp_path: Path, disk: erllama.Cache, kind: str
) -> None:
    parts = [tmp_path / f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for part in parts:
        shutil.copy(tiny_gguf, part)
    naming = Fingerprint(kind)
    found = {naming.of(parts[0], disk, nothing)}
    name = tiny_gguf.read_bytes().index(b"random llama")
    for part in parts:
        changed(part, part, name)
        found.add(naming.of(parts[0], disk, nothing))
    assert len(found) == 4
    parts[1].unlink()
    with pytest.raises(erllama.ModelLoadError, match="00002-of-00003"):
        naming.of(parts[0], disk, nothing)


def test_a_file_that_changes_while_it_is_loaded_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"

    def meddle(when: float) -> Callable[[float], None]:
        def on_progress(fraction: float) -> None:
            if fraction >= when:
                os.utime(path, ns=(1, int(fraction * 1e9)))

        return on_progress

    for when in (0.25, 1.0):  # while it is read, and while it is loaded
        shutil.copy(tiny_gguf, path)
        with (
            erllama.Cache(ram=0, disk=tmp_path / "kv") as cache,
            pytest.raises(erllama.ModelLoadError, match="changed while it was"),
        ):
            opened_model(path, cache=cache, on_progress=meddle(when))
    with opened_model(path) as model:
        assert model.complete("hello", max_tokens=2).tokens


# --- several at once -------------------------------------------------------------------------------


def test_models_can_load_concurrently(tiny_gguf: Path, tmp_path: Path) -> None:
    """Each load has its own options, some of which are refused. No load gets the error of another."""
    mamba = write_mamba(tmp_path / "mamba.gguf", seed=1)
    alone = {}
    with erllama.Cache(disk=tmp_path / "kv") as cache:

        def load(number: int) -> None:
            seen: list[float] = []
            base = 1000.0 * (number % 4 + 1)
            if number % 4 == 3:
                with pytest.raises(erllama.OptionError, match="expected float but got int"):
                    opened_model(tiny_gguf, overrides={"llama.rope.freq_base": 5})
                return
            path, overrides = (mamba, None) if number % 4 == 2 else (tiny_gguf, {"llama.rope.freq_base": base})
            with opened_model(path, cache=cache, overrides=overrides, on_progress=seen.append) as model:
                assert seen == sorted(seen)
                reply = model.complete(
                    PROMPT, max_tokens=8, temperature=0.0, reproducible=True, cache_salt=str(number)
                )
                assert model.info.architecture == ("mamba" if path is mamba else "llama")
                alone.setdefault(number % 4, set()).add(tuple(reply.tokens))

        in_threads(load, 12)
    assert [len(replies) for _, replies in sorted(alone.items())] == [1, 1, 1]


# --- model.info ------------------------------------------------------------------------------------


def test_a_model_reports_its_facts_and_memory(tiny_gguf: Path) -> None:
    with opened_model(tiny_gguf, n_ctx=4096, kv_type_k="q8_0") as model:
        info = model.info
        assert (info.architecture, info.name, info.quantization) == ("llama", "random llama, seed 1", "all F32")
        assert (info.n_layer, info.n_embd, info.n_head, info.n_head_kv) == (2, 64, 2, 1)
        assert (info.n_params, info.file_bytes) == (115008, tiny_gguf.stat().st_size)
        assert (info.n_ctx_train, info.n_ctx, info.kv_type_k, info.kv_type_v) == (32768, 4096, "q8_0", "f16")
        assert info.special_tokens["eos"] == erllama.SpecialToken(2, "</s>")
        assert (info.has_chat_template, info.vocab_only) == (False, False)
        assert info.weights_bytes == 115008 * 4
        # In each of two layers, a row of K takes 34 bytes, and one of V 64. libllama reports steps of 0.01 MiB.
        assert info.kv_bytes == pytest.approx(4096 * 2 * (34 + 64), abs=2**20 / 100)
        assert {buffer.holds for buffer in info.buffers} == {"weights", "kv", "compute", "output"}
        assert asdict(info)["phase"] == "idle"
        assert isinstance(model.metadata, Mapping)
        assert model.metadata["tokenizer.ggml.tokens"][:3] == ["<unk>", "<s>", "</s>"]  # type: ignore[index]
        assert model.metadata["llama.rope.freq_base"] == 10000.0


def test_recurrent_state_counts_as_kv(tmp_path: Path) -> None:
    with opened_model(write_mamba(tmp_path / "mamba.gguf", seed=1)) as model:
        assert "state" in {buffer.holds for buffer in model.info.buffers}
        assert model.info.kv_bytes > 0
        assert (model.info.n_head, model.info.n_head_kv) == (0, 0)


def test_a_custom_backend_may_report_no_facts() -> None:
    from erllama.engine.backends.stub import StubBackend

    with erllama.load_backend(StubBackend()) as model:
        assert (model.info.architecture, model.info.n_params, model.info.special_tokens) == ("", 0, {})
        assert dict(model.metadata) == {}


# --- vocabularies alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-bpe", "llama-spm", "qwen2"])
def test_a_vocabulary_only_model_tokenizes_and_detokenizes(name: str) -> None:
    path = SHARED / "vocab" / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip(f"{path} is missing")
    texts = Path(f"{path}.inp").read_bytes().decode().split(SEPARATOR)
    expected = [[int(id) for id in line.split()] for line in Path(f"{path}.out").read_text().splitlines()]
    assert len(expected) > 40
    with erllama.load_model(path, vocab_only=True) as model:
        for text, ids in zip(texts, expected, strict=False):
            assert model.tokenize(text, add_special=False).tolist() == ids
            assert model.detokenize(ids) == text
            assert model.detokenize(model.tokenize(text)) == text
        assert model.info.has_chat_template == (name == "qwen2")
        assert (model.n_vocab, model.n_ctx) == (len(model.metadata["tokenizer.ggml.tokens"]), 0)  # type: ignore[arg-type]
        rendered = model.render_chat([{"role": "user", "content": "hi"}])
        assert rendered.endswith("<|im_start|>assistant\n")
        written = model.detokenize(model.apply_chat_template([{"role": "user", "content": "hi"}]), special=True)
        bos = model.info.special_tokens["bos"].text if name != "qwen2" else ""
        assert written.removeprefix(bos).lstrip(" ") == rendered


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: model.complete("hello"),
        lambda model: model.complete([], max_tokens=3),
        lambda model: model.stream("hello"),
        lambda model: model.prefill("hello"),
        lambda model: model.chat([{"role": "user", "content": "hello"}]),
        lambda model: model.stream_chat([]),
        lambda model: model.draft("hello", 3),
        lambda model: model.verify("hello", [5]),
        lambda model: model.cached_prefix("hello"),
        lambda model: model.end_session("mine"),
        lambda model: model.compile_grammar(erllama.Grammar.regex("a")),
        lambda model: model.evict(),
    ],
)
def test_a_vocabulary_only_model_refuses_to_compute(
    tiny_gguf: Path, ask: Callable[[erllama.Model], object]
) -> None:
    with erllama.load_model(tiny_gguf, vocab_only=True, id="words") as model:
        with pytest.raises(erllama.VocabularyOnly, match="vocab_only=True"):
            ask(model)
        assert model.tokenize("a").tolist() == [1, 3 + ord("a")]
    with pytest.raises(erllama.ModelUnloaded):
        ask(model)


def test_a_vocabulary_only_model_is_listed_like_others(tiny_gguf: Path) -> None:
    seen: list[float] = []
    overrides = {"tokenizer.ggml.add_bos_token": False}
    with erllama.load_model(
        tiny_gguf, vocab_only=True, id="words", overrides=overrides, on_progress=seen.append
    ) as model:
        assert erllama.get_model("words") is model
        assert (seen[0], seen[-1]) == (0.0, 1.0)
        assert model.tokenize("a").tolist() == [3 + ord("a")]
        info = model.info
        assert (info.vocab_only, info.phase, info.n_params, info.n_layer) == (True, "idle", 115008, 2)
        assert (info.weights_bytes, info.kv_bytes, info.devices) == (0, 0, ())
        assert (model.pending, model.queue_depth, model.last_cache_hit) == (0, 0, None)
        assert model.metrics.finished == {}
        assert "idle" in repr(model)
    with pytest.raises(erllama.ModelNotFound):
        erllama.get_model("words")
    with pytest.raises(erllama.LoadCancelled):
        erllama.load_model(tiny_gguf, vocab_only=True, id="words", on_progress=lambda _: False)
    words = refused(tiny_gguf, vocab_only=True, overrides={"llama.rope.freq_base": 1e4})
    assert "for a vocabulary only" in words


def test_a_vocabulary_only_model_refuses_asyncio(tiny_gguf: Path) -> None:
    with erllama.load_model(tiny_gguf, vocab_only=True) as model:
        for asked in (model.acomplete("hello"), model.achat([{"role": "user", "content": "hello"}])):
            with pytest.raises(erllama.VocabularyOnly):
                asyncio.run(asked)
