"""Adapters: replies with them, the object that a user holds, and requests in flight."""

from __future__ import annotations

import hashlib
import random
import shutil
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from numpy.typing import NDArray

import erllama
from erllama import llama_ffi
from erllama.engine import Batch, ModelThread, Request, RequestOptions, SamplingOptions, Ticket
from erllama.engine.adapters import Adapters
from erllama.engine.adapters import adapter_set as engine_adapter_set
from support.adapters import (
    PROMPT,
    AdaptedStub,
    UsedAdapters,
    adapter_set,
    cold_stub,
    greedy_reply,
    load_llama,
    logprob_distance,
)
from support.recording_backend import llama_backend, same_bits
from support.threads import in_threads, wait_until

# --- what replies are


@pytest.mark.parametrize("scales", [{0: 1.0}, {1: 0.5}, {3: -0.7}, {0: 0.5, 2: 1.5}, {1: 1.0, 3: 0.3}])
def test_logits_with_adapters_are_those_of_libllama(
    tiny_gguf: Path, loras: list[Path], scales: dict[int, float]
) -> None:
    """Compare every decode of a request, bit for bit, with a context that the engine never used."""
    backend = llama_backend(tiny_gguf, n_ubatch=64)
    decode, slices, logits = backend.decode, [], []

    def recorded(batch: Batch) -> NDArray[np.float32]:
        slices.append(batch.tokens.copy())
        rows = decode(batch)
        logits.extend(row.copy() for row in rows)
        return rows

    backend.decode = recorded  # type: ignore[method-assign]
    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache) as model:
        for i, scale in scales.items():
            model.load_adapter(loras[i], scale=scale)
        greedy_reply(model, reproducible=True)
    assert [len(tokens) for tokens in slices] == [64, 64, 21, 1, 1, 1, 1, 1, 1]

    with llama_ffi.LlamaModel(tiny_gguf) as native:
        context = llama_ffi.LlamaContext(
            native, n_ctx=1024, n_ubatch=64, n_seq_max=17, n_threads=1, n_threads_batch=1
        )
        order = sorted(scales, key=lambda i: hashlib.sha256(loras[i].read_bytes()).digest())
        context.set_adapters([(llama_ffi.LlamaAdapter(native, loras[i]), scales[i]) for i in order])
        expected, position = [], 0
        for tokens in slices:
            n = len(tokens)
            output = np.zeros(n, np.int8)
            output[-1] = position + n >= len(PROMPT)
            positions = np.arange(position, position + n, dtype=np.int32)
            rows = context.decode(tokens, positions, np.zeros(n, np.int32), output)
            expected.extend(row.copy() for row in rows)
            position += n
        context.close()
    assert len(logits) == 6
    assert same_bits(logits, expected)


def test_an_adapter_computes_like_merged_weights(tiny_gguf: Path, loras: list[Path], tmp_path: Path) -> None:
    scale = 0.6
    merged = tmp_path / "merged.gguf"
    for lora in loras:
        shutil.copy(tiny_gguf, merged)
        parts = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(lora).tensors}
        alpha = GGUFReader(lora).fields["adapter.lora.alpha"].contents()
        weights = {tensor.name: tensor.data for tensor in GGUFReader(merged, "r+").tensors}
        for name in {name.removesuffix(".lora_a") for name in parts if name.endswith(".lora_a")}:
            a, b = parts[f"{name}.lora_a"], parts[f"{name}.lora_b"]
            flipped = name == "token_embd.weight"
            weights[name] += scale * alpha / a.shape[flipped] * (a @ b.T if flipped else b @ a)
        del weights
        with load_llama(merged, kv_type_k="f32", kv_type_v="f32") as model:
            expected = greedy_reply(model, n=1, logprobs=100).logprobs
        with load_llama(tiny_gguf, kv_type_k="f32", kv_type_v="f32") as model:
            without = greedy_reply(model, n=1, logprobs=100).logprobs
            model.load_adapter(lora, scale=scale)
            found = greedy_reply(model, n=1, logprobs=100).logprobs
        assert logprob_distance(found, expected) < 1e-2
        assert logprob_distance(found, without) > 0.3, "an adapter without an effect proves nothing"


def test_scale_0_is_no_adapter_at_all(tiny_gguf: Path, loras: list[Path]) -> None:
    with load_llama(tiny_gguf) as model:
        plain = greedy_reply(model)
        adapter = model.load_adapter(loras[0], scale=0)
        again = greedy_reply(model)
        assert (again.tokens, again.cache.kind) == (plain.tokens, "exact")
        adapter.scale = 1
        assert greedy_reply(model).cache.kind == "cold"
        for nothing in (0.0, -0.0, 1e-50):  # the last one is 0 in 32 bits
            adapter.scale = nothing
            assert greedy_reply(model).cache.kind == "exact"
            assert greedy_reply(model, reproducible=True).tokens == plain.tokens
            adapter.scale = 1
        adapter.unload()
        assert greedy_reply(model).cache.kind == "exact"


