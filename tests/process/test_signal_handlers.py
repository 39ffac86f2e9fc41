"""Calls from a signal handler neither deadlock nor break the call that they interrupt."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

import erllama
from erllama._runtime.reentry import reentered
from erllama.engine.backends.stub import StubBackend
from erllama.metrics import MetricsCollector
from support.subprocesses import must_run
from support.threads import in_threads, wait_until


def operator(model: erllama.Model, cache: erllama.Cache) -> None:
    """Calls that are safe in a handler."""
    assert model in erllama.list_models()
    assert erllama.get_model(model.id) is model
    assert erllama.queue_depth() >= 0
    assert model.phase in ("idle", "prefilling", "generating")
    assert min(model.pending, model.queue_depth, model.metrics.ticks, model.info.n_ctx) >= 0
    assert model.last_cache_hit is None or model.last_cache_hit.tokens >= 0
    assert cache.counters()["bytes_pending"] >= 0
    assert [status.tier for status in cache.tiers()]
    assert list(MetricsCollector().collect())


@contextmanager
def handling(step: int, modules: tuple[str, ...], handler: Callable[[], object]) -> Iterator[list[bool]]:
    """Call a handler at the `step`-th step within some modules. Returns whether it was called.

    Steps are the places where the interpreter checks for signals: starts of functions and ends of calls.
    """
    left, came = step, []

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal left
        if event in ("call", "c_return") and frame.f_globals.get("__name__", "").startswith(modules):
            left -= 1
            if left == 0:
                came.append(True)
                handler()

    sys.setprofile(profile)
    try:
        yield came
    finally:
        sys.setprofile(None)


CALLS: dict[str, Callable[[erllama.Model, erllama.Cache], object]] = {
    "list_models": lambda model, cache: erllama.list_models(),
    "get_model": lambda model, cache: erllama.get_model(model.id),
    "counters": lambda model, cache: cache.counters(),
    "tiers": lambda model, cache: cache.tiers(),
    "complete": lambda model, cache: model.complete([5, 6, 7], max_tokens=1, session_id="s"),
    "cached_prefix": lambda model, cache: model.cached_prefix([5] * 100),
    "rows": lambda model, cache: cache.rows(),
    "evict_bytes": lambda model, cache: cache.evict_bytes(1),
    "metrics": lambda model, cache: list(MetricsCollector().collect()),
}
_MODULES = (
    "erllama._model.registry",
    "erllama.engine.scheduling.model_thread",
    "erllama.engine.requests.ticket",
    "erllama.cache",
    "erllama.metrics",
)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("called", CALLS)
def test_a_handler_that_runs_at_any_step_of_a_call_returns(called: str, tmp_path: Path) -> None:
    with erllama.Cache(disk=tmp_path, block_size=16) as cache:
        with erllama.load_backend(StubBackend(eog_bias=-100), cache=cache) as model:
            model.complete([5] * 100, max_tokens=2)
            step, came = 1, [True]
            while came and step < 400:
                with handling(step, _MODULES, lambda: operator(model, cache)) as came:
                    CALLS[called](model, cache)
                step += 1 if step < 60 else 7
            assert step > 2
            cache.check_integrity()


def test_a_signal_during_a_reply_is_handled_at_once(tmp_path: Path) -> None:
    seen = []
    with erllama.Cache(disk=tmp_path, block_size=16) as cache:
        with erllama.load_backend(StubBackend(eog_bias=-100), cache=cache) as model:
            before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(operator(model, cache)))
            try:
                stop = threading.Event()

                def send() -> None:
                    while not stop.wait(0.002):
                        os.kill(os.getpid(), signal.SIGUSR1)

                sender = threading.Thread(target=send)
                sender.start()
                for i in range(20):
                    model.complete([i] * 50, max_tokens=5)
                stop.set()
                sender.join()
            finally:
                signal.signal(signal.SIGUSR1, before)
            cache.check_integrity()
    assert seen


def test_a_handler_can_cancel_a_stream() -> None:
    with erllama.load_backend(StubBackend(eog_bias=-100)) as model:
        with model.stream([5] * 10, max_tokens=4000) as stream:
            next(stream)
            with handling(3, ("erllama",), stream.cancel) as came:
                reply = stream.result()
        assert came
        assert reply.finish_reason == "cancelled"


@pytest.mark.timeout(120)
def test_a_handler_can_unload_a_model_at_any_step() -> None:
    for step in range(1, 40, 3):
        model = erllama.load_backend(StubBackend(eog_bias=-100))
        ended: list[object] = []

        def unload(model: erllama.Model = model, ended: list[object] = ended) -> None:
            model.unload()
            ended.append(True)

        with handling(step, ("erllama.engine", "threading"), unload):
            try:
                model.complete([5] * 10, max_tokens=4000, timeout=120)
            except erllama.ModelUnloaded:
                ended.append("unloaded")
            except erllama.DeadlineExceeded:
                pass
        assert ended == [True, "unloaded"]
        wait_until(lambda model=model: model not in erllama.list_models())  # type: ignore[misc]


def test_exit_waits_for_an_unload_that_a_handler_started() -> None:
    printed = must_run(
        """
        import os, signal, threading, time
        import erllama
        from erllama.engine.backends.stub import StubBackend

        class Slow(StubBackend):
            def close(self):
                time.sleep(0.5)
                print("closed", flush=True)

        model = erllama.load_backend(Slow(eog_bias=-100))
        signal.signal(signal.SIGTERM, lambda *_: model.unload())
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        try:
            model.complete([5] * 10, max_tokens=4000)
            while True:
                model.complete([5] * 10, max_tokens=4000)
        except erllama.ModelUnloaded:
            print("unloaded", flush=True)
        """
    )
    assert printed.split() == ["unloaded", "closed"]


def test_a_call_detects_whether_it_interrupts_another() -> None:
    found: list[bool] = []

    class Asking(StubBackend):
        def close(self) -> None:
            found.append(reentered())

    assert not reentered()
    in_threads(lambda _: found.append(reentered()), 2)
    assert found == [False, False]
    erllama.load_backend(Asking()).unload()
    assert found == [False, False, True]
