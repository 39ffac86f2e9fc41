"""Many short requests at once that end in every way: replies stay right, counters add up, no state is left.

Threads and an event loop ask from a pool of requests whose replies alone, on a fresh and cold model, are known.
They cancel, stop, time out, drop what they read and are turned away, while the backend fails now and then. What is
asked is drawn from seeds; how it interleaves is not.

ERLLAMA_SOAK says how many requests; `make stress` asks for more.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import queue
import random
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

import erllama
from erllama.cache import KEY_BYTES
from erllama.engine import Backend, Batch, Completion, Done, Event, Ticket
from erllama.engine.backends.llama import LlamaBackend
from erllama.engine.backends.stub import StubBackend
from erllama.engine.kv.sequence_kv import SequenceKV
from erllama.engine.sampling.sampler import Sampler
from erllama.engine.scheduling.sequence import Sequence
from support.threads import wait_until

REQUESTS = int(os.environ.get("ERLLAMA_SOAK", "200"))
LIMIT = 300.0 + REQUESTS / 10  # seconds after which a call counts as hanging; no call should come near it
N_THREADS, N_TASKS = 6, 5
MIB = 2**20
Make = Callable[[erllama.Cache], erllama.Model]


# --- what is asked ---------------------------------------------------------------------------


@dataclass(frozen=True)
class SoakRequest:
    """A request, and its reply alone on a new model without a cache."""

    prompt: tuple[int, ...]
    options: dict[str, object]
    reply: Completion


def alone(make: Make, prompt: tuple[int, ...], options: dict[str, object]) -> Completion:
    with erllama.Cache(ram=0) as cache, make(cache) as model:
        return model.complete(prompt, **options)  # type: ignore[arg-type]


def pool_of(make: Make, n: int, longest: int, growing: list[int | None]) -> list[SoakRequest]:
    """Make requests that share prefixes in many ways. Those of `growing` tokens need more cells than stay free."""
    dice = random.Random(n)
    systems = [ids(dice, length) for length in (5, 17, 64, 90)]
    systems.append(systems[2][:41] + ids(dice, 30))
    pool: list[SoakRequest] = []
    while len(pool) < n:
        prompt = dice.choice(systems) + ids(dice, dice.randrange(30))
        if pool and dice.random() < 0.5:
            earlier = dice.choice(pool).reply.context_tokens
            kept = len(earlier) if dice.random() < 0.7 else dice.randrange(1, len(earlier) + 1)
            prompt = earlier[:kept] + ids(dice, dice.randrange(20))
        if len(prompt) > longest:
            continue
        options: dict[str, object] = {
            "max_tokens": dice.choice(growing) if dice.random() < 0.35 else dice.randrange(41),
            "temperature": dice.choice([0.0, 0.8, 1.5]),
            "seed": dice.randrange(2**32),
        }
        if dice.random() < 0.2:
            options["logprobs"] = dice.randrange(4)
        if dice.random() < 0.3:
            options["stop"] = stops_in(dice, alone(make, prompt, options).text)
        pool.append(SoakRequest(prompt, options, alone(make, prompt, options)))
    return pool


def ids(dice: random.Random, n: int) -> tuple[int, ...]:
    return tuple(dice.randrange(3, 256) for _ in range(n))


def stops_in(dice: random.Random, text: str) -> list[str]:
    """Return a stop string that occurs, one around it that may occur, and one that never does."""
    at = dice.randrange(len(text) + 1)
    found = [text[at : at + dice.randrange(1, 4)], text[max(at - 1, 0) : at + 5] + "never", "never"]
    return [stop for stop in found if stop]


# --- what goes wrong -------------------------------------------------------------------------


class Faults:
    """Makes a backend fail at random; decodes rarely, because there are many.

    Attributes:
        counts: the faults so far, by kind.
        n_ticks, n_tokens: successful decodes and their tokens.
        short_of_cells: whether the backend also reports too few cells.
    """

    def __init__(self, backend: Backend) -> None:
        self.counts: Counter[str] = Counter()
        self.n_ticks = self.n_tokens = 0
        self.short_of_cells = False
        self._dice = random.Random(1)
        self._backend = backend
        self._decode = backend.decode
        self._names = {
            "pack": erllama.BackendError("injected: pack"),
            "restore": erllama.StateError("injected: restore"),
            "share": erllama.BackendError("injected: share"),
            "cut": RuntimeError("injected: cut"),
            "drop": erllama.BackendError("injected: drop"),
        }
        for name, error in self._names.items():
            setattr(backend, name, self._failing(name, getattr(backend, name), error))
        backend.decode = self._failing_decode  # type: ignore[method-assign]

    def stop(self) -> None:
        for name in (*self._names, "decode"):
            delattr(self._backend, name)

    def _now(self, name: str, rate: float) -> bool:
        happens = self._dice.random() < rate
        self.counts[name] += happens
        return happens

    def _failing(self, name: str, call: Callable[..., object], error: Exception) -> Callable[..., object]:
        def instead(*arguments: object) -> object:
            if self._now(name, 0.01):
                raise type(error)(*error.args)
            return call(*arguments)

        return instead

    def _failing_decode(self, batch: Batch) -> NDArray[np.float32]:
        if self.short_of_cells and self._now("cells", 0.001):
            raise erllama.CellsExhausted("injected: no cells")
        if self._now("before", 0.001):
            raise erllama.BackendError("injected: before the decode")
        logits = self._decode(batch)
        if self._now("after", 0.001):
            raise ValueError("injected: after the decode")
        self.n_ticks += 1
        self.n_tokens += len(batch.tokens)
        if len(logits) and self._now("nan", 0.001):
            logits = logits.copy()
            logits[self._dice.randrange(len(logits))] = np.nan
        return logits


class UnexpectedErrors(logging.Handler):
    """Collects logged errors that were not injected, as text, because a record would keep its frames alive."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if "injected" not in text:
            self.found.append(text)


