"""Threads that start together, and waiting for what other threads do."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier


def in_threads(work: Callable[[int], object], n: int) -> None:
    """Call `work` with 0 to n - 1, all at once, each in a thread of its own; what one raises is raised."""
    together = Barrier(n)

    def begun(number: int) -> None:
        together.wait()
        work(number)

    with ThreadPoolExecutor(n) as threads:
        for done in [threads.submit(begun, number) for number in range(n)]:
            done.result()


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for what other threads bring about; it fails only where they do not."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.01)
