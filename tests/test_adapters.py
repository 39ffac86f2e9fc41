"""Adapters: replies are libllama's own with them, and nothing computed with one set is ever used with another."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from numpy.typing import NDArray

import erllama
from erllama import llama_ffi
from erllama.engine import Batch
from erllama.engine.adapters import LoadedAdapter, recipe
from erllama.engine.backends.stub import StubBackend
from erllama.testing.bert import write_bert
from erllama.testing.models import LlamaShape, write_gemma3, write_lora, write_mamba
from support import in_threads, llama_backend, must_run, same_bits, wait_until

LIVES = int(os.environ.get("ERLLAMA_ADAPTERS", "200"))
PROMPT = [5 + i * 7 % 250 for i in range(150)]
# Control tokens, and bytes that are no character: text that comes back does not tell what they were.
NO_TEXT = [0, 1, 2, *range(3 + 0x80, 259)]
Used = tuple[tuple[str, float], ...]  # contents of adapters, by their digests, and scales


@pytest.fixture(scope="session")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four adapters for the tiny model: of all weights, of some, and of embeddings and output."""
    place = tmp_path_factory.mktemp("adapters")
    return [
        write_lora(place / "all.gguf", seed=1),
        write_lora(place / "wide.gguf", seed=2, rank=16, alpha=4.0),
        write_lora(place / "attention.gguf", seed=3, weights=("attn_q", "attn_v"), gain=2.0),
        write_lora(place / "ends.gguf", seed=4, weights=("token_embd", "output")),
    ]


class Native:
    def __init__(self, content: bytes) -> None:
        self.digest = hashlib.sha256(content).hexdigest()


class AdaptedStub(StubBackend):
    """A stub whose KV depends on the set of adapters that each token is computed with.

    Attributes:
        loaded: what was loaded and is not freed.
        used: the set that it computes with.
        gate: a decode waits for it.
        sets: what each decode was computed with.
        wrongs: what it was asked to do that no backend may be asked.
    """

    def __init__(self, **options: int) -> None:
        super().__init__(**options)
        self.loaded: list[object] = []
        self.used: Used = ()
        self.gate = threading.Event()
        self.gate.set()
        self.wrongs: list[str] = []
        self.in_use: list[object] = []
        self.sets: list[Used] = []

    def check_adapter(self, path: Path) -> None:
        if not path.exists() or not path.read_bytes().startswith(b"adapter"):
            raise erllama.AdapterLoadError(f"{path} is no adapter")

    def load_adapter(self, path: Path) -> object:
        self.loaded.append(Native(path.read_bytes()))
        return self.loaded[-1]

    def use_adapters(self, adapters: Sequence[tuple[object, float]]) -> None:
        if not all(adapter in self.loaded for adapter, _ in adapters):
            self.wrongs.append("used after it was freed")
        self.in_use = [adapter for adapter, _ in adapters]
        self.used = tuple((adapter.digest, scale) for adapter, scale in adapters if isinstance(adapter, Native))

    def free_adapter(self, adapter: object) -> None:
        if adapter in self.in_use or adapter not in self.loaded:
            self.wrongs.append("freed while in use, or twice")
        self.loaded.remove(adapter)

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        assert self.gate.wait(60)
        self.sets.append(self.used)
        mark = zlib.crc32(repr(self.used).encode()) >> 1 if self.used else 0
        return super().decode(batch._replace(tokens=batch.tokens.astype(np.int64) + mark))  # type: ignore[arg-type]


@pytest.fixture
def contents(tmp_path: Path) -> list[Path]:
    """Adapters for stubs."""
    paths = [tmp_path / f"{name}.bin" for name in "abcd"]
    for path in paths:
        path.write_bytes(b"adapter " + path.name.encode())
    return paths


def used(scales: Mapping[Path, float]) -> Used:
    """The set of some adapters, as a backend gets it."""
    in_effect = [(hashlib.sha256(path.read_bytes()).hexdigest(), scale) for path, scale in scales.items() if scale]
    return tuple(sorted(in_effect))


@cache
def cold_stub(prompt: tuple[int, ...], adapters: Used, n: int) -> tuple[int, ...]:
    """What a stub replies that computes with one set from its first decode on, and has no cache."""
    backend = AdaptedStub(n_ctx=512)
    backend.used = adapters
    with erllama.Cache(ram=0) as cache, erllama.load_backend(backend, cache=cache) as model:
        return model.complete(prompt, max_tokens=n, temperature=0.0).tokens


@contextmanager
def llama(path: Path, **options: object) -> Iterator[erllama.Model]:
    given: dict[str, object] = {"n_ctx": 1024, "n_threads": 2, "n_ubatch": 64, "warmup": False, **options}
    with erllama.Cache(block_size=32) as cache:
        with erllama.load_model(path, **{"cache": cache, **given}) as model:  # type: ignore[arg-type]
            yield model


