"""Files that are not adapters for a model are refused, and a failing adapter does not affect other requests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

import erllama
from erllama import llama_ffi
from erllama.engine.backends.stub import StubBackend
from erllama.testing.bert import write_bert
from erllama.testing.models import LlamaShape, write_lora
from support.adapters import AdaptedStub, greedy_reply, load_llama
from support.paths import TESTS
from support.recording_backend import llama_backend
from support.subprocesses import must_run
from support.threads import in_threads, wait_until

# --- what is refused


def refused(model: erllama.Model, path: Path, words: str) -> None:
    with pytest.raises(erllama.AdapterLoadError, match=words) as caught:
        model.load_adapter(path)
    assert str(path) in str(caught.value)
    assert model.adapters == ()


def test_files_that_are_not_adapters_for_the_model_are_refused(
    tiny: erllama.Model, tiny_gguf: Path, loras: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "bad.gguf"
    refused(tiny, path, "does not exist")
    refused(tiny, tmp_path, "directory")
    path.touch()
    refused(tiny, path, "empty")
    path.write_bytes(b"PK\x03\x04 safetensors")
    refused(tiny, path, "not a GGUF file")
    refused(tiny, tiny_gguf, "not an adapter")
    write_lora(path, LlamaShape(2, 128, 256, 2, 1))
    refused(tiny, path, "do not fit")
    write_lora(path, LlamaShape(3, 64, 128, 2, 1))
    refused(tiny, path, "'blk.2.attn_k.weight', which the model lacks")
    write_lora(path, architecture="qwen2")
    refused(tiny, path, "architecture 'qwen2'; this model's is 'llama'")
    write_lora(path, alpha=float("nan"))
    refused(tiny, path, "alpha is nan")
    write_lora(path, weights=())
    refused(tiny, path, "no tensors")
    content = loras[0].read_bytes()
    for place in range(4, len(content), max(len(content) // 100, 1)):
        path.write_bytes(content[:place])
        refused(tiny, path, "cannot be loaded|not a GGUF")
    assert tiny.complete("the model lives", max_tokens=3).tokens


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"general.type": None}, "not an adapter"),
        ({"adapter.type": "vera"}, "'vera'"),
        ({"adapter.alora.invocation_tokens": [1, 2]}, "aLoRA"),
        ({"adapter.lora.alpha": "8"}, "alpha is '8'"),
        ({"blk.0.attn_q.weight.lora_b": None}, "one of a pair"),
        ({"blk.0.attn_q.weight.lora_c": np.zeros((4, 64), np.float32)}, "one of a pair"),
        ({"blk.0.attn_q.weight.lora_a": np.zeros((5, 64), np.float32)}, "shapes 64x5 and 4x64"),
        ({"blk.0.attn_q.weight.lora_a": np.zeros((2, 4, 64), np.float32)}, "64x4x2"),
        ({"blk.0.attn_q.weight.lora_a": np.zeros((4, 64), np.int8)}, "has a type other"),
        ({"blk.0.attn_q.weight.lora_a": np.zeros((4, 64), np.float64)}, "has a type other"),
    ],
)
def test_adapters_that_crash_libllama_are_refused(
    tiny: erllama.Model, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    path = tmp_path / "odd.gguf"
    rng = np.random.default_rng(1)
    entries: dict[str, object] = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
        "blk.0.attn_q.weight.lora_a": rng.standard_normal((4, 64)).astype(np.float32),
        "blk.0.attn_q.weight.lora_b": rng.standard_normal((64, 4)).astype(np.float32),
    }
    write_entries(path, entries)
    tiny.load_adapter(path).unload()  # valid
    write_entries(path, {**entries, **change})
    refused(tiny, path, words)


def write_entries(path: Path, entries: Mapping[str, object]) -> None:
    writer = GGUFWriter(path, "llama")
    for name, value in entries.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, np.ndarray):
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_adapters_of_tied_embeddings_are_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    """libllama would use the pair for both, and fail an assertion."""
    tied = tmp_path / "tied.gguf"
    write_tied(tiny_gguf, tied)
    lora = write_lora(tmp_path / "lora.gguf", weights=("token_embd",))
    with load_llama(tied) as model:
        refused(model, lora, "which is also the model's output")
        model.load_adapter(write_lora(tmp_path / "good.gguf", weights=("attn_q",)))
        greedy_reply(model)


def write_tied(source: Path, target: Path) -> None:
    """Write a model without an output tensor; libllama uses the embeddings in its place."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kinds = field.types
            value = field.contents()
            writer.add_key_value(name, value, kinds[0], sub_type=kinds[-1] if len(kinds) > 1 else None)
    for tensor in reader.tensors:
        if tensor.name != "output.weight":
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_an_adapter_file_that_changes_while_loading_is_refused(
    tiny_gguf: Path, loras: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "lora.gguf"
    shutil.copy(loras[0], path)
    backend = llama_backend(tiny_gguf)
    load = backend.load_adapter

    def changing(given: Path) -> llama_ffi.LlamaAdapter:
        shutil.copy(loras[1], path)
        return load(given)

    backend.load_adapter = changing  # type: ignore[method-assign]
    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache) as model:
        refused(model, path, "changed while it was loaded")
        assert not backend._adapters.natives


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), 1e39, "1", None, True, [1.0]])
def test_invalid_scales_are_refused(tiny: erllama.Model, loras: list[Path], scale: float) -> None:
    with pytest.raises(erllama.OptionError, match="scale"):
        tiny.load_adapter(loras[0], scale=scale)
    adapter = tiny.load_adapter(loras[0], scale=0.5)
    with pytest.raises(erllama.OptionError, match="scale"):
        adapter.scale = scale
    assert adapter.scale == 0.5