@contextmanager
def collecting_errors() -> Iterator[UnexpectedErrors]:
    complaints = UnexpectedErrors()
    log = logging.getLogger("erllama")
    propagated, log.propagate = log.propagate, False  # records that pytest captures would keep frames alive
    log.addHandler(complaints)
    try:
        yield complaints
    finally:
        log.removeHandler(complaints)
        log.propagate = propagated


# --- who asks --------------------------------------------------------------------------------


class ConcurrentClients:
    """Threads and event-loop tasks that send requests to one model concurrently.

    Args:
        exact: whether every reply, not only a reproducible one, has the bits of a reply alone.

    Attributes:
        seen: how requests ended, as their callers saw it.
        wrong: faults that were found.
        n_accepted: requests that were not refused.
        tickets: those of their tickets that are still referenced.
    """

    def __init__(self, model: erllama.Model, pool: list[SoakRequest], *, exact: bool) -> None:
        self.model = model
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.n_accepted = 0
        self.tickets: weakref.WeakSet[Ticket] = weakref.WeakSet()
        self._pool = pool
        self._exact = exact
        self._keys: dict[int, bytes | None] = {}
        self._lock = threading.Lock()
        self._to_cancel: queue.SimpleQueue[erllama.Stream | None] = queue.SimpleQueue()
        self._left = 0
        self._submit = model._runner.submit
        model._runner.submit = self._counted  # type: ignore[method-assign]

    def _counted(self, ticket: Ticket) -> None:
        self._submit(ticket)
        with self._lock:
            self.n_accepted += 1
            self._left -= 1
            self.tickets.add(ticket)

    def ask(self, n: int, seed: int) -> None:
        """Submit until `n` requests, or a few more, are accepted, and wait until all have ended."""
        self._left = n
        work: list[Callable[[], None]] = [
            lambda i=i: self._ask_repeatedly(random.Random(f"{seed} {i}")) for i in range(N_THREADS)
        ]
        work += [lambda: asyncio.run(self._ask_in_tasks(seed)), self._make_other_calls]
        threads = [threading.Thread(target=self._guarded, args=[one], daemon=True) for one in work]
        canceller = threading.Thread(target=self._guarded, args=[self._cancel], daemon=True)
        for thread in [*threads, canceller]:
            thread.start()
        late = time.monotonic() + LIMIT
        for thread in threads:
            thread.join(max(late - time.monotonic(), 0))
        self._to_cancel.put(None)
        canceller.join(max(late - time.monotonic(), 1))
        while (self.model.pending or self.model.queue_depth) and time.monotonic() < late:
            time.sleep(0.001)
        assert not any(thread.is_alive() for thread in threads), f"a request waits without end: {self.model.info}"
        self.model.end_session("nobody's")  # returns between two ticks, so after the last one

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._report_wrong(f"{type(error).__name__}: {error}")
            self._left = 0

    def _report_wrong(self, what: str) -> None:
        with self._lock:
            self.wrong.append(what)

    def _record_end(self, what: str) -> None:
        with self._lock:
            self.seen[what] += 1

    # --- one request

    def _draw(self, dice: random.Random, *, calm: bool = False) -> tuple[int, dict[str, object]]:
        """Draw an index into the pool, and options in addition to its own."""
        number = dice.randrange(len(self._pool))
        extra: dict[str, object] = {}
        if dice.random() < 0.15:
            extra["cache_salt"] = dice.choice(["a", "b"])
        if dice.random() < 0.15:
            extra["session_id"] = dice.choice("wxyz")
        if dice.random() < 0.04:
            extra["reproducible"] = True
        if dice.random() < 0.2:
            with self._lock:
                key = dice.choice(list(self._keys.values()) or [None])
            extra["parent_key"] = key if dice.random() < 0.8 else dice.randbytes(KEY_BYTES)
        if not calm and dice.random() < 0.05:
            extra["timeout"] = dice.choice([0.0, 0.001, 0.01, 0.05])
        return number, extra

    @contextmanager
    def _expecting_errors(self) -> Iterator[None]:
        """Count expected errors and suppress them."""
        try:
            yield
        except (
            erllama.QueueFull,
            erllama.SessionBusy,
            erllama.DeadlineExceeded,
            erllama.SamplingError,
            erllama.CellsExhausted,
        ) as error:
            self._record_end(type(error).__name__)
        except erllama.BackendError as error:
            self._record_end(type(error).__name__)
            if "injected" not in str(error):
                self._report_wrong(f"an error that was not injected: {error!r}")

    def _check_reply(
        self, number: int, extra: dict[str, object], reply: Completion, *, cancelled: bool = False
    ) -> None:
        """Check a reply. A `cancelled` one may be incomplete."""
        asked = self._pool[number]
        self._record_end(reply.finish_reason)
        with self._lock:
            self._keys[number] = reply.finish_key
        if reply.context_tokens != asked.prompt + reply.tokens:
            self._report_wrong(f"{number}: the context is not prompt and reply")
        if not cancelled and reply.finish_reason == "cancelled":
            self._report_wrong(f"{number}: cancelled without a request")
        if not (self._exact or extra.get("reproducible")):
            return
        wanted = asked.reply
        begun = cancelled and reply.tokens == wanted.tokens[: len(reply.tokens)]
        if not begun and comparable(reply) != comparable(wanted):
            self._report_wrong(
                f"{number} {extra} cancelled={cancelled}: {comparable(reply)} instead of {comparable(wanted)}"
            )

    def _check_events(self, number: int, extra: dict[str, object], events: list[Event], cancelled: bool) -> None:
        """Check a stream that was read to its end."""
        *pieces, end = events
        if not isinstance(end, Done) or any(isinstance(piece, Done) for piece in pieces):
            self._report_wrong(f"{number}: a stream that does not end with Done")
            return
        reply = end.completion
        streamed = tuple(token for piece in pieces for token in piece.tokens)  # type: ignore[union-attr]
        text = "".join(piece.text for piece in pieces)  # type: ignore[union-attr]
        # The tokens of a stop string are reported only at the end.
        if text != reply.text or streamed != reply.tokens[: len(streamed)]:
            self._report_wrong(f"{number}: the pieces are not those of the reply")
        self._check_reply(number, extra, reply, cancelled=cancelled)

    # --- threads

    def _ask_repeatedly(self, dice: random.Random) -> None:
        ways = [
            self._complete,
            self._prefill,
            self._stream,
            self._drop,
            self._submit_burst,
            self._stop_reading,
            self._submit_invalid,
        ]
        unread: deque[tuple[int, dict[str, object], erllama.Stream]] = deque()
        while self._left > 0:
            (way,) = dice.choices(ways, weights=[30, 8, 25, 10, 4, 8, 3])
            with self._expecting_errors():
                if way == self._stop_reading:
                    unread.append(self._stop_reading(dice))
                else:
                    way(dice)
            if len(unread) > 3:
                self._read_on(unread.popleft())
            time.sleep(dice.random() * 0.02)
        while unread:
            self._read_on(unread.popleft())

    def _complete(self, dice: random.Random) -> None:
        number, extra = self._draw(dice)
        asked = self._pool[number]
        self._check_reply(number, extra, self.model.complete(asked.prompt, **asked.options, **extra))  # type: ignore[arg-type]

    def _prefill(self, dice: random.Random) -> None:
        number, extra = self._draw(dice)
        prompt = self._pool[number].prompt
        reply = self.model.prefill(prompt, **extra)  # type: ignore[arg-type]
        self._record_end("prefilled")
        if reply.context_tokens != prompt or reply.finish_reason != "length":
            self._report_wrong(f"{number}: a prefill that sampled")

    def _open(self, number: int, extra: dict[str, object]) -> erllama.Stream:
        asked = self._pool[number]
        return self.model.stream(asked.prompt, **asked.options, **extra)  # type: ignore[arg-type]

    def _stream(self, dice: random.Random) -> None:
        number, extra = self._draw(dice)
        stream = self._open(number, extra)
        cancelled = dice.random() < 0.4
        events = []
        if cancelled:
            if dice.random() < 0.5:
                self._to_cancel.put(stream)
            else:
                events = [event for event, _ in zip(stream, range(dice.randrange(8)), strict=False)]
                stream.cancel()
                if any(isinstance(event, Done) for event in events):
                    return
                events = []  # zip consumes one more item than it yields
                self._check_reply(number, extra, stream.result(), cancelled=True)
                return
        events = list(stream)
        self._check_events(number, extra, events, cancelled)

    def _drop(self, dice: random.Random) -> None:
        """Abandon a stream, by leaving a `with` or by dropping the stream."""
        number, extra = self._draw(dice)
        stream = self._open(number, extra)
        for _ in range(dice.randrange(6)):
            if next(stream, None) is None:
                break
        if dice.random() < 0.5:
            with stream:
                pass
        self._record_end("dropped")

    def _submit_burst(self, dice: random.Random) -> None:
        """Submit several at once, so that some are refused."""
        n = dice.randrange(3, 9)
        streams = []
        for _ in range(n):
            number, extra = self._draw(dice)
            with self._expecting_errors():
                streams.append((number, extra, self._open(number, extra)))
        for each in streams:
            self._read_on(each)

    def _stop_reading(self, dice: random.Random) -> tuple[int, dict[str, object], erllama.Stream]:
        number, extra = self._draw(dice)
        return number, extra, self._open(number, extra)

    def _read_on(self, unread: tuple[int, dict[str, object], erllama.Stream]) -> None:
        number, extra, stream = unread
        with self._expecting_errors():
            self._check_events(number, extra, list(stream), False)

    def _submit_invalid(self, dice: random.Random) -> None:
        """Prompts that are refused before they are queued."""
        wrong: list[object] = ["", [], [-1], [10**9], np.zeros((2, 2), np.int32), 3 * self.model.n_ctx * [5], None]
        with pytest.raises(erllama.PromptError):
            self.model.complete(dice.choice(wrong))  # type: ignore[arg-type]
        self._record_end("refused prompt")

    def _cancel(self) -> None:
        dice = random.Random(7)
        while (stream := self._to_cancel.get()) is not None:
            time.sleep(dice.random() * 0.004)
            stream.cancel()
            del stream

    def _make_other_calls(self) -> None:
        """Other calls while the model computes."""
        dice = random.Random(8)
        while self._left > 0:
            time.sleep(0.003)
            chance = dice.random()
            with self._expecting_errors():
                if chance < 0.01:
                    self.model.evict()
                elif chance < 0.04:
                    self.model.cache.evict_bytes(dice.randrange(20_000))
                elif chance < 0.1:
                    self.model.end_session(dice.choice("wxyz"))
                elif chance < 0.2:
                    self.model.cached_prefix(dice.choice(self._pool).prompt)
                elif chance < 0.3:
                    found: list[str] = []
                    self.model._runner._call(lambda found=found: found.extend(disagreements(self.model)))
                    self.wrong.extend(found)
                else:
                    repr(self.model), self.model.info, self.model.last_cache_hit

    # --- tasks

    async def _ask_in_tasks(self, seed: int) -> None:
        await asyncio.gather(*(self._ask_on_async(random.Random(f"{seed} task {i}")) for i in range(N_TASKS)))

    async def _ask_on_async(self, dice: random.Random) -> None:
        ways = [self._acomplete, self._acomplete_cancelled, self._astream, self._astream_dropped, self._aprefill]
        while self._left > 0:
            (way,) = dice.choices(ways, weights=[30, 12, 30, 12, 6])
            with self._expecting_errors():
                await way(dice)
            await asyncio.sleep(dice.random() * 0.02)

    async def _acomplete(self, dice: random.Random) -> None:
        number, extra = self._draw(dice)
        asked = self._pool[number]
        self._check_reply(number, extra, await self.model.acomplete(asked.prompt, **asked.options, **extra))  # type: ignore[arg-type]

    async def _acomplete_cancelled(self, dice: random.Random) -> None:
        task = asyncio.create_task(self._acomplete(dice))
        await asyncio.sleep(dice.choice([0, 0.001, 0.005, 0.02]))
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            self._record_end("task cancelled")

    async def _astream(self, dice: random.Random) -> None:
        number, extra = self._draw(dice)
        asked = self._pool[number]
        stop_at = dice.randrange(8) if dice.random() < 0.3 else None
        events: list[Event] = []
        async with self.model.astream(asked.prompt, **asked.options, **extra) as stream:  # type: ignore[arg-type]
            if stop_at == 0:
                stream.cancel()
            async for event in stream:
                events.append(event)
                if len(events) == stop_at:
                    stream.cancel()
        self._check_events(number, extra, events, stop_at is not None)

    async def _astream_dropped(self, dice: random.Random) -> None:
        number, extra = self._draw(dice)
        asked = self._pool[number]
        stream = self.model.astream(asked.prompt, **asked.options, **extra)  # type: ignore[arg-type]
        n = dice.randrange(6)
        if n:
            async for _ in stream:
                n -= 1
                if not n:
                    break
        self._record_end("dropped")

    async def _aprefill(self, dice: random.Random) -> None:
        number, extra = self._draw(dice)
        reply = await self.model.aprefill(self._pool[number].prompt, **extra)  # type: ignore[arg-type]
        self._record_end("prefilled")
        if reply.tokens:
            self._report_wrong(f"{number}: a prefill that sampled")