def greedy(
    model: erllama.Model, prompt: Sequence[int] = PROMPT, n: int = 6, **options: object
) -> erllama.Completion:
    return model.complete(prompt, max_tokens=n, temperature=0.0, **options)  # type: ignore[arg-type]


# --- what replies are


@pytest.mark.parametrize("scales", [{0: 1.0}, {1: 0.5}, {3: -0.7}, {0: 0.5, 2: 1.5}, {1: 1.0, 3: 0.3}])
def test_logits_are_libllamas_own(tiny_gguf: Path, loras: list[Path], scales: dict[int, float]) -> None:
    """Bit for bit, of every decode of a request, against a context that this library's engine never saw."""
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
        greedy(model, reproducible=True)
    assert [len(tokens) for tokens in slices] == [64, 64, 21, 1, 1, 1, 1, 1, 1]

    with llama_ffi.LlamaModel(tiny_gguf) as native:
        context = llama_ffi.LlamaContext(
            native, n_ctx=1024, n_ubatch=64, n_seq_max=17, n_threads=2, n_threads_batch=2
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


def test_an_adapter_is_as_weights_with_it_merged(tiny_gguf: Path, loras: list[Path], tmp_path: Path) -> None:
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
        with llama(merged, kv_type_k="f32", kv_type_v="f32") as model:
            expected = greedy(model, n=1, logprobs=100).logprobs
        with llama(tiny_gguf, kv_type_k="f32", kv_type_v="f32") as model:
            without = greedy(model, n=1, logprobs=100).logprobs
            model.load_adapter(lora, scale=scale)
            found = greedy(model, n=1, logprobs=100).logprobs
        assert apart(found, expected) < 1e-2
        assert apart(found, without) > 0.3, "an adapter that changes nothing shows nothing"


def apart(one: object, other: object) -> float:
    """How far the first tokens' log-probabilities lie apart, at most; those not told count as the last told."""
    a, b = (dict(row[0].top) for row in (one, other))  # type: ignore[index]
    least_a, least_b = min(a.values()), min(b.values())
    return max(abs(a.get(token, least_a) - b.get(token, least_b)) for token in a.keys() | b.keys())


def test_scale_0_is_no_adapter_at_all(tiny_gguf: Path, loras: list[Path]) -> None:
    with llama(tiny_gguf) as model:
        plain = greedy(model)
        adapter = model.load_adapter(loras[0], scale=0)
        again = greedy(model)
        assert (again.tokens, again.cache.kind) == (plain.tokens, "exact")
        adapter.scale = 1
        assert greedy(model).cache.kind == "cold"
        for nothing in (0.0, -0.0, 1e-50):  # the last is 0 as a 32-bit number
            adapter.scale = nothing
            assert greedy(model).cache.kind == "exact"
            assert greedy(model, reproducible=True).tokens == plain.tokens
            adapter.scale = 1
        adapter.unload()
        assert greedy(model).cache.kind == "exact"


def test_the_model_is_as_before_when_its_adapters_are_gone(tiny_gguf: Path, loras: list[Path]) -> None:
    """Bit for bit: an adapter leaves nothing behind."""
    with llama(tiny_gguf) as model:
        before = greedy(model, n=4, reproducible=True, logprobs=20)
        for lora in loras:
            model.load_adapter(lora)
        assert greedy(model, n=4, reproducible=True, logprobs=20).logprobs != before.logprobs
        for adapter in model.adapters:
            adapter.unload()
        model.cache.evict_bytes(1 << 40)
        after = greedy(model, n=4, reproducible=True, logprobs=20)
    assert after.cache.kind == "cold"
    assert after.logprobs == before.logprobs


# --- what a user holds


def test_adapters_are_listed_with_their_scales(tiny_gguf: Path, loras: list[Path]) -> None:
    with llama(tiny_gguf) as model:
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


def test_any_thread_may_load_scale_and_unload(contents: list[Path]) -> None:
    backend = AdaptedStub(n_ctx=512)
    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache) as model:

        def work(number: int) -> None:
            dice = random.Random(number)
            for _ in range(30):
                adapter = model.load_adapter(dice.choice(contents), scale=dice.choice([0, 0.5, 1]))
                assert len(greedy(model, PROMPT[: dice.randrange(1, 150)], 3).tokens) <= 3
                adapter.scale = dice.choice([0, 0.5, 1])
                adapter.unload()

        in_threads(work, 6)
        wait_until(lambda: not backend.loaded)
        assert model.adapters == ()
        assert greedy(model).tokens == cold_stub(tuple(PROMPT), (), 6)
    assert backend.wrongs == []


# --- what the cache keeps apart