def test_unloading_all_adapters_restores_the_model(tiny_gguf: Path, loras: list[Path]) -> None:
    """Bit for bit: an adapter leaves no trace."""
    with load_llama(tiny_gguf) as model:
        before = greedy_reply(model, n=4, reproducible=True, logprobs=20)
        for lora in loras:
            model.load_adapter(lora)
        assert greedy_reply(model, n=4, reproducible=True, logprobs=20).logprobs != before.logprobs
        for adapter in model.adapters:
            adapter.unload()
        model.cache.evict_bytes(1 << 40)
        after = greedy_reply(model, n=4, reproducible=True, logprobs=20)
    assert after.cache.kind == "cold"
    assert after.logprobs == before.logprobs


# --- what a user holds


def test_adapters_are_listed_with_their_scales(tiny_gguf: Path, loras: list[Path]) -> None:
    with load_llama(tiny_gguf) as model:
        assert model.adapters == ()
        first = model.load_adapter(loras[1], scale=0.1)
        second = model.load_adapter(str(loras[0]))
        assert model.adapters == (first, second)
        assert [(adapter.path, adapter.scale) for adapter in model.adapters] == [(loras[1], 0.1), (loras[0], 1.0)]
        assert first.sha256 == hashlib.sha256(loras[1].read_bytes()).hexdigest()
        second.scale = np.float32(0.25)  # type: ignore[assignment]
        assert model.adapters[1].scale == 0.25
        assert repr(second) == f"<erllama.Adapter {str(loras[0])!r}, scale 0.25>"
        first.unload()
        first.unload()
        assert model.adapters == (second,)
        assert (first.loaded, second.loaded, first.scale) == (False, True, 0.1)
        assert "unloaded" in repr(first)
        with pytest.raises(erllama.AdapterUnloaded, match=r"wide\.gguf is unloaded"):
            first.scale = 1.0
        assert first.scale == 0.1
    assert (model.adapters, second.loaded) == ((), False)
    second.unload()
    with pytest.raises(erllama.ModelUnloaded):
        second.scale = 1.0
    with pytest.raises(erllama.ModelUnloaded):
        model.load_adapter(loras[0])


def test_any_thread_can_load_scale_and_unload(stub_adapters: list[Path]) -> None:
    backend = AdaptedStub(n_ctx=512)
    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache) as model:

        def work(number: int) -> None:
            dice = random.Random(number)
            for _ in range(30):
                adapter = model.load_adapter(dice.choice(stub_adapters), scale=dice.choice([0, 0.5, 1]))
                assert len(greedy_reply(model, PROMPT[: dice.randrange(1, 150)], 3).tokens) <= 3
                adapter.scale = dice.choice([0, 0.5, 1])
                adapter.unload()

        in_threads(work, 6)
        wait_until(lambda: not backend.loaded)
        assert model.adapters == ()
        assert greedy_reply(model).tokens == cold_stub(tuple(PROMPT), (), 6)
    assert backend.violations == []


# --- requests in flight


def test_requests_in_flight_keep_their_adapter_set(stub_adapters: list[Path]) -> None:
    """Running and waiting requests, for all changes of adapters in the meantime."""
    backend = AdaptedStub(n_ctx=2048)
    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache, n_seq_max=2) as model:
        first = model.load_adapter(stub_adapters[0])
        streams: list[tuple[erllama.Stream, UsedAdapters]] = []

        def ask(scales: dict[Path, float]) -> None:
            streams.append((model.stream(PROMPT, max_tokens=20, temperature=0.0), adapter_set(scales)))

        ask({stub_adapters[0]: 1.0})
        next(iter(streams[0][0]))
        backend.gate.clear()  # in the middle of the reply
        first.scale = 0.5
        ask({stub_adapters[0]: 0.5})
        first.scale = 2.0
        ask({stub_adapters[0]: 2.0})
        first.unload()
        ask({})
        backend.gate.set()
        second = model.load_adapter(stub_adapters[1], scale=-1.0)
        ask({stub_adapters[1]: -1.0})
        for stream, adapters in streams:
            assert stream.result().tokens == cold_stub(tuple(PROMPT), adapters, 20)
        second.unload()
        wait_until(lambda: not backend.loaded)
    assert backend.violations == []
    assert len({adapters for _, adapters in streams}) == 5


def test_an_unloaded_adapter_is_freed_after_its_last_request(stub_adapters: list[Path]) -> None:
    backend = AdaptedStub(n_ctx=2048)
    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache, n_seq_max=1) as model:
        adapter = model.load_adapter(stub_adapters[0])
        backend.gate.clear()
        running, waiting, dropped = (model.stream(PROMPT, max_tokens=3, temperature=0.0) for _ in range(3))
        adapter.unload()
        dropped.cancel()
        backend.gate.set()
        assert running.result().tokens == cold_stub(tuple(PROMPT), adapter_set({stub_adapters[0]: 1.0}), 3)
        assert waiting.result().tokens == cold_stub(tuple(PROMPT), adapter_set({stub_adapters[0]: 1.0}), 3)
        wait_until(lambda: not backend.loaded)
    assert backend.violations == []


