"""The number of threads of each computation, chosen from the measured time of earlier ones.

Other programs, and other models, may use the cores. A computation then waits for those of its threads that have no
core, and fewer threads may be faster. The calling thread's CPU time shows this: if it is less than the elapsed
time, the thread waited. Only then are fewer threads tried. While fewer are in use, more are tried now and then.
Models of this process that compute at the same time divide the cores.

`LlamaBackend` and `LlamaEmbedder` call this. One thread uses a choice; any thread may read it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from weakref import ReferenceType, ref

# Batches with at most as many rows are like decodes: their time depends on the weights more than on the rows.
_FEW_ROWS = 16
# A batch of a few rows takes about as long as this many rows of prefill longer than a batch without rows.
_FIXED_ROWS = 3
# A measurement ends after so many computations, if they took long enough to average the kernel's time slices (about
# 4 ms), or after so many seconds.
_MIN_COMPUTATIONS, _MIN_SECONDS, _MAX_SECONDS = 4, 0.03, 0.2
# A thread that waits for less than this part of the time has a core for itself. It must wait for longer in so many
# consecutive measurements before fewer threads are tried, because a trial on an idle machine costs time.
_WAITING, _MIN_WAITED = 0.2, 3
# Another number of threads is used from then on if it takes at most this part of the time: measurements vary.
_BETTER = 0.95
# A trial that takes so many times longer ends after the first computation, or after the second one.
_HOPELESS = (3.0, 1.4)
# Seconds until a number is tried again that was not better. Each failed trial doubles them.
_PAUSE, _LONGEST_PAUSE = 0.25, 2.0
# A pause is so many times longer than the trial, so that trials take little of the time.
_PAUSE_TO_TRIAL = 15
# Seconds for which a model counts as computing after a computation: between two tokens it computes again.
_RECENT = 0.05


class Choices:
    """The choices of this process that divide the cores. Thread-safe.

    Attributes:
        weak: references to the choices of models that are loaded.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.weak: tuple[ReferenceType[ThreadChoice], ...] = ()

    def add(self, choice: ThreadChoice) -> None:
        """Add a choice. It is removed when it is collected, or by `remove`."""
        with self._lock:
            self.weak = (*(known for known in self.weak if known() is not None), ref(choice))

    def remove(self, choice: ThreadChoice) -> None:
        """Remove a choice. Idempotent."""
        with self._lock:
            self.weak = tuple(known for known in self.weak if known() not in (None, choice))

    def n_others(self, choice: ThreadChoice, now: float) -> int:
        """Return how many other choices belong to models that compute now, or did a moment ago."""
        found = [known() for known in self.weak]
        return sum(other is not None and other is not choice and other.active_until >= now for other in found)


CHOICES = Choices()


@dataclass(slots=True)
class _Measurement:
    """The sums over some computations with the same number of threads."""

    n: int = 0
    elapsed: float = 0.0
    cpu: float = 0.0
    rows: float = 0.0

    def add(self, n_rows: int, elapsed: float, cpu: float) -> None:
        self.n += 1
        self.elapsed += elapsed
        self.cpu += cpu
        self.rows += n_rows + _FIXED_ROWS

    @property
    def complete(self) -> bool:
        return self.elapsed >= (_MIN_SECONDS if self.n >= _MIN_COMPUTATIONS else _MAX_SECONDS)

    @property
    def cost(self) -> float:
        return self.elapsed / self.rows

    @property
    def waited(self) -> bool:
        return self.cpu < (1 - _WAITING) * self.elapsed


class _Direction:
    """When to try more, or fewer, threads, and how many steps of the ladder away."""

    def __init__(self) -> None:
        self.due = 0.0
        self.step = 1
        self._pause = _PAUSE

    def succeeded(self, now: float) -> None:
        self.due, self.step, self._pause = now, 1, _PAUSE

    def restart(self, now: float, elapsed: float) -> None:
        """Wait before the next trial: the number in use is new, and better than the one in this direction."""
        self.step, self._pause = 1, _PAUSE
        self.due = now + max(_PAUSE, _PAUSE_TO_TRIAL * elapsed)

    def failed(self, now: float, elapsed: float) -> None:
        """Wait for the next trial, which is a step further away: one thread less may change nothing."""
        self.due = now + max(self._pause, _PAUSE_TO_TRIAL * elapsed)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self.step += 1