def test_each_set_has_a_cache_of_its_own(tiny_gguf: Path, loras: list[Path]) -> None:
    """In the context's cells and in RAM, whatever the order in which adapters were loaded."""
    sets: list[dict[int, float]] = [{}, {0: 1.0}, {0: 0.5}, {1: 1.0}, {0: 1.0, 1: 0.5}, {0: 0.5, 1: 1.0}]
    replies = {}
    for evict in (False, True):
        with llama(tiny_gguf, n_ctx=4096) as model:
            for kind in ("cold", "exact"):
                for i, scales in enumerate(sets):
                    order = sorted(scales, reverse=kind == "exact")
                    adapters = [model.load_adapter(loras[a], scale=scales[a]) for a in order]
                    assert model.cached_prefix(PROMPT) == (0 if kind == "cold" else len(PROMPT) - 1)
                    reply = greedy(model)
                    assert (i, reply.cache.kind) == (i, kind)
                    assert replies.setdefault(i, reply.tokens) == reply.tokens
                    for adapter in adapters:
                        adapter.unload()
                if evict:
                    model.evict()
    assert len(set(replies.values())) == len(sets)


def test_an_adapter_is_known_by_its_content_after_a_restart(
    tiny_gguf: Path, loras: list[Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy.gguf"
    hits = []
    for source, scale in ((loras[0], 1.0), (loras[0], 1.0), (loras[1], 1.0), (loras[0], 0.5), (None, 0.0)):
        if source is not None:
            shutil.copy(source, copy)
        with (
            erllama.Cache(disk=tmp_path / "kv", ram=0, block_size=32) as cache,
            llama(tiny_gguf, cache=cache) as model,
        ):
            if source is not None:
                model.load_adapter(copy, scale=scale)
            reply = greedy(model)
            hits.append((reply.cache.kind, reply.cache.tier))
    assert hits == [("cold", None), ("exact", "disk"), ("cold", None), ("cold", None), ("cold", None)]


def test_who_runs_shares_with_nobody_of_another_set(contents: list[Path]) -> None:
    """Not running cells, nor what another is about to compute; of one set, both."""
    backend = AdaptedStub(n_ctx=2048)
    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache) as model:
        adapter = model.load_adapter(contents[0], scale=0)
        backend.gate.clear()
        streams = []
        for scale in (0, 1):
            adapter.scale = scale
            streams += [model.stream(PROMPT, max_tokens=5, temperature=0.0) for _ in range(2)]
        backend.gate.set()
        replies = [stream.result() for stream in streams]
    assert [reply.cache.kind for reply in replies] == ["cold", "exact", "cold", "exact"]
    wanted = [cold_stub(tuple(PROMPT), adapters, 5) for adapters in ((), used({contents[0]: 1.0}))]
    assert [reply.tokens for reply in replies] == [wanted[0]] * 2 + [wanted[1]] * 2
    assert wanted[0] != wanted[1]


def test_a_session_does_not_go_on_in_cells_of_another_set(contents: list[Path]) -> None:
    """It keeps one context: of the set that it was last in."""
    with erllama.Cache(ram=0) as cache, erllama.load_backend(AdaptedStub(), cache=cache) as model:
        live = model._runner._scheduler.live
        first = greedy(model, session_id="s")
        adapter = model.load_adapter(contents[0])
        second = greedy(model, first.context_tokens, session_id="s")
        assert second.cache.kind == "cold"
        assert second.tokens == cold_stub(first.context_tokens, used({contents[0]: 1.0}), 6)
        assert [parked.session_id for parked in live.parked].count("s") == 1
        third = greedy(model, second.context_tokens, session_id="s")
        assert third.cache.tokens == len(second.context_tokens) - 1
        adapter.scale = 0.5
        assert model.end_session("s"), "whatever the set now is"
        assert not model.end_session("s")


def test_a_session_has_one_request_at_a_time_whatever_the_set(contents: list[Path]) -> None:
    backend = AdaptedStub()
    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache) as model:
        adapter = model.load_adapter(contents[0], scale=0)
        backend.gate.clear()
        stream = model.stream(PROMPT, max_tokens=3, session_id="s")
        adapter.scale = 1
        with pytest.raises(erllama.SessionBusy):
            model.complete(PROMPT, session_id="s")
        backend.gate.set()
        stream.result()


def test_a_parent_of_another_set_is_none(tiny_gguf: Path, loras: list[Path]) -> None:
    with llama(tiny_gguf) as model:
        parent = model.complete("a text to go on from", max_tokens=8, temperature=0.0, banned_tokens=NO_TEXT)
        going_on = "a text to go on from" + parent.text + " and on"
        ids = model.complete(going_on, max_tokens=1, parent_key=parent.finish_key).context_tokens
        assert ids[: len(parent.context_tokens) - 1] == parent.context_tokens[:-1]
        model.load_adapter(loras[0])
        reply = model.complete(going_on, max_tokens=1, parent_key=parent.finish_key)
        assert reply.cache.kind == "cold"
        assert reply.context_tokens[:-1] == tuple(model.tokenize(going_on, parse_special=True).tolist())


