"""Evicts blocks when memory runs short: the options, and the thread that checks memory.

`Pressure` holds the options. `PressureWatch` reads memory at an interval and asks its owner to evict. It owns one
daemon thread, which ends when the watch is stopped or its owner is deleted, and keeps neither of them alive. A
source that fails is reported, and the watch continues; requests are not affected. `Cache` creates the watch and
evicts.
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

# A driver or a user's source may hang. close() must not hang with it, so it abandons the thread, which ends
# when it wakes and finds that it was stopped.
STOP_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Pressure:
    """Options of memory pressure: what memory to watch, and when and what to evict.

    Attributes:
        source: "system", "nvidia", "noop" (no watch), or a callable that returns one `MemoryUsage` or several.
            The thread of the watch calls it. It must not block.
        interval: seconds between checks, above 0.
        high_watermark: used fraction of memory at which eviction starts.
        low_watermark: used fraction that eviction aims for; 0 < low_watermark <= high_watermark <= 1.
        min_evict_bytes: minimum bytes to evict at once, a number or a text such as "64MiB".
        tiers: tiers to evict from, in this order. The default excludes the disk, which holds no memory and has its
            own quota.

    Raises:
        OptionError: an option is of the wrong type or out of range.
    """

    source: str | Source = "system"
    interval: float = 5.0
    high_watermark: float = 0.85
    low_watermark: float = 0.75
    # Without a minimum, equal watermarks would evict a few bytes at every check.
    min_evict_bytes: int | str = "64MiB"
    tiers: tuple[str, ...] = ("ram", "ram_file")

    def __post_init__(self) -> None:
        if not callable(self.source):
            choice("source", self.source, SOURCES)
        for name, maximum in (("interval", threading.TIMEOUT_MAX), ("high_watermark", 1), ("low_watermark", 1)):
            number = real(name, getattr(self, name), maximum=maximum)
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
        """Return the options that `value` stands for; None for None or False.

        Args:
            value: True for the defaults, a `Pressure`, a mapping of its options, or a source.

        Raises:
            OptionError: `value` is of another type, or an option is unknown or invalid.
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
        raise OptionError(f"tiers={value!r}; pass a tuple of {', '.join(map(repr, EVICTABLE))}")
    return tuple(dict.fromkeys(choice("tiers", tier, EVICTABLE) for tier in value))


class _Excess(NamedTuple):
    n_bytes: int
    reason: str