def comparable(reply: Completion) -> tuple[object, ...]:
    return reply.finish_reason, reply.tokens, reply.text, reply.stop_sequence, reply.logprobs


# --- what is left ----------------------------------------------------------------------------


def disagreements(model: erllama.Model) -> list[str]:
    """Return where the scheduler and the backend disagree about the context. Called between two ticks."""
    scheduler = model._runner._scheduler
    slots, backend = scheduler.slots, model._backend
    found = []
    taken = [sequence.slot for sequence in scheduler.running if sequence.slot is not None]
    taken += [parked.slot for parked in slots.parked]
    if sorted(slots._free_slots + taken) != list(range(backend.limits.n_sequences)):
        found.append(f"sequences {slots._free_slots} are free and {taken} taken")
    held = {s.slot: s.n_computed for s in scheduler.running if s.slot is not None}
    held |= {parked.slot: len(parked.tokens) for parked in slots.parked}
    for number in range(backend.limits.n_sequences):
        counted = (held.get(number, 0), slots.cells.n_tokens(number), positions_of(backend, number))
        if len(set(counted)) > 1:
            found.append(f"sequence {number} holds, by itself, the cells and the backend, {counted}")
    if isinstance(backend, StubBackend) and slots.cells.used != backend.cells_used:
        found.append(f"{slots.cells.used} cells are counted, {backend.cells_used} used")
    if any(sequence in scheduler.waiting for sequence in scheduler.running):
        found.append("a request waits and runs")
    if any(sequence.slot is not None for sequence in scheduler.waiting):
        found.append("a request that waits has a sequence")
    return found


