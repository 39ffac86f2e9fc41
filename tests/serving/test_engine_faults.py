"""A failure of the backend, the cache or a caller affects only its own request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import erllama
from erllama.cache import Cache
from erllama.engine import Batch, Ticket
from erllama.engine.backends.stub import StubBackend
from erllama.testing.models import write_llama
from support.engine_models import (
    SIZE,
    GatedBackend,
    cold_reply,
    engine_metrics,
    load_stub,
    random_prompt,
)
from support.subprocesses import must_run
from support.threads import wait_until

# --- failures affect only their own request ------------------------------------------------------------------


class Failing(StubBackend):
    """Raises, or returns NaN, for batches with a certain token."""

    def __init__(self, error: Exception | None, token: int = 99, **options: object) -> None:
        super().__init__(**{"eog_bias": -100.0, **options})  # type: ignore[arg-type]
        self.error, self.token = error, token
        self.failures = 0

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        hit = batch.tokens == self.token
        if self.error is not None and hit.any() and self.failures < 1:
            self.failures += 1
            raise self.error
        logits = super().decode(batch)
        rows = np.flatnonzero(batch.output)
        for i, row in enumerate(rows):
            if self.error is None and batch.tokens[row] == self.token:
                logits[i] = np.nan
        return logits


def prompts_with(token: int) -> list[list[int]]:
    return [[1, 2, 3 + i] for i in range(3)] + [[4, 5, token]]


def test_a_failure_in_sampling_ends_only_its_request() -> None:
    prompts = prompts_with(99)
    expected = [cold_reply(np.array(prompt, np.int32), max_tokens=5, temperature=0).tokens for prompt in prompts]
    assert all(99 not in tokens for tokens in expected)
    with load_stub(Failing(None)) as model:
        streams = [model.stream(prompt, max_tokens=5, temperature=0) for prompt in prompts]
        with pytest.raises(erllama.SamplingError):
            streams[3].result()
        assert [stream.result().tokens for stream in streams[:3]] == expected[:3]


def once(call: Callable[..., object], when: Callable[[], bool] = lambda: True) -> Callable[..., object]:
    """Return `call`, changed so that it fails the first time that `when` holds."""
    left = [1]

    def failing(*arguments: object, **options: object) -> object:
        if left and when():
            left.clear()
            raise RuntimeError("injected")
        return call(*arguments, **options)

    return failing


@pytest.mark.parametrize("name", ["share", "drop", "cut", "pack", "restore"])
def test_no_backend_failure_leaves_a_caller_waiting(name: str) -> None:
    backend = StubBackend(n_ctx=1024, eog_bias=-100)
    prompts = [np.concatenate([random_prompt(1, 100), random_prompt(i, 40)]) for i in range(6)]
    with load_stub(backend, n_seq_max=3, parked_cells=0) as model:
        for _ in range(3):
            setattr(backend, name, once(getattr(StubBackend, name).__get__(backend)))
            streams = [model.stream(prompt, max_tokens=10 + 20 * i, seed=i) for i, prompt in enumerate(prompts)]
            for i, stream in enumerate(streams):
                with suppress(erllama.BackendError):
                    tokens = stream.result().tokens
                    assert tokens == cold_reply(prompts[i], max_tokens=10 + 20 * i, seed=i).tokens
        model.evict()
        slots = model._runner._scheduler.slots
        assert backend.cells_used == slots.cells.used == 0
        assert len(slots._free_slots) == 12, "no slot leaks"


def test_a_failing_drop_during_eviction_loses_no_request() -> None:
    backend = StubBackend(n_ctx=1024, eog_bias=-100)
    with load_stub(backend, n_seq_max=3) as model:
        model.complete(random_prompt(1, 100), max_tokens=10)
        model.complete(random_prompt(2, 100), max_tokens=10)
        stream = model.stream(random_prompt(3, 100), max_tokens=400, seed=3)
        next(stream)
        backend.drop = once(backend.drop)  # type: ignore[method-assign]
        model.evict()
        assert stream.result().tokens == cold_reply(random_prompt(3, 100), max_tokens=400, seed=3).tokens
        model.evict()
        slots = model._runner._scheduler.slots
        assert backend.cells_used == slots.cells.used == 0
        assert len(slots._free_slots) == 12, "no slot leaks"


CACHE_CALLS = ["lookup", "load", "load_batches", "save", "wants", "contains", "stored", "packing", "expecting"]
CACHE_CALLS += ["report_stored", "report_removed", "count_request", "awaits", "tier_names"]


@pytest.mark.parametrize("name", CACHE_CALLS)
def test_no_cache_failure_fails_a_request(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a mistake in the cache")

    with load_stub(StubBackend(n_ctx=512, eog_bias=-100), n_seq_max=2) as model:
        first = model.complete(random_prompt(1, 100), max_tokens=5, seed=1)
        monkeypatch.setattr(Cache, name, property(broken) if name == "tier_names" else broken)
        for i in range(4):
            streams = [
                model.stream(random_prompt(j, 100), max_tokens=150, seed=1, parent_key=first.finish_key)
                for j in range(1, 4)
            ]
            for j, stream in enumerate(streams, 1):
                assert stream.result().tokens == cold_reply(random_prompt(j, 100), max_tokens=150, seed=1).tokens, i
        monkeypatch.undo()
        assert model.complete(random_prompt(1, 100), max_tokens=5, seed=1).tokens == first.tokens


def test_a_temporary_lack_of_cells_fails_no_request() -> None:
    backend = StubBackend(n_ctx=512, eog_bias=-100)
    decode = backend.decode

    def tight(batch: Batch) -> NDArray[np.float32]:
        if backend.tokens_decoded > 110 and not failed:
            failed.append(1)
            raise erllama.CellsExhausted("not now")
        return decode(batch)

    failed: list[int] = []
    backend.decode = tight  # type: ignore[method-assign]
    with load_stub(backend) as model:
        reply = model.complete(random_prompt(1, 77), max_tokens=100, seed=1)
    assert failed
    assert reply.tokens == cold_reply(random_prompt(1, 77), max_tokens=100, seed=1).tokens


def test_a_context_that_cannot_be_recreated_is_reported() -> None:
    class Dying(StubBackend):
        dead = False

        def decode(self, batch: Batch) -> NDArray[np.float32]:
            self.dead = True
            raise erllama.BackendError("the device is lost")

        def clear(self) -> None:
            if self.dead:
                raise erllama.BackendError("and does not come back")
            super().clear()

    with load_stub(Dying()) as model:
        with pytest.raises(erllama.Error, match="does not come back"):
            model.complete([1])
        with pytest.raises(erllama.ModelUnloaded, match="cannot continue"):
            wait_until(lambda: model.complete([1]))


@pytest.mark.parametrize("error", [erllama.BackendError("broken"), ValueError("broken"), MemoryError("broken")])
def test_a_failed_decode_ends_its_batch_and_the_queue_continues(error: Exception) -> None:
    backend = Failing(error, n_ctx=2048)
    with load_stub(backend, n_seq_max=2) as model:
        parked = model.complete([7] * 50, max_tokens=1)
        bad = model.stream([99] * 10, max_tokens=5)
        with pytest.raises(erllama.BackendError, match="broken"):
            bad.result()
        streams = [model.stream([8] * 30, max_tokens=10, seed=i) for i in range(6)]
        for i, stream in enumerate(streams):
            assert stream.result().tokens == cold_reply(np.full(30, 8, np.int32), max_tokens=10, seed=i).tokens
        again = model.complete([7] * 50, max_tokens=1)
        assert again.cache.kind == "exact", "earlier saves are still stored"
        assert parked.finish_reason == again.finish_reason


def test_cells_that_run_out_too_early_fail_no_request() -> None:
    class Tight(StubBackend):
        def decode(self, batch: Batch) -> NDArray[np.float32]:
            if self.cells_used + len(batch.tokens) > 256:  # half of the stated number
                raise erllama.CellsExhausted("no free cells")
            return super().decode(batch)

    with load_stub(Tight(n_ctx=512, eog_bias=-100), n_seq_max=6) as model:
        streams = [model.stream(random_prompt(i, 60), max_tokens=40, seed=i) for i in range(6)]
        for i, stream in enumerate(streams):
            assert stream.result().tokens == cold_reply(random_prompt(i, 60), max_tokens=40, seed=i).tokens
        with pytest.raises(erllama.CellsExhausted):
            model.complete(random_prompt(1, 300), max_tokens=1)


def test_the_queue_is_bounded() -> None:
    backend = GatedBackend()
    with load_stub(backend, n_seq_max=1, max_pending=2) as model:
        backend.hold()
        first = model.stream([1], max_tokens=1)
        assert backend.at_decode.wait(120)
        waiting = [model.stream([2], max_tokens=1) for _ in range(2)]
        with pytest.raises(erllama.QueueFull, match="max_pending=2"):
            model.complete([3])
        assert (model.pending, model.queue_depth, erllama.queue_depth()) == (2, 1, 1)
        backend.release()
        for stream in [first, *waiting]:
            stream.result()
        assert (model.pending, model.queue_depth, model.phase) == (0, 0, "idle")
        assert engine_metrics(model).refused == 1


def test_a_session_refused_by_the_queue_is_not_busy() -> None:
    backend = GatedBackend()
    with load_stub(backend, n_seq_max=1, max_pending=1) as model:
        backend.hold()
        first = model.stream([1], max_tokens=1)
        assert backend.at_decode.wait(120)
        second = model.stream([1], max_tokens=1)
        with pytest.raises(erllama.QueueFull):
            model.stream([3], session_id="ann")
        backend.release()
        first.result()
        second.result()
        assert model.complete([3], max_tokens=1, session_id="ann").finish_reason == "length"


def test_a_deadline_ends_running_and_waiting_requests() -> None:
    backend = GatedBackend(n_ctx=65536)
    with load_stub(backend, n_seq_max=1) as model:
        running = model.stream([1], timeout=0.2)
        waiting = model.stream([2], timeout=0.2)
        for stream in (running, waiting):
            with pytest.raises(erllama.DeadlineExceeded, match=r"timeout=0\.2"):
                stream.result()
            with pytest.raises(TimeoutError):
                stream.result()
        assert model.complete([3], max_tokens=1, timeout=60).finish_reason == "length"
        assert engine_metrics(model).failed == {"DeadlineExceeded": 2}


def test_a_call_from_the_models_own_thread_is_refused() -> None:
    class Calling(StubBackend):
        model: erllama.Model

        def decode(self, batch: Batch) -> NDArray[np.float32]:
            self.model.complete([1])
            return super().decode(batch)

    backend = Calling()
    with load_stub(backend) as model:
        backend.model = model
        with pytest.raises(erllama.CalledFromModelThread, match="its own thread"):
            model.complete([1], max_tokens=1)


def test_requests_running_at_unload_are_saved_and_failed() -> None:
    backend = GatedBackend()
    cache = Cache(block_size=SIZE)
    model = load_stub(backend, cache=cache, n_seq_max=3)
    streams = [model.stream(random_prompt(i, 100), max_tokens=None) for i in range(4)]
    for stream in streams[:3]:
        next(stream)
    model.unload()
    for stream in streams:
        with pytest.raises(erllama.ModelUnloaded):
            list(stream)
    assert cache.counters()["saves_shutdown"] >= 3
    with pytest.raises(erllama.ModelUnloaded):
        model.end_session("ann")
    cache.close()


INTERRUPTED = """
import signal, sys, threading, time
import numpy as np
import erllama