def test_a_chat_is_remembered_under_its_set(tiny_gguf: Path, loras: list[Path]) -> None:
    """The tokens that a reply was sampled as are those of the next turn with the same adapters, and of no other."""
    with llama(tiny_gguf) as model:
        adapter = model.load_adapter(loras[0])
        question: list[dict[str, object]] = [{"role": "user", "content": "hello"}]
        reply = model.chat(question, max_tokens=12, temperature=0.0, banned_tokens=NO_TEXT)
        messages = [*question, reply.message, {"role": "user", "content": "go on"}]
        n = len(reply.context_tokens)
        text = model.tokenize(model.render_chat(messages), parse_special=True).tolist()
        assert tuple(text[:n]) != reply.context_tokens, "a reply that is spelled as it would be read shows nothing"
        adapter.scale = 0.5
        assert model.apply_chat_template(messages).tolist() == text
        adapter.scale = 1.0
        assert tuple(model.apply_chat_template(messages)[:n].tolist()) == reply.context_tokens
        second = model.chat(messages, max_tokens=4, temperature=0.0)
        assert second.cache.tokens >= n - 1


def test_a_chat_under_way_is_remembered_under_the_set_it_began_with(tiny_gguf: Path, loras: list[Path]) -> None:
    with llama(tiny_gguf) as model:
        adapter = model.load_adapter(loras[0])
        question: list[dict[str, object]] = [{"role": "user", "content": "hello"}]
        stream = model.stream_chat(question, max_tokens=12, temperature=0.0, banned_tokens=NO_TEXT)
        adapter.scale = 0.5
        reply = stream.result()
        messages = [*question, reply.message]
        n = len(reply.context_tokens)
        assert tuple(model.apply_chat_template(messages)[:n].tolist()) != reply.context_tokens
        adapter.scale = 1.0
        assert tuple(model.apply_chat_template(messages)[:n].tolist()) == reply.context_tokens


def test_what_is_prefilled_is_prefilled_for_a_set(tiny_gguf: Path, loras: list[Path]) -> None:
    with llama(tiny_gguf) as model:
        adapter = model.load_adapter(loras[0])
        model.prefill(PROMPT)
        assert model.cached_prefix(PROMPT) == len(PROMPT) - 1
        adapter.scale = 0.9
        assert model.cached_prefix(PROMPT) == 0
        adapter.scale = 1.0
        assert greedy(model).cache.kind == "exact"


@pytest.mark.parametrize("n_adapters", [1, 2])
def test_a_warm_reply_has_the_bits_of_a_cold_one(tiny_gguf: Path, loras: list[Path], n_adapters: int) -> None:
    """After the adapters were loaded anew, too: then they lie elsewhere in memory."""
    with llama(tiny_gguf) as model:
        replies = []
        for _ in range(2):
            adapters = [model.load_adapter(lora, scale=0.8) for lora in loras[:n_adapters]]
            replies += [greedy(model, reproducible=True, logprobs=10) for _ in range(2)]
            for adapter in adapters:
                adapter.unload()
    assert [reply.cache.kind for reply in replies] == ["cold", "exact", "exact", "exact"]
    assert all(reply.logprobs == replies[0].logprobs for reply in replies)


def test_of_three_adapters_bits_are_promised_as_long_as_they_are_loaded(tiny_gguf: Path, loras: list[Path]) -> None:
    """libllama adds what three or more contribute in an order that depends on where they lie."""
    with llama(tiny_gguf) as model:
        for kinds in (("exact",), ("partial",)):  # blocks that were there before and end no slice are not replaced
            adapters = [model.load_adapter(lora) for lora in loras[:3]]
            cold = greedy(model, reproducible=True, logprobs=10)
            assert cold.cache.kind == "cold"
            warm = greedy(model, reproducible=True, logprobs=10)
            assert warm.cache.kind in kinds
            assert warm.logprobs == cold.logprobs
            assert greedy(model).cache.kind == "exact", "the KV is good for whoever asks for no bits"
            for adapter in adapters:
                adapter.unload()
    loaded = [(LoadedAdapter(None, Path(), "", 1.0), 1.0) for _ in range(4)]
    one, other = (recipe(b"0" * 16, tuple(picked)) for picked in (loaded[:3], loaded[1:]))  # type: ignore[arg-type]
    assert one != other
    assert recipe(b"0" * 16, tuple(loaded[:2])) == b"0" * 16  # type: ignore[arg-type]