def positions_of(backend: Backend, number: int) -> int:
    if isinstance(backend, LlamaBackend):
        return backend._context.last_position(number) + 1
    assert isinstance(backend, StubBackend)
    return backend._lengths[number]


def alive() -> Counter[str]:
    """Count the living objects that requests own, by type."""
    gc.collect()
    kinds = (Sequence, Ticket, Sampler, SequenceKV, erllama.Stream, erllama.AsyncStream)
    return Counter(type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, kinds))


class Footprint:
    """Return the threads and open files of this process."""

    def __init__(self) -> None:
        gc.collect()
        process = psutil.Process()
        self.threads = process.num_threads()
        self.files = process.num_fds() if hasattr(process, "num_fds") else process.num_handles()
        self.rss = process.memory_info().rss


def assert_idle(model: erllama.Model, crowd: ConcurrentClients, faults: Faults) -> None:
    """Check that no request runs or waits, and that the counters cover every request."""
    assert not crowd.wrong, "\n".join(crowd.wrong)
    assert (model.pending, model.queue_depth, model.phase) == (0, 0, "idle")
    assert all(ticket.done for ticket in crowd.tickets)
    assert disagreements(model) == []
    assert not model._runner._sessions
    metrics = model._runner.metrics
    assert sum(metrics.finished.values()) + sum(metrics.failed.values()) == crowd.n_accepted
    assert metrics.refused == crowd.seen["QueueFull"]
    assert set(metrics.failed) <= {"BackendError", "CellsExhausted", "DeadlineExceeded", "SamplingError"}
    assert metrics.failed.get("SamplingError", 0) == faults.counts["nan"]
    assert metrics.failed.get("CellsExhausted", 0) <= faults.counts["cells"]
    assert metrics.ticks == faults.n_ticks
    assert metrics.prefilled_tokens + metrics.decoded_tokens == faults.n_tokens
    assert metrics.shared_tokens + metrics.cached_tokens <= metrics.prompt_tokens