def test_invalid_adapter_options_are_refused(tiny: erllama.Model, loras: list[Path]) -> None:
    with pytest.raises(erllama.OptionError, match="did you mean 'scale'"):
        tiny.load_adapter(loras[0], scales=1.0)  # type: ignore[call-arg]
    for path in (None, 5, "", b"x.gguf"):
        with pytest.raises(erllama.OptionError, match="path"):
            tiny.load_adapter(path)  # type: ignore[arg-type]


def test_models_without_adapter_support_refuse_adapters(tiny_gguf: Path, loras: list[Path], tmp_path: Path) -> None:
    with erllama.Cache() as cache, erllama.load_backend(StubBackend(), cache=cache) as model:
        with pytest.raises(erllama.Unsupported, match="StubBackend, has no `load_adapter`"):
            model.load_adapter(loras[0])
        assert model.adapters == ()
    with erllama.load_model(tiny_gguf, vocab_only=True) as model:
        with pytest.raises(erllama.VocabularyOnly):
            model.load_adapter(loras[0])
        assert model.adapters == ()
    with load_llama(write_bert(tmp_path / "bert.gguf")) as model:
        with pytest.raises(erllama.Unsupported, match="only encodes"):
            model.load_adapter(loras[0])


def test_the_binding_refuses_adapters_of_other_models(tiny_gguf: Path, loras: list[Path]) -> None:
    """The binding refuses them, because libllama would use freed or foreign memory."""
    with llama_ffi.LlamaModel(tiny_gguf) as one, llama_ffi.LlamaModel(tiny_gguf) as other:
        adapter, foreign = llama_ffi.LlamaAdapter(one, loras[0]), llama_ffi.LlamaAdapter(other, loras[0])
        with llama_ffi.LlamaContext(one, n_ctx=256) as context:
            for wrong, words in [
                ([(foreign, 1.0)], "another model"),
                ([(adapter, 1.0), (adapter, 0.5)], "twice"),
                ([(adapter, float("nan"))], "finite"),
                ([(adapter, 1e39)], "finite"),
            ]:
                with pytest.raises(llama_ffi.LlamaError, match=words):
                    context.set_adapters(wrong)
            context.set_adapters([(adapter, 1.0)])
            adapter.close()
            adapter.close()
            with pytest.raises(llama_ffi.LlamaError, match="closed"):
                context.set_adapters([(adapter, 1.0)])
            tokens, zero = np.array([5], np.int32), np.zeros(1, np.int32)
            assert np.isfinite(context.decode(tokens, zero, zero, np.ones(1, np.int8))).all()
            assert adapter._handle._pointer is not None, "the context uses it"
            context.set_adapters([])
            assert adapter._handle._pointer is None
        foreign.close()
    with llama_ffi.LlamaModel(tiny_gguf, vocab_only=True) as words:
        with pytest.raises(llama_ffi.LlamaError, match="vocab_only"):
            llama_ffi.LlamaAdapter(words, loras[0])


