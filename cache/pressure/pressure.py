"""Memory pressure: when memory runs short, tiers of the cache give some back.

`Pressure` says what is watched and when to act; `PressureWatch` reads memory at
an interval and asks its owner to evict. It owns one daemon thread, which ends
when it is stopped or when its owner is gone, and keeps neither alive. A source
that fails is told of, and the watch goes on: requests never see it. `Cache`
makes the watch and evicts.
"""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

from erllama._runtime.log import logger
from erllama.cache.pressure.memory import SOURCES, MemoryUsage, Source, open_sources, readings
from erllama.cache.sizes import parse_bytes
from erllama.checks import choice, real, reject_unknown
from erllama.errors import OptionError

log = logger("erllama.cache")

EVICTABLE = ("live", "ram", "ram_file", "disk")

# A driver or a user's source can hang, and must not take close() with it: the
# thread is left to find, when it wakes, that it was stopped.
STOP_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Pressure:
    """What memory to watch, and when and what to evict.

    Attributes:
        source: "system", "nvidia", "noop" (watch nothing), or a callable that
            gives one `MemoryUsage` or several. It is called by the watch's
            thread and must return.
        interval: seconds between looks, above 0.
        high_watermark: the used fraction of memory at which tiers are evicted.
        low_watermark: the used fraction that eviction aims for;
            0 < low_watermark <= high_watermark <= 1.
        min_evict_bytes: least bytes to ask for, a number or text as "64MiB".
        tiers: evicted tiers, in this order. The disk, which fills to its own
            quota and holds no memory, is not among them by default.

    Raises:
        OptionError: an option is of the wrong type or out of range.
    """

    source: str | Source = "system"
    interval: float = 5.0
    high_watermark: float = 0.85
    low_watermark: float = 0.75
    # With equal watermarks the want would be a few bytes, look after look.
    min_evict_bytes: int | str = "64MiB"
    tiers: tuple[str, ...] = ("ram", "ram_file")

    def __post_init__(self) -> None:
        if not callable(self.source):
            choice("source", self.source, SOURCES)
        for name, most in (("interval", threading.TIMEOUT_MAX), ("high_watermark", 1), ("low_watermark", 1)):
            number = real(name, getattr(self, name), maximum=most)
            if number <= 0:
                raise OptionError(f"{name}={number}; it must be above 0")
            object.__setattr__(self, name, number)
        if self.low_watermark > self.high_watermark:
            raise OptionError(
                f"low_watermark={self.low_watermark} is above high_watermark={self.high_watermark}; "
                "eviction starts at the high one and aims for the low one"
            )
        object.__setattr__(self, "min_evict_bytes", parse_bytes("min_evict_bytes", self.min_evict_bytes))
        object.__setattr__(self, "tiers", _tiers(self.tiers))

    @classmethod
    def of(cls, value: object) -> Pressure | None:
        """The options that `value` stands for; None for None or False.

        Args:
            value: True for the defaults, a `Pressure`, a mapping of its
                options, or a source.

        Raises:
            OptionError: none of these, or an option that is unknown or wrong.
        """
        if value is None or value is False:
            return None
        if value is True:
            return cls()
        if isinstance(value, Pressure):
            return value
        if isinstance(value, Mapping):
            options = {str(name): option for name, option in value.items()}
            known = [field.name for field in fields(cls)]
            reject_unknown({name: options[name] for name in options if name not in known}, known, "pressure")
            return cls(**options)
        if callable(value):
            return cls(source=value)
        return cls(source=choice("pressure", value, SOURCES))


def _tiers(value: object) -> tuple[str, ...]:
    if not isinstance(value, tuple | list) or not value:
        raise OptionError(f"tiers={value!r}; give a tuple of {', '.join(map(repr, EVICTABLE))}")
    return tuple(dict.fromkeys(choice("tiers", tier, EVICTABLE) for tier in value))


class _Want(NamedTuple):
    n_bytes: int
    because: str