class PressureWatch:
    """Checks memory at an interval, and has tiers evicted when too much of it is used.

    For a reading at or above the high watermark, the excess is the use above the low watermark, and at least
    `min_evict_bytes`. A check evicts once, the largest excess of all readings, because the same bytes may count in
    several readings. Thread-safe.

    Args:
        evict: `evict(n_bytes, tiers)` frees about that many bytes and returns how many it freed. When its owner was
            deleted, it returns a negative number or raises ReferenceError, and the thread ends. It must not keep
            the owner alive: the watch belongs to the owner and ends with it.
        on_fault: called with a message, once per check for each source that failed and for a failed eviction.

    Raises:
        MissingPackage: the package that reads the source is not installed.
        OptionError: the source is not available on this machine.
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
        # Reentrant, so that a source or an eviction that calls check() fails visibly instead of hanging.
        self._checking = threading.RLock()
        self._lifecycle = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._stop: queue.SimpleQueue[None] = queue.SimpleQueue()

    @property
    def running(self) -> bool:
        """Whether the thread is running."""
        thread = self._thread
        return thread is not None and thread.is_alive() and not self._stopping

    def start(self) -> None:
        """Start the thread, unless it runs or there is no source. Its first check is an interval from now."""
        with self._lifecycle:
            if self.running or not self._sources:
                return
            # A queue and not an Event: the garbage collector may run the callback below in the thread that waits,
            # and only put() may be called there again.
            stop: queue.SimpleQueue[None] = queue.SimpleQueue()
            watch = weakref.ref(self, lambda _: stop.put(None))
            thread = threading.Thread(
                target=_run, args=(watch, stop, self.options.interval), name="erllama-cache-pressure", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:
                log.warning("memory is not watched: no thread could be started: %s", error)
                return
            self._thread, self._stop, self._stopping = thread, stop, False

    def stop(self) -> None:
        """Stop the thread. It evicts no more after this returns. May be called again, and during a check.

        Waits for a check in progress, so the caller must not hold a lock that `evict` takes. After five seconds,
        logs a warning and returns. The check then ends without evicting, unless it was evicting already.
        """
        with self._lifecycle:
            self._stopping = True
            self._stop.put(None)
            thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        thread.join(STOP_SECONDS)
        if thread.is_alive():
            log.warning(
                "the memory source or an eviction did not return within %g seconds; not waiting", STOP_SECONDS
            )

    def check(self) -> int:
        """Check once, now, in this thread, and return the bytes freed. Does not require `start`."""
        with self._checking:
            return max(0, self._evict_excess(self._largest_excess()))

    def _check_unless_stopped(self, stop: queue.SimpleQueue[None]) -> bool:
        """Check once in the watch's thread; return False if the thread must end."""
        # A check by another thread is as good, and that thread may be waiting for this one in stop().
        if not self._checking.acquire(blocking=False):
            return True
        try:
            excess = self._largest_excess()
            return stop.empty() and self._evict_excess(excess) >= 0
        finally:
            self._checking.release()

    def _evict_excess(self, excess: _Excess) -> int:
        """Evict, and return the bytes freed, or a negative number if the owner was deleted."""
        if not excess.n_bytes:
            return 0
        try:
            freed = self._evict(excess.n_bytes, self.options.tiers)
            if freed < 0:
                return freed
        except ReferenceError:
            return -1
        except Exception as error:
            self._report("eviction", f"eviction under memory pressure failed: {_describe(error)}")
            return 0
        self._report("eviction", "")
        # Not at INFO: an empty cache would log at every check.
        level = logging.INFO if freed else logging.DEBUG
        log.log(level, "%s: %d bytes freed of %d asked for", excess.reason, freed, excess.n_bytes)
        return freed

    def _largest_excess(self) -> _Excess:
        """Read all sources, and return the largest excess."""
        largest = _Excess(0, "")
        for number, source in enumerate(self._sources):
            faults = []
            try:
                for reading in readings(source):
                    if isinstance(reading, str):
                        faults.append(reading)
                    else:
                        largest = max(largest, self._excess_of(reading))
            except Exception as error:
                faults.append(_describe(error))
            self._report(str(number), f"memory cannot be read: {'; '.join(faults)}" if faults else "")
        return largest

    def _excess_of(self, reading: MemoryUsage) -> _Excess:
        if reading.fraction < self.options.high_watermark:
            return _Excess(0, "")
        above = reading.used - int(self.options.low_watermark * reading.total)
        return _Excess(max(above, self._min_evict), f"{reading.name or 'memory'} is {reading.fraction:.0%} used")

    def _report(self, origin: str, fault: str) -> None:
        """Count and log a fault of `origin`. Do not log the same fault twice in a row. "" means success."""
        if fault and fault != self._last_faults.get(origin):
            log.warning("%s", fault)
        self._last_faults[origin] = fault
        if fault and self._on_fault is not None:
            self._on_fault(fault)


def _run(watch: weakref.ref[PressureWatch], stop: queue.SimpleQueue[None], interval: float) -> None:
    """Run the thread. It refers to the watch only during a check."""
    while True:
        try:
            stop.get(timeout=interval)
        except queue.Empty:
            alive = watch()
        else:
            return
        try:
            if alive is None or not alive._check_unless_stopped(stop):
                return
        except ReferenceError:
            return  # from `on_fault`: the owner was deleted
        except Exception:
            log.exception("a check of memory failed unexpectedly")
        del alive


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