def test_a_backend_failure_with_adapters_fails_only_its_requests(stub_adapters: list[Path]) -> None:
    backend = AdaptedStub()
    use = backend.use_adapters

    def failing(adapters: Sequence[tuple[object, float]]) -> None:
        if adapters:
            raise erllama.BackendError("no memory for adapters")
        use(adapters)

    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache) as model:
        plain = greedy_reply(model)
        backend.use_adapters = failing  # type: ignore[method-assign]
        adapter = model.load_adapter(stub_adapters[0])
        with pytest.raises(erllama.BackendError, match="no memory for adapters"):
            greedy_reply(model)
        adapter.unload()
        assert greedy_reply(model).tokens == plain.tokens
        wait_until(lambda: not backend.loaded)


def test_embeddings_are_computed_beside_adapters(tiny_gguf: Path, loras: list[Path]) -> None:
    """Embeddings do not use adapters, while adapters are loaded and unloaded."""
    with load_llama(tiny_gguf) as model:
        expected = model.embed("a text")

        def work(number: int) -> None:
            for _ in range(30):
                if number:
                    np.testing.assert_array_equal(model.embed("a text"), expected)
                else:
                    model.load_adapter(loras[0])
                    greedy_reply(model, n=1)
                    model.adapters[0].unload()

        in_threads(work, 2)


FUZZ = """
import sys
from pathlib import Path
import erllama
sys.path.append(sys.argv[7])
from support.gguf.corruption import corrupted
model_path, source, target = sys.argv[1], sys.argv[2], Path(sys.argv[3])
first, last, header = map(int, sys.argv[4:7])
content = Path(source).read_bytes()
loaded = refused = 0
with erllama.Cache() as cache, erllama.load_model(model_path, n_ctx=256, n_threads=1, cache=cache) as model:
    plain = model.complete("hello", max_tokens=3, temperature=0.0).tokens
    for seed in range(first, last):
        print("seed", seed, flush=True)
        target.write_bytes(corrupted(content, seed, header))
        try:
            adapter = model.load_adapter(target)
        except erllama.AdapterLoadError:
            refused += 1
            continue
        loaded += 1
        try:
            model.complete("hello", max_tokens=3)
        except erllama.SamplingError:
            pass  # of numbers that are none
        adapter.unload()
    assert model.complete("hello", max_tokens=3, temperature=0.0).tokens == plain
print(loaded, refused)
"""


def test_flipped_bytes_in_an_adapter_header_are_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    """The file is refused, or loads where the flip does not matter. The process never ends."""
    lora = write_lora(
        tmp_path / "lora.gguf", LlamaShape(1, 64, 128, 2, 1), weights=("attn_q", "ffn_down", "token_embd")
    )
    header = int(GGUFReader(lora).data_offset)
    first = int(os.environ.get("ERLLAMA_FUZZ_FIRST", "0"))
    n = int(os.environ.get("ERLLAMA_FUZZ_N", "200"))
    flipped = tmp_path / "flipped.gguf"
    output = must_run(FUZZ, tiny_gguf, lora, flipped, first, first + n, header, TESTS, timeout=60 + n)
    loaded, n_refused = map(int, output.splitlines()[-1].split())
    assert loaded + n_refused == n
    assert n_refused > n // 4
    assert loaded > n // 40, "most flips hit names and sizes, which must all be consistent"