def test_a_refused_request_releases_its_adapters(stub_adapters: list[Path]) -> None:
    backend = AdaptedStub(n_ctx=512)
    with erllama.Cache() as cache:
        with erllama.load_backend(backend, cache=cache, n_seq_max=1, max_pending=1) as model:
            adapter = model.load_adapter(stub_adapters[0])
            backend.gate.clear()
            streams = [model.stream(PROMPT, max_tokens=2) for _ in range(2)]
            for _ in range(3):
                with pytest.raises(erllama.QueueFull):
                    model.complete(PROMPT)
            adapter.unload()
            backend.gate.set()
            for stream in streams:
                stream.result()
            wait_until(lambda: not backend.loaded)
    assert backend.violations == []


def test_a_request_may_use_another_set_than_the_one_in_effect(stub_adapters: list[Path]) -> None:
    """As a request that continues after its adapter was unloaded. The adapter is not freed before its end."""
    backend = AdaptedStub(n_ctx=2048)
    options = RequestOptions(max_tokens=6, sampling=SamplingOptions(temperature=0.0))
    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache, n_seq_max=2) as model:
        thread = model._runner
        assert isinstance(thread, ModelThread)
        first, second = (model.load_adapter(path) for path in stub_adapters[:2])
        loaded = {adapter.path: adapter for adapter in thread.adapters.loaded}
        tickets = []

        def ask(scales: dict[Path, float]) -> None:
            ticket = Ticket(Request(np.array(PROMPT, np.int32), options), streaming=False)
            thread.submit(ticket, engine_adapter_set((loaded[path], scale) for path, scale in scales.items()))
            tickets.append((ticket, adapter_set(scales)))

        backend.gate.clear()
        ask({stub_adapters[0]: 0.5})
        first.unload()
        ask({stub_adapters[1]: 3.0, stub_adapters[0]: 2.0})
        second.unload()
        ask({})
        ask({stub_adapters[1]: 0.0, stub_adapters[0]: -1.0})
        backend.gate.set()
        for ticket, adapters in tickets:
            assert ticket.result().tokens == cold_stub(tuple(PROMPT), adapters, 6)
        wait_until(lambda: not backend.loaded)
        with pytest.raises(erllama.AdapterUnloaded, match="load it again"):
            ask({stub_adapters[0]: 1.0})
    assert backend.violations == []


def test_an_adapter_that_is_about_to_be_freed_can_still_be_used(stub_adapters: list[Path]) -> None:
    backend = AdaptedStub()
    adapters = Adapters(backend)
    adapter = adapters.attach(backend.load_adapter(stub_adapters[0]), stub_adapters[0], "digest", 1.0)
    adapters.detach(adapter)
    assert adapters.unused
    chosen = engine_adapter_set([(adapter, 2.0)])
    assert adapters.acquire("request", chosen) == chosen
    adapters.free_unused()
    assert len(backend.loaded) == 1
    adapters.release("request")
    adapters.free_unused()
    assert backend.loaded == []
    with pytest.raises(erllama.AdapterUnloaded):
        adapters.acquire("request", chosen)


def test_unloading_the_model_frees_its_adapters(tiny_gguf: Path, loras: list[Path]) -> None:
    """With requests in flight, and with logits that are still in use."""
    backend = llama_backend(tiny_gguf)
    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache) as model:
        adapter = model.load_adapter(loras[0])
        (native,) = backend._adapters.natives
        stream = model.stream(PROMPT, temperature=0.0)
        next(iter(stream))
        view = backend._context.logits()
        adapter.unload()
        assert not native.closed, "the request uses it"
    with pytest.raises(erllama.ModelUnloaded):
        stream.result()
    assert native.closed
    assert native._handle._pointer is not None, "the context lives as long as its logits are in use"
    del view
    assert native._handle._pointer is None


def test_no_adapter_set_starves(stub_adapters: list[Path]) -> None:
    """In order of arrival: a later request with the running set does not overtake a waiting one."""
    backend = AdaptedStub(n_ctx=4096)
    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache, n_seq_max=4) as model:
        adapter = model.load_adapter(stub_adapters[0])
        backend.gate.clear()
        streams = []
        for scale, n in ((1, 30), (1, 5), (0.5, 5), (1, 5), (1, 5), (0, 5)):
            adapter.scale = scale
            streams.append(model.stream(PROMPT, max_tokens=n, temperature=0.0))
        backend.gate.set()
        for stream in streams:
            stream.result()
    scales = [adapters[0][1] if adapters else 0 for adapters in backend.sets]
    assert [scale for scale, _ in groupby(scales)] == [1, 0.5, 1, 0]
    assert model.metrics.ticks < 30 + 5 + 5 + 5 + 12, "requests of one set run together"
    assert backend.violations == []