@pytest.mark.parametrize(("make", "architecture"), [(write_gemma3, "gemma3"), (write_mamba, "mamba")])
def test_models_whose_memory_cannot_be_cut(make: Callable[[Path], Path], architecture: str, tmp_path: Path) -> None:
    path = make(tmp_path / "model.gguf")
    lora = write_lora(tmp_path / "lora.gguf", weights=("output",), seed=5, architecture=architecture)
    with llama(path) as model:
        plain = greedy(model)
        adapter = model.load_adapter(lora)
        changed = greedy(model)
        assert changed.cache.kind == "cold"
        assert changed.tokens != plain.tokens
        again = greedy(model)
        assert (again.tokens, again.cache.kind) == (changed.tokens, "exact")
        adapter.unload()
        again = greedy(model)
        assert (again.tokens, again.cache.kind) == (plain.tokens, "exact")


# --- requests in flight


def test_requests_in_flight_keep_their_set(contents: list[Path]) -> None:
    """Those that run, and those that wait, whatever happens to adapters meanwhile."""
    backend = AdaptedStub(n_ctx=2048)
    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache, n_seq_max=2) as model:
        first = model.load_adapter(contents[0])
        streams: list[tuple[erllama.Stream, Used]] = []

        def ask(scales: dict[Path, float]) -> None:
            streams.append((model.stream(PROMPT, max_tokens=20, temperature=0.0), used(scales)))

        ask({contents[0]: 1.0})
        next(iter(streams[0][0]))
        backend.gate.clear()  # in the midst of the reply
        first.scale = 0.5
        ask({contents[0]: 0.5})
        first.scale = 2.0
        ask({contents[0]: 2.0})
        first.unload()
        ask({})
        backend.gate.set()
        second = model.load_adapter(contents[1], scale=-1.0)
        ask({contents[1]: -1.0})
        for stream, adapters in streams:
            assert stream.result().tokens == cold_stub(tuple(PROMPT), adapters, 20)
        second.unload()
        wait_until(lambda: not backend.loaded)
    assert backend.wrongs == []
    assert len({adapters for _, adapters in streams}) == 5


def test_an_unloaded_adapter_is_freed_when_the_last_request_with_it_has_ended(contents: list[Path]) -> None:
    backend = AdaptedStub(n_ctx=2048)
    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache, n_seq_max=1) as model:
        adapter = model.load_adapter(contents[0])
        backend.gate.clear()
        running, waiting, dropped = (model.stream(PROMPT, max_tokens=3, temperature=0.0) for _ in range(3))
        adapter.unload()
        dropped.cancel()
        backend.gate.set()
        assert running.result().tokens == cold_stub(tuple(PROMPT), used({contents[0]: 1.0}), 3)
        assert waiting.result().tokens == cold_stub(tuple(PROMPT), used({contents[0]: 1.0}), 3)
        wait_until(lambda: not backend.loaded)
    assert backend.wrongs == []


def test_an_adapter_outlives_no_request_that_was_refused(contents: list[Path]) -> None:
    backend = AdaptedStub(n_ctx=512)
    with erllama.Cache() as cache:
        with erllama.load_backend(backend, cache=cache, n_seq_max=1, max_pending=1) as model:
            adapter = model.load_adapter(contents[0])
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
    assert backend.wrongs == []


def test_unloading_the_model_frees_its_adapters(tiny_gguf: Path, loras: list[Path]) -> None:
    """With requests in flight, and with logits that somebody still looks at."""
    backend = llama_backend(tiny_gguf)
    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache) as model:
        adapter = model.load_adapter(loras[0])
        (native,) = backend._loaded_adapters
        stream = model.stream(PROMPT, temperature=0.0)
        next(iter(stream))
        view = backend._context.logits()
        adapter.unload()
        assert not native.closed, "the request uses it"
    with pytest.raises(erllama.ModelUnloaded):
        stream.result()
    assert native.closed
    assert native._handle._pointer is not None, "the context is alive as long as its logits are looked at"
    del view
    assert native._handle._pointer is None


def test_nobody_starves(contents: list[Path]) -> None:
    """First come, first served: who comes later with the set that runs does not go before who waits."""
    backend = AdaptedStub(n_ctx=4096)
    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache, n_seq_max=4) as model:
        adapter = model.load_adapter(contents[0])
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
    assert model.metrics.ticks < 30 + 5 + 5 + 5 + 12, "those of one set run together"
    assert backend.wrongs == []


# --- anything, in any order


class Asked(NamedTuple):
    stream: erllama.Stream
    prompt: tuple[int, ...]
    adapters: tuple[tuple[Path, float], ...]
    reproducible: bool