class ThreadSearch:
    """Finds the fastest number of threads for one kind of batch.

    Args:
        most: the greatest number.
        clock: the time in seconds.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._ladder = ladder(most)
        self._at = self._top = len(self._ladder) - 1
        self._limit = most  # of the last `number`
        self._trial: int | None = None  # an index in the ladder
        self._cost = 0.0  # seconds per row with the number in use
        self._n_waited = 0  # consecutive measurements in which the calling thread waited
        self._now = _Measurement()
        self._up, self._down = _Direction(), _Direction()

    @property
    def chosen(self) -> int:
        """The number of threads in use, apart from trials."""
        return self._ladder[min(self._at, self._top)]

    def number(self, limit: int) -> int:
        """Return the number of threads of the next computation, at most `limit`."""
        if limit != self._limit:
            self._limit = limit
            top = max((i for i, n in enumerate(self._ladder) if n <= limit), default=0)
            if top != self._top:
                self._top, self._trial, self._now = top, None, _Measurement()
                self._cost, self._n_waited = 0.0, 0
        return self._ladder[min(self._at if self._trial is None else self._trial, self._top)]

    def record(self, n_rows: int, elapsed: float, cpu: float) -> None:
        """Add a computation with the number that `number` returned.

        Args:
            n_rows: the rows of the batch.
            elapsed: seconds that it took.
            cpu: seconds of CPU time of the calling thread.
        """
        measured = self._now
        measured.add(n_rows, elapsed, cpu)
        if self._trial is not None and measured.cost > _HOPELESS[measured.n > 1] * self._cost:
            self._end_trial(measured)
        elif measured.complete:
            if self._trial is None:
                self._end_measurement(measured)
            else:
                self._end_trial(measured)

    def _end_measurement(self, measured: _Measurement) -> None:
        self._now = _Measurement()
        self._n_waited = self._n_waited + 1 if measured.waited else 0
        self._cost = measured.cost if not self._cost else (self._cost + measured.cost) / 2
        now, at = self._clock(), min(self._at, self._top)
        if at < self._top and now >= self._up.due:
            self._trial = at + 1 + (self._up.step - 1) % (self._top - at)
        elif at > 0 and self._n_waited >= _MIN_WAITED and now >= self._down.due:
            self._trial = at - 1 - (self._down.step - 1) % at

    def _end_trial(self, measured: _Measurement) -> None:
        trial, now = self._trial, self._clock()
        assert trial is not None
        self._trial, self._now, self._n_waited = None, _Measurement(), 0
        up = trial > min(self._at, self._top)
        tried, other = (self._up, self._down) if up else (self._down, self._up)
        if measured.cost > _BETTER * self._cost:
            tried.failed(now, measured.elapsed)
        else:
            self._at, self._cost = trial, measured.cost
            tried.succeeded(now)
            other.restart(now, measured.elapsed)


def ladder(most: int) -> tuple[int, ...]:
    """Return the numbers of threads to try: 1 to `most`, in steps of a quarter, and one less than `most`."""
    found = {most, max(most - 1, 1)}
    n = most
    while n > 1:
        n = min(n - 1, n * 3 // 4)
        found.add(n)
    return tuple(sorted(found))


class ThreadChoice:
    """The number of threads of each computation of one context.

    Args:
        n_threads, n_threads_batch: the number for batches of one row, and for others; as configured.
        reason: why these numbers, for people to read.
        adapts: whether the numbers may be lowered: both are defaults, and the CPU computes.
        same_bits: whether the bits of a result do not depend on the number of threads.
        choices: those with which this one divides the cores. It adds itself to them.

    Attributes:
        fixed: whether computations use the configured numbers for now.
        as_in_recipe: whether the last computation has the bits that the configured numbers yield.
        active_until: until when the model counts as one that computes.
    """

    def __init__(
        self,
        n_threads: int,
        n_threads_batch: int,
        reason: str,
        *,
        adapts: bool,
        same_bits: bool,
        choices: Choices = CHOICES,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._numbers = n_threads, n_threads_batch
        self._reason = reason
        self._adapts, self._same_bits = adapts, same_bits
        self._clock = clock
        self._searches = ThreadSearch(n_threads, clock), ThreadSearch(n_threads_batch, clock)
        self._n_others = self._n_rows = self._kind = 0
        self.fixed = False
        self.as_in_recipe = True
        self.active_until = -math.inf
        self._choices = choices
        choices.add(self)

    @property
    def n_threads(self) -> int:
        """The number for decodes that is in use now."""
        return self._used(0)

    @property
    def n_threads_batch(self) -> int:
        """The number for prefill that is in use now."""
        return self._used(1)

    @property
    def reason(self) -> str:
        """Why these numbers are in use, for people to read."""
        if not self._adapts or (self.n_threads, self.n_threads_batch) == self._numbers:
            return self._reason
        if self._n_others:
            return f"{self._reason}, shared by {self._n_others + 1} models that compute"
        return f"{self._reason}, fewer in use because more are slower beside other programs"

    def _used(self, kind: int) -> int:
        if not self._adapts:
            return self._numbers[kind]
        return min(self._searches[kind].chosen, self._share(kind))

    def _share(self, kind: int) -> int:
        return max(1, self._numbers[kind] // (1 + self._n_others))

    def begin(self, n_rows: int) -> int:
        """Begin a computation of so many rows. Returns the number of threads for it."""
        self.active_until = math.inf
        choices = self._choices
        self._n_others = choices.n_others(self, self._clock()) if len(choices.weak) > 1 else 0
        self._n_rows = n_rows
        self._kind = kind = int(n_rows > (_FEW_ROWS if self._adapts else 1))
        if self._adapts and not self.fixed:
            n = self._searches[kind].number(self._share(kind))
        else:
            n = self._numbers[kind]
        self.as_in_recipe = self._same_bits or n == self._numbers[int(n_rows > 1)]
        return n

    def end(self) -> None:
        """End a computation, also one that failed."""
        self.active_until = self._clock() + _RECENT

    def record(self, elapsed: float, cpu: float) -> None:
        """Add the time of the last computation, which did not fail.

        Args:
            elapsed: seconds that it took.
            cpu: seconds of CPU time of the calling thread.
        """
        if self._adapts and not self.fixed:
            self._searches[self._kind].record(self._n_rows, elapsed, cpu)

    def close(self) -> None:
        """Stop counting as a model that computes."""
        self._choices.remove(self)