model = erllama.load_model(sys.argv[1], n_ctx=65536, n_threads=1)
vocabulary = model._backend.vocabulary
vocabulary.is_eog = np.zeros(vocabulary.n_tokens, bool)
main = threading.get_ident()
def interrupt():
    while model.phase != "generating":
        time.sleep(0.001)
    signal.pthread_kill(main, signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    if sys.argv[2] == "complete":
        model.complete([5, 6, 7], temperature=0)
    else:
        for event in model.stream([5, 6, 7], temperature=0):
            pass
except KeyboardInterrupt:
    print("interrupted")
while model.queue_depth:
    time.sleep(0.001)
print(model.metrics.finished)
print(model.complete([5, 6, 7], max_tokens=1).finish_reason)
"""


@pytest.mark.parametrize("way", ["complete", "stream"])
def test_ctrl_c_during_a_decode_ends_only_that_request(tmp_path: Path, way: str) -> None:
    path = write_llama(tmp_path / "model.gguf", seed=1)
    assert must_run(INTERRUPTED, path, way).split("\n") == ["interrupted", "{'cancelled': 1}", "length", ""]


@pytest.mark.parametrize("way", ["complete", "stream", "acomplete", "astream"])
def test_an_interrupt_after_submission_cancels_the_request(way: str) -> None:
    with load_stub(StubBackend(eog_bias=-100, n_ctx=65536)) as model:
        submit = model._runner.submit

        def interrupted(ticket: Ticket) -> None:
            submit(ticket)
            raise KeyboardInterrupt

        async def ask() -> None:
            asked = getattr(model, way)("x")
            if way == "acomplete":
                await asked

        model._runner.submit = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(ask()) if way.startswith("a") else getattr(model, way)("x")
        while model.pending or model.queue_depth:
            time.sleep(0.001)
        model.end_session("nobody's")  # returns between two ticks, so after the last one
        assert model.metrics.finished == {"cancelled": 1}


# --- a backend that loses its KV ---------------------------------------------------------------------------


class Forgetful(StubBackend):
    """Loses its KV, as with a device on another machine, and recovers if it can."""

    def __init__(self) -> None:
        super().__init__(eog_bias=-100.0)
        self.memory_lost = False
        self.reachable = True
        self.recoveries = 0

    def lose(self) -> None:
        self.memory_lost = True

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        if self.memory_lost:
            raise erllama.ServerLost("injected: lost")
        return super().decode(batch)

    def recover(self) -> None:
        if not self.reachable:
            raise erllama.ServerLost("injected: still lost")
        self._lengths = [0] * len(self._lengths)
        self.memory_lost = False
        self.recoveries += 1


def test_kv_lost_while_idle_is_not_shared_and_no_request_fails() -> None:
    prompt = random_prompt(1, 100)
    backend = Forgetful()
    with load_stub(backend) as model:
        first = model.complete(prompt, max_tokens=8, temperature=0.0)
        assert model.complete(prompt, max_tokens=8, temperature=0.0).cache.tier == "live"
        backend.lose()
        again = model.complete(prompt, max_tokens=8, temperature=0.0)
        assert (again.tokens, again.cache.tier, backend.recoveries) == (first.tokens, "ram", 1)


def test_requests_fail_at_once_until_the_backend_recovers() -> None:
    backend = Forgetful()
    with load_stub(backend, n_seq_max=2) as model:
        expected = model.complete(random_prompt(1, 100), max_tokens=8, temperature=0.0)
        backend.lose()
        backend.reachable = False
        streams = [model.stream(random_prompt(i, 100), max_tokens=8, temperature=0.0) for i in range(5)]
        for stream in streams:
            with pytest.raises(erllama.ServerLost, match="still lost"):
                stream.result()
        backend.reachable = True
        assert model.complete(random_prompt(1, 100), max_tokens=8, temperature=0.0).tokens == expected.tokens
        assert model.pending == 0


def test_only_requests_of_the_failed_decode_end_if_the_backend_recovers() -> None:
    """A request that waits meanwhile starts again, and its reply is the same."""
    prompt = random_prompt(2, 60)
    expected = cold_reply(prompt, max_tokens=8, temperature=0.0)
    backend = Forgetful()
    with load_stub(backend, n_seq_max=1) as model:
        running = model.stream(random_prompt(1, 60), max_tokens=10**6)
        next(iter(running))
        waiting = model.stream(prompt, max_tokens=8, temperature=0.0)
        backend.lose()
        with pytest.raises(erllama.ServerLost):
            running.result()
        assert waiting.result().tokens == expected.tokens


def test_a_failing_backend_does_not_hide_that_others_were_cancelled() -> None:
    backend = GatedBackend()
    with load_stub(backend, n_seq_max=1) as model:
        backend.hold()
        backend.at_decode.clear()
        late = model.stream([5], max_tokens=None, timeout=1)
        assert backend.at_decode.wait(120)
        waiting = model.stream([6], max_tokens=50)
        wait_until(lambda: model.pending == 1)
        deadline = late._ticket.deadline
        assert deadline is not None
        wait_until(lambda: time.perf_counter() >= deadline)
        waiting.cancel()
        backend.drop = once(backend.drop)  # type: ignore[method-assign]
        backend.release()
        assert waiting.result().finish_reason == "cancelled"
        with pytest.raises(erllama.DeadlineExceeded):
            late.result()
        assert model.complete([7], max_tokens=3).finish_reason == "length"
