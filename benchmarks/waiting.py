"""How readers of a stream wait for the model thread, compared: `python -m benchmarks.waiting`.

`Ticket` uses `queue.SimpleQueue`. Its peers use a `threading.Condition`, and one lock per reader. A thread plays
the model thread: it adds a piece to every stream, wakes the readers, and sleeps for the time of a decode. Two times
matter. The model thread's own time per tick delays every reply. The time until the last reader has its piece delays
one piece. Runs alternate: each run of `Ticket` is followed by a run of each peer, and compared with it.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from benchmarks.measure import spread
from erllama.engine.requests.request import Event, Request, RequestOptions
from erllama.engine.requests.ticket import SLEEP_SECONDS, DeltaPiece, Piece, Ticket
from erllama.errors import Error

_PIECE = DeltaPiece("text", "word", (1,), ())


class ConditionTicket(Ticket):
    """A ticket whose readers wait for a `threading.Condition`. It joins no unread pieces."""

    def __init__(self, request: Request, streaming: bool) -> None:
        super().__init__(request, streaming)
        self._pieces: deque[Piece] = deque()
        self._condition = threading.Condition()

    def notify(self) -> None:
        with self._condition:
            self._pieces.extend(self._emitted)
            self._emitted.clear()
            self._condition.notify_all()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self.notify()

    def events(self) -> Iterator[Event]:
        while True:
            self._check_process()
            with self._condition:
                while not self._pieces and not self.done:
                    self._condition.wait(timeout=SLEEP_SECONDS)
                piece = self._pieces.popleft() if self._pieces else None
            if piece is None:
                return
            yield self._make_event(piece)


class LockTicket(Ticket):
    """A ticket with one lock for each reader. It joins no unread pieces."""

    def __init__(self, request: Request, streaming: bool) -> None:
        super().__init__(request, streaming)
        self._pieces: deque[Piece] = deque()
        self._lock = threading.Lock()
        self._waiters: list[threading.Lock] = []  # acquired, and released to wake the reader

    def notify(self) -> None:
        with self._lock:
            self._pieces.extend(self._emitted)
            self._emitted.clear()
            waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.release()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self.notify()

    def events(self) -> Iterator[Event]:
        while True:
            self._check_process()
            waiter = None
            with self._lock:
                piece = self._pieces.popleft() if self._pieces else None
                if piece is None:
                    if self.done:
                        return
                    waiter = threading.Lock()
                    waiter.acquire()
                    self._waiters.append(waiter)
            if piece is not None:
                yield self._make_event(piece)
            while waiter is not None and not waiter.acquire(timeout=SLEEP_SECONDS):
                pass


class Ticks(NamedTuple):
    """Microseconds per tick, medians of one run.

    Attributes:
        model_thread: the time in which the model thread emits the pieces and wakes the readers.
        delivery: the time until the last reader has its piece.
    """

    model_thread: float
    delivery: float


def measure(kind: type[Ticket], n_streams: int, n_ticks: int, decode_seconds: float) -> Ticks:
    """Run one model thread and its readers."""
    request = Request(np.zeros(1, np.int32), RequestOptions())
    tickets = [kind(request, streaming=True) for _ in range(n_streams)]
    received: list[list[float]] = [[] for _ in tickets]

    def read(ticket: Ticket, times: list[float]) -> None:
        with suppress(Error):
            for _ in ticket.events():
                times.append(time.perf_counter())  # noqa: PERF401 - each time is taken as its event arrives

    readers = [threading.Thread(target=read, args=pair) for pair in zip(tickets, received, strict=True)]
    for reader in readers:
        reader.start()
    sent, spent = [], []
    for _ in range(n_ticks):
        time.sleep(decode_seconds)
        began = time.perf_counter()
        for ticket in tickets:
            ticket.emit(_PIECE)
        for ticket in tickets:
            ticket.notify()
        spent.append(time.perf_counter() - began)
        sent.append(began)
    for ticket in tickets:
        ticket.fail(Error("the end"))
    for reader in readers:
        reader.join()
    last = [max(times) for times in zip(*received, strict=True)]
    delivery = [end - begin for begin, end in zip(sent, last, strict=True)]
    return Ticks(1e6 * statistics.median(spent), 1e6 * statistics.median(delivery))


def compare(n_streams: int, n_runs: int, n_ticks: int, decode_seconds: float) -> None:
    """Print the times of all kinds of tickets, and the ratios of alternating runs."""
    found: dict[type[Ticket], list[Ticks]] = {Ticket: [], ConditionTicket: [], LockTicket: []}
    for _ in range(n_runs):
        for kind, runs in found.items():
            runs.append(measure(kind, n_streams, n_ticks, decode_seconds))
    for field in Ticks._fields:
        ours = [getattr(run, field) for run in found[Ticket]]
        for kind, runs in found.items():
            theirs = [getattr(run, field) for run in runs]
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            compared = "" if kind is Ticket else f"; Ticket takes {spread(ratios)} of it"
            print(f"  {field:13} {kind.__name__:16} {spread(theirs, 1)} us{compared}")


def main() -> None:
    """Compare with one stream, and with eight."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.waiting", description=__doc__)
    parser.add_argument("--runs", type=int, default=10, help="alternating runs of each kind")
    parser.add_argument("--ticks", type=int, default=500, help="ticks of a run")
    parser.add_argument("--decode-ms", type=float, default=1.0, help="time between two ticks")
    options = parser.parse_args()
    for n_streams in (1, 8):
        print(f"{n_streams} stream{'s' if n_streams > 1 else ''}, {options.runs} runs of {options.ticks} ticks")
        compare(n_streams, options.runs, options.ticks, options.decode_ms / 1000)


if __name__ == "__main__":
    main()