class Life:
    """A model's life among adapters: whatever may happen, in an order that dice decide.

    Args:
        make: loads the model, over a cache.
        paths: adapters that there are.
        check: whether a reply is that of a model which never knew other adapters.
        banned: tokens that no reply has.
    """

    def __init__(
        self,
        seed: int,
        make: Callable[[erllama.Cache], erllama.Model],
        paths: Sequence[Path],
        check: Callable[[Asked, erllama.Completion], None],
        banned: Sequence[int] = (),
    ) -> None:
        self.dice, self.banned = random.Random(seed), banned
        self.make, self.paths, self.check = make, paths, check
        self.adapters: list[erllama.Adapter] = []
        self.asked: list[Asked] = []

    def live(self, cache: erllama.Cache, steps: int) -> int:
        """How many replies were checked."""
        n_checked = 0
        self.model = self.make(cache)
        try:
            for _ in range(steps):
                n_checked += self.step(cache)
            return n_checked + self.collect()
        finally:
            self.model.unload()

    def step(self, cache: erllama.Cache) -> int:
        dice = self.dice
        what = dice.choices(
            ["ask", "load", "scale", "unload", "collect", "evict", "again"], [8, 3, 3, 2, 2, 1, 0.5]
        )[0]
        if what == "ask":
            self.ask()
        elif what == "load" and len(self.adapters) < 3:
            scale = dice.choice([0.0, 0.5, 1.0])
            self.adapters.append(self.model.load_adapter(dice.choice(self.paths), scale=scale))
        elif what == "scale" and self.adapters:
            dice.choice(self.adapters).scale = dice.choice([0.0, 0.5, 1.0])
        elif what == "unload" and self.adapters:
            self.adapters.pop(dice.randrange(len(self.adapters))).unload()
        elif what == "evict":
            dice.choice([self.model.evict, lambda: cache.evict_bytes(1 << 16)])()
        elif what in ("collect", "again"):
            n = self.collect()
            if what == "again":
                self.model.unload()
                self.adapters.clear()
                self.model = self.make(cache)
            return n
        return 0

    def ask(self) -> None:
        dice = self.dice
        start = dice.choice([0, 0, 0, 50])
        prompt = tuple(PROMPT[start : start + dice.choice([20, 64, 65, 100])])
        reproducible = dice.random() < 0.4
        session = dice.choice([None, None, f"s{len(self.asked)}"])
        in_effect = tuple((adapter.path, adapter.scale) for adapter in self.model.adapters if adapter.scale)
        stream = self.model.stream(
            prompt,
            max_tokens=3,
            temperature=0.0,
            reproducible=reproducible,
            session_id=session,
            logprobs=20,
            banned_tokens=self.banned,
        )
        self.asked.append(Asked(stream, prompt, in_effect, reproducible))

    def collect(self) -> int:
        asked, self.asked = self.asked, []
        for one in asked:
            self.check(one, one.stream.result())
        return len(asked)


def test_no_reply_is_of_another_set_whatever_happens(contents: list[Path], tmp_path: Path) -> None:
    """Stubs: any wrong token's KV in any place changes a reply."""
    backends: list[AdaptedStub] = []

    def make(cache: erllama.Cache) -> erllama.Model:
        backends.append(AdaptedStub(n_ctx=400, n_ubatch=32))
        return erllama.load_backend(backends[-1], cache=cache, n_seq_max=3)

    def check(asked: Asked, reply: erllama.Completion) -> None:
        adapters = tuple(sorted((hashlib.sha256(p.read_bytes()).hexdigest(), s) for p, s in asked.adapters))
        assert reply.tokens == cold_stub(asked.prompt, adapters, 3)

    warm = 0
    for seed in range(LIVES):
        with erllama.Cache(ram="64KiB", disk=tmp_path / "kv" if seed % 4 == 0 else None, block_size=16) as cache:
            Life(seed, make, contents, check).live(cache, steps=25)
            counters = cache.counters()
            warm += counters["hits_exact"] + counters["hits_longest_prefix"]
    assert not any(backend.wrongs for backend in backends)
    assert warm > LIVES, "nothing was warm, so nothing was shown"