def assert_nothing_is_held(model: erllama.Model) -> None:
    """Check that the context is empty after `evict()`."""
    backend, slots = model._backend, model._runner._scheduler.slots
    assert (slots.cells.used, slots.parked) == (0, [])
    if isinstance(backend, LlamaBackend):
        numbers = range(backend.limits.n_sequences + 1)  # one is the scratch sequence
        assert [backend._context.last_position(number) for number in numbers] == [-1] * len(numbers)
    else:
        assert isinstance(backend, StubBackend)
        assert backend.cells_used == 0
        assert backend._lengths == [0] * backend.limits.n_sequences


def assert_sound(cache: erllama.Cache) -> None:
    cache.flush()
    assert cache.verify() == []
    cache.check_integrity()
    assert not any(row.pins for row in cache.rows())
    assert cache.disk_error is None
    assert cache.counters()["disk_errors"] == 0


def assert_no_growth(before: Footprint, after: Footprint) -> None:
    """Check that memory does not grow, except for what allocator and interpreter keep at first."""
    allowed = 8 * MIB if REQUESTS >= 5000 else 32 * MIB
    grown = after.rss - before.rss
    assert grown <= 0.05 * before.rss + allowed, f"{before.rss / MIB:.1f} MiB, then {after.rss / MIB:.1f} MiB"


