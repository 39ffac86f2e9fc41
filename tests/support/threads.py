"""Threads that start together, and waiting for a condition that other threads bring about."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier


def in_threads(work: Callable[[int], object], n: int) -> None:
    """Call `work` with 0 to n - 1 concurrently, each in its own thread. Raises the exception of a failed call."""
    together = Barrier(n)

    def start_together(number: int) -> None:
        together.wait()
        work(number)

    with ThreadPoolExecutor(n) as threads:
        for done in [threads.submit(start_together, number) for number in range(n)]:
            done.result()


def wait_until(condition: Callable[[], object], seconds: float = 300) -> None:
    """Wait until a condition holds that other threads bring about. Fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not hold within {seconds} seconds"
        time.sleep(0.001)