def test_no_reply_is_of_another_set_whatever_happens_in_libllama(
    tiny_gguf: Path, loras: list[Path], tmp_path: Path
) -> None:
    """Where bits are promised, a cold run's; else its numbers, but for rounding."""
    known: dict[tuple[tuple[int, ...], tuple[tuple[Path, float], ...]], erllama.Completion] = {}
    nearest = np.inf

    def make(cache: erllama.Cache) -> erllama.Model:
        return erllama.load_model(
            tiny_gguf, cache=cache, n_ctx=512, n_threads=1, n_ubatch=32, n_seq_max=3, warmup=False
        )

    def cold(prompt: tuple[int, ...], adapters: tuple[tuple[Path, float], ...]) -> erllama.Completion:
        adapters = tuple(sorted(adapters))
        if (prompt, adapters) not in known:
            for path, scale in adapters:
                reference.load_adapter(path, scale=scale)
            known[prompt, adapters] = greedy(
                reference, prompt, 3, reproducible=True, logprobs=20, banned_tokens=[2]
            )
            assert known[prompt, adapters].cache.tokens == 0
            reference.evict()
            forgetful.evict_bytes(1 << 40)
            for adapter in reference.adapters:
                adapter.unload()
        return known[prompt, adapters]

    def check(asked: Asked, reply: erllama.Completion) -> None:
        nonlocal nearest
        expected = cold(asked.prompt, asked.adapters)
        if asked.reproducible and len(asked.adapters) < 3:
            assert reply.logprobs == expected.logprobs
        assert apart(reply.logprobs, expected.logprobs) < 0.03
        for (prompt, adapters), other in known.items():
            if prompt == asked.prompt and summed(adapters) != summed(asked.adapters):
                nearest = min(nearest, apart(reply.logprobs, other.logprobs))

    n_checked = 0
    with erllama.Cache(ram=0) as forgetful, make(forgetful) as reference:
        for seed in range(LIVES):
            with erllama.Cache(disk=tmp_path / "kv" if seed % 4 == 0 else None, block_size=16) as cache:
                n_checked += Life(seed, make, loras, check, banned=[2]).live(cache, steps=12)
    assert n_checked > LIVES
    assert nearest > 0.03, "sets whose replies are alike show nothing"


def summed(adapters: tuple[tuple[Path, float], ...]) -> dict[Path, float]:
    """What a set comes to: one file may be in it twice."""
    return {path: sum(scale for other, scale in adapters if other == path) for path, _ in adapters}


# --- what is refused


def refused(model: erllama.Model, path: Path, words: str) -> None:
    with pytest.raises(erllama.AdapterLoadError, match=words) as caught:
        model.load_adapter(path)
    assert str(path) in str(caught.value)
    assert model.adapters == ()


def test_files_that_are_no_adapters_for_a_model(
    tiny: erllama.Model, tiny_gguf: Path, loras: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "bad.gguf"
    refused(tiny, path, "does not exist")
    refused(tiny, tmp_path, "directory")
    path.touch()
    refused(tiny, path, "empty")
    path.write_bytes(b"PK\x03\x04 safetensors")
    refused(tiny, path, "not a GGUF file")
    refused(tiny, tiny_gguf, "no adapter")
    write_lora(path, LlamaShape(2, 128, 256, 2, 1))
    refused(tiny, path, "do not fit")
    write_lora(path, LlamaShape(3, 64, 128, 2, 1))
    refused(tiny, path, "'blk.2.attn_k.weight', which the model does not have")
    write_lora(path, architecture="qwen2")
    refused(tiny, path, "architecture 'qwen2', and this one's is 'llama'")
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
        ({"general.type": None}, "no adapter"),
        ({"adapter.type": "vera"}, "'vera'"),
        ({"adapter.alora.invocation_tokens": [1, 2]}, "aLoRA"),
        ({"adapter.lora.alpha": "8"}, "alpha is '8'"),
        ({"blk.0.attn_q.weight.lora_b": None}, "one of a pair"),
        ({"blk.0.attn_q.weight.lora_c": np.zeros((4, 64), np.float32)}, "one of a pair"),
        ({"blk.0.attn_q.weight.lora_a": np.zeros((5, 64), np.float32)}, "shapes 64x5 and 4x64"),
        ({"blk.0.attn_q.weight.lora_a": np.zeros((2, 4, 64), np.float32)}, "64x4x2"),
        ({"blk.0.attn_q.weight.lora_a": np.zeros((4, 64), np.int8)}, "of a type"),
        ({"blk.0.attn_q.weight.lora_a": np.zeros((4, 64), np.float64)}, "of a type"),
    ],
)
def test_what_libllama_would_stumble_over(
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
    tiny.load_adapter(path).unload()  # good as it is
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


def test_embeddings_that_are_the_output_too(tiny_gguf: Path, tmp_path: Path) -> None:
    """libllama would use the pair for both, and stop on an assertion."""
    tied = tmp_path / "tied.gguf"
    write_tied(tiny_gguf, tied)
    lora = write_lora(tmp_path / "lora.gguf", weights=("token_embd",))
    with llama(tied) as model:
        refused(model, lora, "which is the model's output, too")
        model.load_adapter(write_lora(tmp_path / "good.gguf", weights=("attn_q",)))
        greedy(model)


def write_tied(source: Path, target: Path) -> None:
    """A model's file without its output, for which libllama takes the embeddings."""
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


def test_a_file_that_changes_while_it_is_loaded(tiny_gguf: Path, loras: list[Path], tmp_path: Path) -> None:
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
        assert not backend._loaded_adapters


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), 1e39, "1", None, True, [1.0]])
def test_scales_that_are_none(tiny: erllama.Model, loras: list[Path], scale: float) -> None:
    with pytest.raises(erllama.OptionError, match="scale"):
        tiny.load_adapter(loras[0], scale=scale)
    adapter = tiny.load_adapter(loras[0], scale=0.5)
    with pytest.raises(erllama.OptionError, match="scale"):
        adapter.scale = scale
    assert adapter.scale == 0.5