def soak(make: Make, cache: erllama.Cache, pool: list[SoakRequest], *, exact: bool) -> None:
    living = alive()
    with collecting_errors() as complaints:
        with make(cache) as model:
            faults = Faults(model._backend)
            crowd = ConcurrentClients(model, pool, exact=exact)
            crowd.ask(REQUESTS // 3, seed=1)
            assert_idle(model, crowd, faults)
            faults.short_of_cells = True
            warm = Footprint()
            crowd.ask(REQUESTS - REQUESTS // 3, seed=2)
            assert_idle(model, crowd, faults)
            assert_no_growth(warm, Footprint())
            faults.stop()
            model.evict()
            assert_nothing_is_held(model)
            assert alive() == living, "the model is idle"
            metrics = model._runner.metrics
            report(crowd, faults, model, warm)
            assert metrics.preempted > 0 or not exact, "contexts should exceed the cells"
            assert min(crowd.seen[name] for name in ("QueueFull", "SessionBusy", "DeadlineExceeded")) > 0
            assert {"stop", "length", "cancelled"} <= set(metrics.finished)
            # Memory that cannot be cut shares only parked sequences that are continued.
            assert metrics.shared_tokens > 0 or not model._backend.limits.can_trim
            assert metrics.cached_tokens > 0
        assert_sound(cache)
        evictions = cache.counters()["evictions_ram"] + cache.counters()["evictions_disk"]
        assert evictions > 0
    assert complaints.found == []
    del model, crowd, faults
    assert alive() == living


def report(crowd: ConcurrentClients, faults: Faults, model: erllama.Model, warm: Footprint) -> None:
    """Print a summary for the captured output."""
    metrics = model._runner.metrics
    lines = {
        "accepted": crowd.n_accepted,
        "finished": metrics.finished,
        "failed": metrics.failed,
        "refused": metrics.refused,
        "preempted": metrics.preempted,
        "ticks": metrics.ticks,
        "tokens": (metrics.prompt_tokens, metrics.shared_tokens, metrics.cached_tokens, metrics.decoded_tokens),
        "seen": dict(crowd.seen),
        "faults": dict(faults.counts),
        "MiB": (round(warm.rss / MIB, 1), round(Footprint().rss / MIB, 1)),
    }
    os.write(1, "".join(f"{name}: {value}\n" for name, value in lines.items()).encode())


@contextmanager
def leaves_nothing() -> Iterator[None]:
    """Check that threads and open files are as before."""
    before = Footprint()
    yield

    def is_as_before() -> bool:
        after = Footprint()
        return (after.threads, after.files) == (before.threads, before.files)

    wait_until(is_as_before)  # a thread that has ended its work may still exist for a moment


@pytest.mark.parametrize("can_trim", [True, False], ids=["memory that is cut", "memory that is not"])
def test_many_requests_get_the_same_replies_as_alone_and_leave_nothing(tmp_path: Path, can_trim: bool) -> None:
    def make(cache: erllama.Cache) -> erllama.Model:
        backend = StubBackend(n_ctx=288, n_ubatch=32, n_batch=96, n_sequences=9, can_trim=can_trim, eog_bias=-3.0)
        return erllama.load_backend(backend, cache=cache, n_seq_max=6, parked_cells=128, max_pending=8)

    pool = pool_of(make, 60 + REQUESTS // 50, 200, [120, 160, 200, None])
    with leaves_nothing():
        with erllama.Cache(block_size=16, ram="16KiB", disk=tmp_path, disk_quota="64KiB") as cache:
            soak(make, cache, pool, exact=True)


def test_many_requests_leave_nothing_in_libllama(tmp_path: Path, tiny_gguf: Path) -> None:
    def make(cache: erllama.Cache) -> erllama.Model:
        return erllama.load_model(tiny_gguf, cache=cache, n_ctx=1024, n_seq_max=6, n_threads=1, max_pending=8)

    pool = pool_of(make, 40 + REQUESTS // 100, 500, [100, 200, 300])
    with leaves_nothing():
        with erllama.Cache(block_size=32, ram="256KiB", disk=tmp_path, disk_quota="1MiB") as cache:
            soak(make, cache, pool, exact=False)
