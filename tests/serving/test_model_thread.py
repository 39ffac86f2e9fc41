"""The model thread: calls that no thread waits for, and the clock by which another thread sees that it hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

import erllama
from erllama.cache import Cache
from erllama.engine import Batch, Request, RequestOptions, SamplingOptions, Ticket
from erllama.engine.backends.stub import StubBackend
from support.engine_models import random_prompt, start_thread
from support.threads import wait_until


@pytest.fixture
def cache() -> Iterator[Cache]:
    with Cache() as found:
        yield found


def request(max_tokens: int) -> Request:
    return Request(random_prompt(1, 20), RequestOptions(max_tokens=max_tokens, sampling=SamplingOptions(seed=1)))


def test_calls_that_are_not_awaited_run_in_order_and_may_fail(
    cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    thread = start_thread(StubBackend(), cache)
    calls: list[object] = []

    def again() -> None:
        calls.append(threading.current_thread().name)
        thread.call_soon(lambda: calls.append("again"))

    thread.call_soon(lambda: calls.append(1))
    thread.call_soon(lambda: 1 / 0)
    thread.call_soon(again)
    wait_until(lambda: "again" in calls)
    assert calls == [1, "erllama-model-test", "again"]
    assert "a call in the model thread failed" in caplog.text
    thread.warm_up()  # the thread still runs
    thread.stop()
    with pytest.raises(erllama.ModelUnloaded):
        thread.call_soon(lambda: None)


def test_a_call_that_calls_itself_does_not_stop_the_replies(cache: Cache) -> None:
    thread = start_thread(StubBackend(eog_bias=-100), cache)
    n_calls = 0

    def again() -> None:
        nonlocal n_calls
        n_calls += 1
        if not ticket.done:
            thread.call_soon(again)

    ticket = Ticket(request(50), streaming=False)
    thread.call_soon(again)
    thread.submit(ticket)
    assert len(ticket.result().tokens) == 50
    thread.stop()
    assert n_calls >= 50


class SlowBackend(StubBackend):
    """Takes a while for each decode, and longer for the prompt."""

    def __init__(self) -> None:
        super().__init__(eog_bias=-100)
        self.gate = threading.Event()
        self.hangs_at = -1

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        time.sleep(0.003 + 0.001 * len(batch.tokens))
        if int(batch.positions[-1]) == self.hangs_at:
            self.gate.wait(120)
        return super().decode(batch)


def test_a_watcher_sees_how_long_a_tick_takes_and_should_take(cache: Cache) -> None:
    backend = SlowBackend()
    thread = start_thread(backend, cache)
    clock = thread.tick_clock
    assert (clock.began, clock.rows, clock.expected_seconds) == (0.0, 0, None)
    thread.warm_up()
    first = Ticket(request(20), streaming=False)
    thread.submit(first)
    first.result()
    backend.hangs_at = 30
    hanging = Ticket(request(20), streaming=False)
    thread.submit(hanging)
    wait_until(lambda: clock.began and time.monotonic() - clock.began > 0.2)
    assert clock.rows == 1
    expected = clock.expected_seconds
    assert expected is not None
    assert 0.004 <= expected < 2, "about as long as the decodes before"
    backend.gate.set()
    hanging.result()
    wait_until(lambda: clock.began == 0.0)
    thread.stop()