class PressureWatch:
    """Reads memory at an interval, and has tiers evicted where too much of it is used.

    A reading at or above the high watermark wants what is used above the low
    one, and `min_evict_bytes` at least. A look evicts once: the largest want of
    all readings, since the same bytes may count for several. Thread-safe.

    Args:
        evict: `evict(n_bytes, tiers)` frees about that many bytes and returns
            how many it did. When its owner is gone it returns a negative number
            or raises ReferenceError, and the thread ends. It must not hold the
            owner alive: the watch belongs to the owner and ends with it.
        on_fault: called with a message, once a look for each source that
            failed and for an eviction that did; the owner counts.

    Raises:
        MissingPackage: the package that reads the source is not installed.
        OptionError: the source cannot be had on this machine.
    """

    def __init__(
        self,
        options: Pressure,
        evict: Callable[[int, tuple[str, ...]], int],
        on_fault: Callable[[str], None] | None = None,
    ) -> None:
        self.options = options
        self._min_evict: int = parse_bytes("min_evict_bytes", options.min_evict_bytes)
        self._sources = open_sources(options.source)
        self._evict = evict
        self._on_fault = on_fault
        self._last_faults: dict[str, str] = {}
        # Reentrant, so that a source or an eviction that looks fails visibly instead of hanging.
        self._looking = threading.RLock()
        self._lifecycle = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._stop: queue.SimpleQueue[None] = queue.SimpleQueue()

    @property
    def running(self) -> bool:
        """Whether the thread looks at memory."""
        thread = self._thread
        return thread is not None and thread.is_alive() and not self._stopping

    def start(self) -> None:
        """Start the thread, which looks an interval from now; nothing when it runs or there is nothing to read."""
        with self._lifecycle:
            if self.running or not self._sources:
                return
            # A queue and no Event: the garbage collector may run the callback
            # below in the very thread that waits, and only put() may be entered
            # there again.
            stop: queue.SimpleQueue[None] = queue.SimpleQueue()
            watch = weakref.ref(self, lambda _: stop.put(None))
            thread = threading.Thread(
                target=_run, args=(watch, stop, self.options.interval), name="erllama-cache-pressure", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:
                log.warning("no thread to watch memory with: %s", error)
                return
            self._thread, self._stop, self._stopping = thread, stop, False

    def stop(self) -> None:
        """End the thread: once this returns, it evicts nothing more. May be called again, and from a look.

        Waits for a look under way, so hold no lock that `evict` takes. After
        five seconds it logs and returns; the look will then end without evicting,
        unless it was evicting already.
        """
        with self._lifecycle:
            self._stopping = True
            self._stop.put(None)
            thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        thread.join(STOP_SECONDS)
        if thread.is_alive():
            log.warning("the memory source or an eviction has hung for %g seconds; left behind", STOP_SECONDS)

    def look(self) -> int:
        """Look once, now, in this thread; returns the bytes freed. Works without `start`, too."""
        with self._looking:
            return max(0, self._relieve(self._want()))

    def _look_unless(self, stop: queue.SimpleQueue[None]) -> bool:
        """One look of the thread's; False when it was the last."""
        # Another thread's look is as good, and may itself be waiting for this thread in stop().
        if not self._looking.acquire(blocking=False):
            return True
        try:
            want = self._want()
            return stop.empty() and self._relieve(want) >= 0
        finally:
            self._looking.release()

    def _relieve(self, want: _Want) -> int:
        """Evict; returns the bytes freed, or a negative number when the owner is gone."""
        if not want.n_bytes:
            return 0
        try:
            freed = self._evict(want.n_bytes, self.options.tiers)
            if freed < 0:
                return freed
        except ReferenceError:
            return -1
        except Exception as error:
            self._tell("eviction", f"eviction under memory pressure failed: {_named(error)}")
            return 0
        self._tell("eviction", "")
        # An empty cache has nothing to give, look after look.
        level = logging.INFO if freed else logging.DEBUG
        log.log(level, "%s: %d bytes freed of %d asked for", want.because, freed, want.n_bytes)
        return freed

    def _want(self) -> _Want:
        """What to free by what the sources say now."""
        most = _Want(0, "")
        for number, source in enumerate(self._sources):
            faults = []
            try:
                for reading in readings(source):
                    if isinstance(reading, str):
                        faults.append(reading)
                    else:
                        most = max(most, self._excess(reading))
            except Exception as error:
                faults.append(_named(error))
            self._tell(str(number), f"memory cannot be read: {'; '.join(faults)}" if faults else "")
        return most

    def _excess(self, reading: MemoryUsage) -> _Want:
        if reading.fraction < self.options.high_watermark:
            return _Want(0, "")
        above = reading.used - int(self.options.low_watermark * reading.total)
        return _Want(max(above, self._min_evict), f"{reading.name or 'memory'} is {reading.fraction:.0%} used")

    def _tell(self, origin: str, fault: str) -> None:
        """Count a fault; log it unless it is what `origin` said last. None, "", is a look that went well."""
        if fault and fault != self._last_faults.get(origin):
            log.warning("%s", fault)
        self._last_faults[origin] = fault
        if fault and self._on_fault is not None:
            self._on_fault(fault)


def _run(watch: weakref.ref[PressureWatch], stop: queue.SimpleQueue[None], interval: float) -> None:
    """The thread. It holds the watch only during a look."""
    while True:
        try:
            stop.get(timeout=interval)
        except queue.Empty:
            held = watch()
        else:
            return
        try:
            if held is None or not held._look_unless(stop):
                return
        except ReferenceError:
            return  # from `on_fault`: the owner is gone
        except Exception:
            log.exception("a look at memory failed unexpectedly")
        del held


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
