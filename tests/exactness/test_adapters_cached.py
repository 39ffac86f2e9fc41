"""KV computed with one set of adapters is never used with another, in any order of calls."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import erllama
from erllama.engine.adapters import LoadedAdapter, derive_recipe
from erllama.testing.models import write_gemma3, write_lora, write_mamba
from support.adapters import (
    N_EXAMPLES,
    PROMPT,
    TEXTLESS_TOKENS,
    AdaptedStub,
    adapter_set,
    cold_stub,
    greedy_reply,
    load_llama,
    logprob_distance,
)

# --- what the cache keeps apart


def test_each_adapter_set_has_its_own_kv(tiny_gguf: Path, loras: list[Path]) -> None:
    """In cells and in RAM, for every order of loading the adapters."""
    sets: list[dict[int, float]] = [{}, {0: 1.0}, {0: 0.5}, {1: 1.0}, {0: 1.0, 1: 0.5}, {0: 0.5, 1: 1.0}]
    replies = {}
    for evict in (False, True):
        with load_llama(tiny_gguf, n_ctx=4096) as model:
            for kind in ("cold", "exact"):
                for i, scales in enumerate(sets):
                    order = sorted(scales, reverse=kind == "exact")
                    adapters = [model.load_adapter(loras[a], scale=scales[a]) for a in order]
                    assert model.cached_prefix(PROMPT) == (0 if kind == "cold" else len(PROMPT) - 1)
                    reply = greedy_reply(model)
                    assert (i, reply.cache.kind) == (i, kind)
                    assert replies.setdefault(i, reply.tokens) == reply.tokens
                    for adapter in adapters:
                        adapter.unload()
                if evict:
                    model.evict()
    assert len(set(replies.values())) == len(sets)


def test_an_adapter_is_identified_by_content_after_a_restart(
    tiny_gguf: Path, loras: list[Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy.gguf"
    hits = []
    for source, scale in ((loras[0], 1.0), (loras[0], 1.0), (loras[1], 1.0), (loras[0], 0.5), (None, 0.0)):
        if source is not None:
            shutil.copy(source, copy)
        with (
            erllama.Cache(disk=tmp_path / "kv", ram=0, block_size=32) as cache,
            load_llama(tiny_gguf, cache=cache) as model,
        ):
            if source is not None:
                model.load_adapter(copy, scale=scale)
            reply = greedy_reply(model)
            hits.append((reply.cache.kind, reply.cache.tier))
    assert hits == [("cold", None), ("exact", "disk"), ("cold", None), ("cold", None), ("cold", None)]


def test_running_requests_share_no_cells_across_adapter_sets(stub_adapters: list[Path]) -> None:
    """Requests of one set share running cells and upcoming prefixes. Requests of different sets share neither."""
    backend = AdaptedStub(n_ctx=2048)
    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache) as model:
        adapter = model.load_adapter(stub_adapters[0], scale=0)
        backend.gate.clear()
        streams = []
        for scale in (0, 1):
            adapter.scale = scale
            streams += [model.stream(PROMPT, max_tokens=5, temperature=0.0) for _ in range(2)]
        backend.gate.set()
        replies = [stream.result() for stream in streams]
    assert [reply.cache.kind for reply in replies] == ["cold", "exact", "cold", "exact"]
    wanted = [cold_stub(tuple(PROMPT), adapters, 5) for adapters in ((), adapter_set({stub_adapters[0]: 1.0}))]
    assert [reply.tokens for reply in replies] == [wanted[0]] * 2 + [wanted[1]] * 2
    assert wanted[0] != wanted[1]


def test_a_session_does_not_reuse_cells_of_another_adapter_set(stub_adapters: list[Path]) -> None:
    """A session keeps one context: that of the set it used last."""
    with erllama.Cache(ram=0) as cache, erllama.load_backend(AdaptedStub(), cache=cache) as model:
        slots = model._runner._scheduler.slots
        first = greedy_reply(model, session_id="s")
        adapter = model.load_adapter(stub_adapters[0])
        second = greedy_reply(model, first.context_tokens, session_id="s")
        assert second.cache.kind == "cold"
        assert second.tokens == cold_stub(first.context_tokens, adapter_set({stub_adapters[0]: 1.0}), 6)
        assert [parked.session_id for parked in slots.parked].count("s") == 1
        third = greedy_reply(model, second.context_tokens, session_id="s")
        assert third.cache.tokens == len(second.context_tokens) - 1
        adapter.scale = 0.5
        assert model.end_session("s"), "the current set does not matter"
        assert not model.end_session("s")


def test_a_session_has_one_request_at_a_time_for_all_adapter_sets(stub_adapters: list[Path]) -> None:
    backend = AdaptedStub()
    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache) as model:
        adapter = model.load_adapter(stub_adapters[0], scale=0)
        backend.gate.clear()
        stream = model.stream(PROMPT, max_tokens=3, session_id="s")
        adapter.scale = 1
        with pytest.raises(erllama.SessionBusy):
            model.complete(PROMPT, session_id="s")
        backend.gate.set()
        stream.result()


def test_a_parent_key_of_another_adapter_set_is_a_miss(tiny_gguf: Path, loras: list[Path]) -> None:
    with load_llama(tiny_gguf) as model:
        parent = model.complete(
            "a text to go on from", max_tokens=8, temperature=0.0, banned_tokens=TEXTLESS_TOKENS
        )
        going_on = "a text to go on from" + parent.text + " and on"
        ids = model.complete(going_on, max_tokens=1, parent_key=parent.finish_key).context_tokens
        assert ids[: len(parent.context_tokens) - 1] == parent.context_tokens[:-1]
        model.load_adapter(loras[0])
        reply = model.complete(going_on, max_tokens=1, parent_key=parent.finish_key)
        assert reply.cache.kind == "cold"
        assert reply.context_tokens[:-1] == tuple(model.tokenize(going_on, parse_special=True).tolist())


def test_a_chat_is_remembered_with_its_adapter_set(tiny_gguf: Path, loras: list[Path]) -> None:
    """The next turn reuses the sampled tokens of a reply only with the same adapters."""
    with load_llama(tiny_gguf) as model:
        adapter = model.load_adapter(loras[0])
        question: list[dict[str, object]] = [{"role": "user", "content": "hello"}]
        reply = model.chat(question, max_tokens=12, temperature=0.0, banned_tokens=TEXTLESS_TOKENS)
        messages = [*question, reply.message, {"role": "user", "content": "go on"}]
        n = len(reply.context_tokens)
        text = model.tokenize(model.render_chat(messages), parse_special=True).tolist()
        assert tuple(text[:n]) != reply.context_tokens, "a reply with the tokens of its text proves nothing"
        adapter.scale = 0.5
        assert model.apply_chat_template(messages).tolist() == text
        adapter.scale = 1.0
        assert tuple(model.apply_chat_template(messages)[:n].tolist()) == reply.context_tokens
        second = model.chat(messages, max_tokens=4, temperature=0.0)
        assert second.cache.tokens >= n - 1


def test_a_running_chat_is_remembered_with_the_set_it_started_with(tiny_gguf: Path, loras: list[Path]) -> None:
    with load_llama(tiny_gguf) as model:
        adapter = model.load_adapter(loras[0])
        question: list[dict[str, object]] = [{"role": "user", "content": "hello"}]
        stream = model.stream_chat(question, max_tokens=12, temperature=0.0, banned_tokens=TEXTLESS_TOKENS)
        adapter.scale = 0.5
        reply = stream.result()
        messages = [*question, reply.message]
        n = len(reply.context_tokens)
        assert tuple(model.apply_chat_template(messages)[:n].tolist()) != reply.context_tokens
        adapter.scale = 1.0
        assert tuple(model.apply_chat_template(messages)[:n].tolist()) == reply.context_tokens


def test_prefilled_tokens_belong_to_one_adapter_set(tiny_gguf: Path, loras: list[Path]) -> None:
    with load_llama(tiny_gguf) as model:
        adapter = model.load_adapter(loras[0])
        model.prefill(PROMPT)
        assert model.cached_prefix(PROMPT) == len(PROMPT) - 1
        adapter.scale = 0.9
        assert model.cached_prefix(PROMPT) == 0
        adapter.scale = 1.0
        assert greedy_reply(model).cache.kind == "exact"


@pytest.mark.parametrize("n_adapters", [1, 2])
def test_a_cached_reply_has_the_bits_of_a_cold_one(tiny_gguf: Path, loras: list[Path], n_adapters: int) -> None:
    """Also after the adapters are loaded again at other addresses in memory."""
    with load_llama(tiny_gguf) as model:
        replies = []
        for _ in range(2):
            adapters = [model.load_adapter(lora, scale=0.8) for lora in loras[:n_adapters]]
            replies += [greedy_reply(model, reproducible=True, logprobs=10) for _ in range(2)]
            for adapter in adapters:
                adapter.unload()
    assert [reply.cache.kind for reply in replies] == ["cold", "exact", "exact", "exact"]
    assert all(reply.logprobs == replies[0].logprobs for reply in replies)


def test_with_three_adapters_bits_are_exact_while_they_stay_loaded(tiny_gguf: Path, loras: list[Path]) -> None:
    """libllama adds the contributions of three or more adapters in an order that depends on their addresses."""
    with load_llama(tiny_gguf) as model:
        for kinds in (("exact",), ("partial",)):  # existing blocks that do not end at a slice are not replaced
            adapters = [model.load_adapter(lora) for lora in loras[:3]]
            cold = greedy_reply(model, reproducible=True, logprobs=10)
            assert cold.cache.kind == "cold"
            warm = greedy_reply(model, reproducible=True, logprobs=10)
            assert warm.cache.kind in kinds
            assert warm.logprobs == cold.logprobs
            assert greedy_reply(model).cache.kind == "exact", (
                "the KV is valid for requests that are not reproducible"
            )
            for adapter in adapters:
                adapter.unload()
    loaded = [(LoadedAdapter(None, Path(), "", 1.0), 1.0) for _ in range(4)]
    one, other = (derive_recipe(b"0" * 16, tuple(picked)) for picked in (loaded[:3], loaded[1:]))  # type: ignore[arg-type]
    assert one != other
    assert derive_recipe(b"0" * 16, tuple(loaded[:2])) == b"0" * 16  # type: ignore[arg-type]


@pytest.mark.parametrize(("make", "architecture"), [(write_gemma3, "gemma3"), (write_mamba, "mamba")])
def test_adapter_sets_stay_separate_where_memory_cannot_be_cut(
    make: Callable[[Path], Path], architecture: str, tmp_path: Path
) -> None:
    path = make(tmp_path / "model.gguf")
    lora = write_lora(tmp_path / "lora.gguf", weights=("output",), seed=5, architecture=architecture)
    with load_llama(path) as model:
        plain = greedy_reply(model)
        adapter = model.load_adapter(lora)
        changed = greedy_reply(model)
        assert changed.cache.kind == "cold"
        assert changed.tokens != plain.tokens
        again = greedy_reply(model)
        assert (again.tokens, again.cache.kind) == (changed.tokens, "exact")
        adapter.unload()
        again = greedy_reply(model)
        assert (again.tokens, again.cache.kind) == (plain.tokens, "exact")


# --- anything, in any order


class AdapterRequest(NamedTuple):
    stream: erllama.Stream
    prompt: tuple[int, ...]
    adapters: tuple[tuple[Path, float], ...]
    reproducible: bool


class RandomRun:
    """Random calls to a model and its adapters.

    Args:
        make: loads the model, over a cache.
        paths: files of the adapters.
        check: whether a reply equals that of a model that never had other adapters.
        banned: tokens excluded from replies.
    """

    def __init__(
        self,
        seed: int,
        make: Callable[[erllama.Cache], erllama.Model],
        paths: Sequence[Path],
        check: Callable[[AdapterRequest, erllama.Completion], None],
        banned: Sequence[int] = (),
    ) -> None:
        self.dice, self.banned = random.Random(seed), banned
        self.make, self.paths, self.check = make, paths, check
        self.adapters: list[erllama.Adapter] = []
        self.asked: list[AdapterRequest] = []

    def live(self, cache: erllama.Cache, steps: int) -> int:
        """Run, and return how many replies were checked."""
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
        self.asked.append(AdapterRequest(stream, prompt, in_effect, reproducible))

    def collect(self) -> int:
        asked, self.asked = self.asked, []
        for one in asked:
            self.check(one, one.stream.result())
        return len(asked)


def test_random_runs_never_use_kv_of_another_adapter_set(stub_adapters: list[Path], tmp_path: Path) -> None:
    """On stubs, one wrong token anywhere in the KV changes the reply."""
    backends: list[AdaptedStub] = []

    def make(cache: erllama.Cache) -> erllama.Model:
        backends.append(AdaptedStub(n_ctx=400, n_ubatch=32))
        return erllama.load_backend(backends[-1], cache=cache, n_seq_max=3)

    def check(asked: AdapterRequest, reply: erllama.Completion) -> None:
        adapters = tuple(sorted((hashlib.sha256(p.read_bytes()).hexdigest(), s) for p, s in asked.adapters))
        assert reply.tokens == cold_stub(asked.prompt, adapters, 3)

    warm = 0
    for seed in range(N_EXAMPLES):
        with erllama.Cache(ram="64KiB", disk=tmp_path / "kv" if seed % 4 == 0 else None, block_size=16) as cache:
            RandomRun(seed, make, stub_adapters, check).live(cache, steps=25)
            counters = cache.counters()
            warm += counters["hits_exact"] + counters["hits_longest_prefix"]
    assert not any(backend.violations for backend in backends)
    assert warm > N_EXAMPLES, "no reply was cached, so the test proves nothing"


def test_random_runs_on_libllama_never_use_kv_of_another_set(
    tiny_gguf: Path, loras: list[Path], tmp_path: Path
) -> None:
    """Replies have the bits of a cold run where that is promised, and otherwise its numbers except for rounding."""
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
            known[prompt, adapters] = greedy_reply(
                reference, prompt, 3, reproducible=True, logprobs=20, banned_tokens=[2]
            )
            assert known[prompt, adapters].cache.tokens == 0
            reference.evict()
            forgetful.evict_bytes(1 << 40)
            for adapter in reference.adapters:
                adapter.unload()
        return known[prompt, adapters]

    def check(asked: AdapterRequest, reply: erllama.Completion) -> None:
        nonlocal nearest
        expected = cold(asked.prompt, asked.adapters)
        if asked.reproducible and len(asked.adapters) < 3:
            assert reply.logprobs == expected.logprobs
        assert logprob_distance(reply.logprobs, expected.logprobs) < 0.03
        for (prompt, adapters), other in known.items():
            if prompt == asked.prompt and total_scales(adapters) != total_scales(asked.adapters):
                nearest = min(nearest, logprob_distance(reply.logprobs, other.logprobs))

    n_checked = 0
    with erllama.Cache(ram=0) as forgetful, make(forgetful) as reference:
        for seed in range(N_EXAMPLES):
            with erllama.Cache(disk=tmp_path / "kv" if seed % 4 == 0 else None, block_size=16) as cache:
                n_checked += RandomRun(seed, make, loras, check, banned=[2]).live(cache, steps=12)
    assert n_checked > N_EXAMPLES
    assert nearest > 0.03, "equal replies of different sets prove nothing"


def total_scales(adapters: tuple[tuple[Path, float], ...]) -> dict[Path, float]:
    """Return the total scale per file; one file may be in a set twice."""
    return {path: sum(scale for other, scale in adapters if other == path) for path, _ in adapters}