def test_options_that_are_none(tiny: erllama.Model, loras: list[Path]) -> None:
    with pytest.raises(erllama.OptionError, match="did you mean 'scale'"):
        tiny.load_adapter(loras[0], scales=1.0)  # type: ignore[call-arg]
    for path in (None, 5, "", b"x.gguf"):
        with pytest.raises(erllama.OptionError, match="path"):
            tiny.load_adapter(path)  # type: ignore[arg-type]


def test_models_without_adapters(tiny_gguf: Path, loras: list[Path], tmp_path: Path) -> None:
    with erllama.Cache() as cache, erllama.load_backend(StubBackend(), cache=cache) as model:
        with pytest.raises(erllama.Unsupported, match="StubBackend, has no `load_adapter`"):
            model.load_adapter(loras[0])
        assert model.adapters == ()
    with erllama.load_model(tiny_gguf, vocab_only=True) as model:
        with pytest.raises(erllama.VocabularyOnly):
            model.load_adapter(loras[0])
        assert model.adapters == ()
    with llama(write_bert(tmp_path / "bert.gguf")) as model:
        with pytest.raises(erllama.Unsupported, match="only encodes"):
            model.load_adapter(loras[0])


def test_adapters_of_other_models_are_refused_below(tiny_gguf: Path, loras: list[Path]) -> None:
    """By the binding: libllama would use freed, or foreign, memory."""
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
            assert adapter._handle._pointer is not None, "the context computes with it"
            context.set_adapters([])
            assert adapter._handle._pointer is None
        foreign.close()
    with llama_ffi.LlamaModel(tiny_gguf, vocab_only=True) as words:
        with pytest.raises(llama_ffi.LlamaError, match="vocab_only"):
            llama_ffi.LlamaAdapter(words, loras[0])


def test_a_backend_that_fails_with_adapters_fails_its_requests_alone(contents: list[Path]) -> None:
    backend = AdaptedStub()
    use = backend.use_adapters

    def failing(adapters: Sequence[tuple[object, float]]) -> None:
        if adapters:
            raise erllama.BackendError("no memory for adapters")
        use(adapters)

    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache) as model:
        plain = greedy(model)
        backend.use_adapters = failing  # type: ignore[method-assign]
        adapter = model.load_adapter(contents[0])
        with pytest.raises(erllama.BackendError, match="no memory for adapters"):
            greedy(model)
        adapter.unload()
        assert greedy(model).tokens == plain.tokens
        wait_until(lambda: not backend.loaded)


def test_embeddings_are_computed_beside_adapters(tiny_gguf: Path, loras: list[Path]) -> None:
    """Without them, and while they come and go."""
    with llama(tiny_gguf) as model:
        expected = model.embed("a text")

        def work(number: int) -> None:
            for _ in range(30):
                if number:
                    np.testing.assert_array_equal(model.embed("a text"), expected)
                else:
                    model.load_adapter(loras[0])
                    greedy(model, n=1)
                    model.adapters[0].unload()

        in_threads(work, 2)


FUZZ = """
import sys
from pathlib import Path
import erllama
sys.path.append(sys.argv[7])
from damage import damaged
model_path, source, target = sys.argv[1], sys.argv[2], Path(sys.argv[3])
first, last, header = map(int, sys.argv[4:7])
content = Path(source).read_bytes()
loaded = refused = 0
with erllama.Cache() as cache, erllama.load_model(model_path, n_ctx=256, n_threads=1, cache=cache) as model:
    plain = model.complete("hello", max_tokens=3, temperature=0.0).tokens
    for seed in range(first, last):
        print("seed", seed, flush=True)
        target.write_bytes(damaged(content, seed, header))
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


def test_flipped_bytes_in_an_adapters_header(tiny_gguf: Path, tmp_path: Path) -> None:
    """Refused, or loaded where the flip does not matter; never the end of the process."""
    lora = write_lora(
        tmp_path / "lora.gguf", LlamaShape(1, 64, 128, 2, 1), weights=("attn_q", "ffn_down", "token_embd")
    )
    header = int(GGUFReader(lora).data_offset)
    first = int(os.environ.get("ERLLAMA_FUZZ_FIRST", "0"))
    n = int(os.environ.get("ERLLAMA_FUZZ_N", "600"))
    flipped = tmp_path / "flipped.gguf"
    output = must_run(
        FUZZ, tiny_gguf, lora, flipped, first, first + n, header, Path(__file__).parent, timeout=60 + n
    )
    loaded, n_refused = map(int, output.splitlines()[-1].split())
    assert loaded + n_refused == n
    assert n_refused > n // 4
    assert loaded > n // 40, "most flips are in names and sizes, which all must fit"
