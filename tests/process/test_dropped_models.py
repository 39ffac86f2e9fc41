"""Models that are dropped without unload: reported, stopped and freed; models left at exit are unloaded."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import erllama
from erllama.engine.backends.stub import StubBackend
from support.subprocesses import must_run, run_python
from support.threads import wait_until


class Closing(StubBackend):
    closed = 0

    def close(self) -> None:
        super().close()
        Closing.closed += 1


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """Disable the garbage collector, so that only reference counts free objects."""
    Closing.closed = 0
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def drop_reference(held: list[Any], closed: int) -> None:
    """Drop a reference. The model thread may hold the last one for a moment."""
    held.clear()
    wait_until(lambda: Closing.closed == closed)


def test_a_dropped_model_is_reported_and_freed() -> None:
    for n in range(1, 4):
        held = [erllama.load_backend(Closing(eog_bias=-100))]
        name = held[0].id
        held[0].complete("x", max_tokens=2)
        with pytest.warns(ResourceWarning, match=rf"{name}.*unload\(\)"):
            drop_reference(held, n)
        assert erllama.list_models() == []
        with pytest.raises(erllama.ModelNotFound):
            erllama.get_model(name)


def test_rebinding_one_name_keeps_one_model(tiny_gguf: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = None
        for _ in range(4):
            model = erllama.load_model(tiny_gguf, n_ctx=256, n_threads=1, warmup=False)
        assert model is not None
        assert erllama.list_models() == [model]
        model.unload()
    assert [warning.category for warning in caught] == [ResourceWarning] * 3


def test_a_dropped_vocabulary_only_model_is_reported(tiny_gguf: Path) -> None:
    model = erllama.load_model(tiny_gguf, vocab_only=True)
    assert len(model.tokenize("x"))
    with pytest.warns(ResourceWarning, match="unload"):
        del model
    assert erllama.list_models() == []


def test_a_model_with_an_explicit_id_stays_loaded() -> None:
    erllama.load_backend(Closing(eog_bias=-100), id="kept")
    assert erllama.get_model("kept").complete("x", max_tokens=2).tokens
    erllama.get_model("kept").unload()
    assert Closing.closed == 1


def test_an_unloaded_model_is_dropped_without_a_warning() -> None:
    with erllama.load_backend(Closing()) as model:
        model.complete("x", max_tokens=2)
    del model
    assert Closing.closed == 1


def test_a_running_reply_keeps_its_model() -> None:
    held = [erllama.load_backend(Closing(eog_bias=-100)).stream([5] * 10, max_tokens=300)]
    assert len(held[0].result().tokens) == 300
    with pytest.warns(ResourceWarning, match="dropped"):
        drop_reference(held, 1)


def test_exit_waits_for_a_model_that_was_just_dropped() -> None:
    printed = must_run(
        """
        import time, erllama
        from erllama.engine.backends.stub import StubBackend

        class Slow(StubBackend):
            def close(self):
                time.sleep(0.3)
                print("closed")

        model = erllama.load_backend(Slow())
        del model
        """
    )
    assert printed == "closed\n"


def test_exit_unloads_all_models_though_one_fails() -> None:
    finished = run_python(
        """
        import logging, sys, erllama
        from erllama.engine.backends.stub import StubBackend
        logging.getLogger("erllama").addHandler(logging.NullHandler())

        class Failing(StubBackend):
            def __init__(self, error):
                super().__init__()
                self.error = error
            def close(self):
                print("asked to close")
                raise self.error("injected")

        class Telling(StubBackend):
            def close(self):
                print("closed")

        models = [erllama.load_backend(Failing(error), id=error.__name__) for error in (ValueError, SystemExit)]
        models.append(erllama.load_backend(Telling()))

        def unload():
            raise RuntimeError("injected")
        broken = erllama.load_backend(Telling(), id="broken")
        broken.unload = unload
        last = erllama.load_backend(Telling(), id="last")

        class Broken(erllama.Cache):
            def close(self):
                print("cache asked")
                raise ValueError("injected")
        caches = [Broken(), erllama.Cache()]
        """
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    assert sorted(finished.stdout.split("\n")) == sorted(
        ["asked to close", "asked to close", "closed", "closed", "cache asked", ""]
    )
