"""Exceptions that are not an `Exception` end only the call that raised them; Ctrl-C leaves no partial state."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import pytest

import erllama
from erllama.cache import Cache, uninterrupted
from erllama.cache.pipeline import loader
from erllama.engine import Batch, Candidates
from erllama.engine.backends.stub import StubBackend
from erllama.engine.grammar.grammar import GrammarCompiler
from support.adapters import AdaptedStub
from support.storage.blocks import NAMESPACE, SIZE, save
from support.threads import wait_until

ENDINGS = (ValueError, SystemExit, KeyboardInterrupt, GeneratorExit)


@contextmanager
def failing_handler(error: type[BaseException]) -> Iterator[list[str]]:
    """A log handler that raises for every record."""
    seen: list[str] = []

    class Failing(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            seen.append(record.getMessage())
            raise error("a handler fails")

    handler, log = Failing(), logging.getLogger("erllama")
    log.addHandler(handler)
    try:
        yield seen
    finally:
        log.removeHandler(handler)


@pytest.mark.parametrize("error", ENDINGS)
def test_a_raising_log_handler_does_not_end_the_writer(error: type[BaseException], tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError("injected")

    with failing_handler(error) as seen, erllama.Cache(ram=0, disk=tmp_path) as cache:
        cache._queue.defer(fail)
        assert cache.flush(120)
        with erllama.load_backend(StubBackend(eog_bias=-100), cache=cache) as model:
            model.complete([7] * 600, max_tokens=1)
        assert cache.flush(120)
        assert cache.counters()["blocks_disk"] > 0
    assert seen


@pytest.mark.parametrize("error", ENDINGS)
def test_a_raising_log_handler_does_not_end_the_model(error: type[BaseException]) -> None:
    class Failing(StubBackend):
        fails = True

        def decode(self, batch: Batch) -> np.ndarray:  # type: ignore[type-arg]
            if self.fails:
                raise RuntimeError("injected")
            return super().decode(batch)

    backend = Failing(eog_bias=-100)
    with failing_handler(error) as seen, erllama.load_backend(backend) as model:
        with pytest.raises(erllama.BackendError, match="injected"):
            model.complete("x", max_tokens=3, timeout=120)
        backend.fails = False
        assert len(model.complete("x", max_tokens=3, timeout=120).tokens) == 3
    assert seen


def test_a_raising_log_handler_does_not_disturb_loading(tiny_gguf: Path) -> None:
    log = logging.getLogger("erllama")
    before = log.level
    log.setLevel(logging.DEBUG)
    try:
        with failing_handler(ValueError) as seen:
            with erllama.load_model(tiny_gguf, n_ctx=256, n_threads=1) as model:
                assert model.complete("x", max_tokens=2).tokens
        assert any("tensor" in line for line in seen), "including lines of libllama"
    finally:
        log.setLevel(before)


def test_exceptions_of_log_handlers_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from erllama._runtime.log import logger

    with failing_handler(ValueError):
        logger("erllama.engine").warning("something")
    assert "a handler fails" in capsys.readouterr().err


@pytest.mark.parametrize("error", ENDINGS)
def test_a_raising_sampler_step_ends_only_its_request(error: type[BaseException]) -> None:
    def failing(candidates: Candidates) -> Candidates:
        raise error("not mine to end")

    with erllama.load_backend(StubBackend(eog_bias=-100)) as model:
        others = [model.stream([5, i], max_tokens=200) for i in range(2)]
        next(others[0])
        with pytest.raises(erllama.SamplingError, match="not mine to end"):
            model.complete("x", samplers=[failing], timeout=120)
        assert [len(other.result().tokens) for other in others] == [200, 200]


@pytest.mark.parametrize("error", ENDINGS)
@pytest.mark.parametrize("method", ["pack", "decode", "share", "restore", "drop"])
def test_a_raising_backend_ends_only_its_requests_and_blocks_none(error: type[BaseException], method: str) -> None:
    backend = StubBackend(eog_bias=-100)
    with erllama.Cache(block_size=16) as cache, erllama.load_backend(backend, cache=cache) as model:
        model.complete([1] * 100, max_tokens=5)
        whole = getattr(backend, method)

        def failing(*arguments: object) -> object:
            setattr(backend, method, whole)
            raise error("a backend must not")

        setattr(backend, method, failing)
        for prompt in ([1] * 100, [1] * 50 + [2] * 50, [3] * 100):
            try:
                model.complete(prompt, max_tokens=5, timeout=120)
            except erllama.BackendError as failed:
                assert "a backend must not" in str(failed)  # noqa: PT017 - some methods are guarded by the cache's part
        model.evict()
        assert len(model.complete([1] * 100, max_tokens=5, timeout=120).tokens) == 5


@pytest.mark.parametrize("error", ENDINGS)
def test_calls_to_a_failed_model_thread_raise_typed_errors(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing() -> None:
        raise error("not here")

    with erllama.load_backend(StubBackend(eog_bias=-100)) as model:
        with monkeypatch.context() as patch:
            patch.setattr(model._runner._scheduler, "evict", failing)
            with pytest.raises(erllama.BackendError, match="not here"):
                model.evict()
        model.evict()
        assert len(model.complete("x", max_tokens=3).tokens) == 3


@pytest.mark.parametrize("error", ENDINGS)
def test_a_model_unloads_even_if_its_backend_raises(error: type[BaseException]) -> None:
    class Failing(StubBackend):
        def close(self) -> None:
            raise error("it does not close")

    model = erllama.load_backend(Failing(eog_bias=-100))
    stream = model.stream([5] * 10, max_tokens=4000)
    next(stream)
    model.unload()
    with pytest.raises(erllama.ModelUnloaded):
        stream.result()


# --- Ctrl-C -----------------------------------------------------------------------------------------


def test_ctrl_c_while_a_grammar_compiles_releases_the_adapters(
    stub_adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = AdaptedStub(eog_bias=-100)
    with erllama.load_backend(backend) as model:
        adapter = model.load_adapter(stub_adapters[0])

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(GrammarCompiler, "matcher", interrupted)
            for _ in range(3):
                with pytest.raises(KeyboardInterrupt):
                    model.complete("x", regex="a+", session_id="s")
        assert len(model.complete("x", max_tokens=2, session_id="s").tokens) == 2
        adapter.unload()
        wait_until(lambda: backend.loaded == [])


def test_ctrl_c_while_an_adapter_loads_leaves_none_loaded(stub_adapters: list[Path]) -> None:
    class Slow(AdaptedStub):
        def load_adapter(self, path: Path) -> object:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # the waiting caller is interrupted in the meantime
            return super().load_adapter(path)

    backend = Slow(eog_bias=-100)
    with erllama.load_backend(backend) as model:
        with pytest.raises(KeyboardInterrupt):
            model.load_adapter(stub_adapters[0])
        wait_until(lambda: not model._runner._calls and model.adapters == () and backend.loaded == [])
        assert len(model.complete("x", max_tokens=2).tokens) == 2
        assert backend.violations == []


def interrupted_at(step: int, modules: tuple[str, ...], call: Callable[[], object]) -> bool:
    """Call a function and raise KeyboardInterrupt at its `step`-th step in some modules. Returns whether it did.

    Steps are the places where the interpreter checks for signals: starts of functions and ends of calls.
    """
    left = step

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal left
        if event in ("call", "c_return") and frame.f_globals.get("__name__") in modules:
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

    gc.disable()  # else the interrupt may come within the `__del__` of some other test's model
    sys.setprofile(profile)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
        gc.enable()
    return left <= 0


def test_ctrl_c_at_any_step_of_a_submission_leaves_nothing_behind(stub_adapters: list[Path]) -> None:
    modules = (
        "erllama.engine.scheduling.model_thread",
        "erllama.engine.adapters",
        "erllama.engine.scheduling.sequence",
        "threading",
    )
    with erllama.load_backend(AdaptedStub(eog_bias=-100), max_pending=2) as model:
        model.load_adapter(stub_adapters[0])
        runner = model._runner

        def ask() -> None:
            model.complete([5, 6, 7], max_tokens=1, session_id="s")

        step = 1
        while interrupted_at(step, modules, ask):
            step += 1
            wait_until(lambda: not (runner.adapters._users or runner._sessions or model.pending or runner.running))
        assert step > 20
        ask()


def test_ctrl_c_loads_an_adapter_completely_or_not_at_all(stub_adapters: list[Path]) -> None:
    modules = ("erllama.engine.scheduling.model_thread",)
    backend = AdaptedStub(eog_bias=-100)
    with erllama.load_backend(backend) as model:
        step, whole = 1, True
        while whole:
            whole = interrupted_at(step, modules, lambda: model.load_adapter(stub_adapters[0]))
            step += 1
            wait_until(lambda: not model._runner._calls)
            model.evict()  # the background undo is complete
            assert len(backend.loaded) == len(model.adapters)
            for adapter in model.adapters:
                adapter.unload()
            wait_until(lambda: backend.loaded == [])
        assert step > 10
        assert backend.violations == []


def test_ctrl_c_at_any_step_of_a_load_leaves_its_reader_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "_BATCH_BYTES", 1)
    modules = ("erllama.cache.pipeline.loader", "concurrent.futures._base", "threading")
    tokens = np.arange(6 * SIZE, dtype=np.int32)
    with Cache(block_size=SIZE, disk=tmp_path, ram=0, watch=False) as cache:
        save(cache, tokens)
        cache.flush()

        def load() -> int:
            with cache.lookup(NAMESPACE, tokens) as match, closing(cache.load_batches(match.blocks)) as batches:
                return sum(map(len, batches))

        step = 1
        while interrupted_at(step, modules, load):
            step += 1
            wait_until(lambda: not uninterrupted.running)
            assert all(row.pins == 0 for row in cache.rows())
        assert step > 10
        assert load() == 6
        cache.check_integrity()
    wait_until(lambda: not any(thread.name.startswith("erllama-cache-reader") for thread in threading.enumerate()))
