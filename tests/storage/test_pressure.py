"""Memory pressure: tiers are evicted down to the low watermark, and the watch survives any source."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erllama.cache.pressure.memory import MemoryUsage, Source, cgroup_memory
from erllama.cache.pressure.pressure import Pressure, PressureWatch
from erllama.errors import MissingPackage, OptionError

PATIENCE = 60.0  # seconds until a wait for another thread counts as failed; no wait takes that long
SOON = 0.001
TIERS = ("ram", "ram_file")


class Machine:
    """Memory of which a cache holds a part. Provides both the source and the eviction."""

    def __init__(self, used: int, total: int, cached: int | None = None) -> None:
        self.used, self.total = used, total
        self.cached = used if cached is None else cached
        self.asked: list[int] = []
        self.tiers: list[tuple[str, ...]] = []
        self.faults: list[str] = []

    def read(self) -> MemoryUsage:
        return MemoryUsage(self.used, self.total, "machine")

    def evict(self, n_bytes: int, tiers: tuple[str, ...]) -> int:
        self.asked.append(n_bytes)
        self.tiers.append(tiers)
        freed = min(n_bytes, self.cached)
        self.cached -= freed
        self.used -= freed
        return freed

    def watch(self, source: Source | str | None = None, **options: object) -> PressureWatch:
        pressure = Pressure.of({"source": source or self.read, "interval": SOON, "min_evict_bytes": 0} | options)
        assert pressure is not None
        return PressureWatch(pressure, self.evict, self.faults.append)


# --- how much is evicted, and when ------------------------------------------

fractions = st.floats(0, 1, exclude_min=True)
sizes = st.integers(1, 2**50)


@given(sizes, st.integers(0, 2**50), fractions, fractions)
def test_a_check_evicts_down_to_the_low_watermark_and_not_below(
    total: int, used: int, one: float, other: float
) -> None:
    low, high = sorted((one, other))
    machine = Machine(used, total)
    freed = machine.watch(low_watermark=low, high_watermark=high).check()
    if used / total < high:
        assert machine.asked == []
        assert freed == 0
    else:
        assert machine.used <= low * total
        assert machine.used >= min(used, int(low * total))  # and not below it
        assert freed == used - machine.used


@given(sizes, st.integers(0, 2**50), st.integers(0, 2**50), st.integers(0, 2**50))
def test_a_check_asks_once_for_at_least_the_minimum(total: int, used: int, cached: int, minimum: int) -> None:
    machine = Machine(used, total, cached)
    freed = machine.watch(min_evict_bytes=minimum).check()
    assert len(machine.asked) <= 1
    assert all(asked >= minimum for asked in machine.asked)
    assert freed == used - machine.used


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 100)), max_size=5))
def test_the_largest_need_of_several_readings_is_evicted(pairs: list[tuple[int, int]]) -> None:
    machine = Machine(0, 1, cached=10**6)
    machine.watch(lambda: [MemoryUsage(*pair) for pair in pairs], high_watermark=0.5, low_watermark=0.25).check()
    wants = [used - int(total * 0.25) for used, total in pairs if used >= total * 0.5]
    assert machine.asked == ([max(wants)] if any(wants) else [])


def test_the_configured_tiers_are_evicted() -> None:
    machine = Machine(90, 100)
    machine.watch().check()
    machine.used = 90
    machine.watch(tiers=["ram"]).check()
    assert machine.tiers == [TIERS, ("ram",)]


def test_pressure_begins_at_the_high_watermark() -> None:
    below, at = Machine(74, 100), Machine(75, 100)
    assert below.watch(high_watermark=0.75, low_watermark=0.5).check() == 0
    assert at.watch(high_watermark=0.75, low_watermark=0.5).check() == 25


def test_the_same_eviction_is_not_requested_twice() -> None:
    machine = Machine(90, 100)
    watch = machine.watch()
    assert watch.check() == 15
    assert watch.check() == 0
    assert machine.asked == [15]


def test_eviction_is_retried_while_memory_is_short() -> None:
    machine = Machine(90, 100, cached=0)
    watch = machine.watch()
    assert [watch.check(), watch.check()] == [0, 0]
    assert machine.asked == [15, 15]
    assert machine.faults == []


def test_freed_bytes_and_the_reason_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "erllama.cache"):
        Machine(90, 100).watch().check()
    assert caplog.messages == ["machine is 90% used: 15 bytes freed of 15 asked for"]


# --- options ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "sistem"}, "did you mean 'system'"),
        ({"source": 3}, "it takes 'noop', 'system', 'nvidia'"),
        ({"interval": 0}, "interval=0.0; it must be above 0"),
        ({"interval": "5"}, "interval must be a number"),
        ({"interval": float("inf")}, "interval must be finite"),
        ({"interval": 1e300}, "it must be at most"),
        ({"high_watermark": 85}, "it must be at most 1"),
        ({"high_watermark": float("nan")}, "finite"),
        ({"low_watermark": 0}, "above 0"),
        ({"low_watermark": True}, "must be a number"),
        ({"low_watermark": 0.9}, "low_watermark=0.9 is above high_watermark=0.85"),
        ({"min_evict_bytes": "many"}, "min_evict_bytes='many'"),
        ({"min_evict_bytes": -1}, "negative"),
        ({"tiers": "ram"}, "pass a tuple"),
        ({"tiers": ()}, "pass a tuple"),
        ({"tiers": ("ram", "ramfile")}, "did you mean 'ram_file'"),
        ({"tiers": (1,)}, "tiers=1"),
        ({"hi_watermark": 0.9}, "no option 'hi_watermark'; did you mean 'high_watermark'"),
        ({3: 4}, "no option '3'"),
    ],
)
def test_wrong_options_are_refused_with_a_remedy(options: dict[object, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Pressure.of(options)


@pytest.mark.parametrize("value", ["sistem", 0, 1, 0.85, ["system"], b"system"])
def test_values_that_are_not_pressure_options_are_refused(value: object) -> None:
    with pytest.raises(OptionError, match="pressure="):
        Pressure.of(value)


def test_options_are_accepted_in_several_forms() -> None:
    def source() -> MemoryUsage:
        return MemoryUsage(0, 1)

    given = Pressure(interval=1)
    assert Pressure.of(None) is None
    assert Pressure.of(False) is None
    assert Pressure.of(True) == Pressure.of({}) == Pressure.of("system") == Pressure()
    assert Pressure.of(given) is given
    assert Pressure.of({"interval": 1}) == given
    assert Pressure.of(source) == Pressure.of({"source": source}) == Pressure(source=source)


def test_options_are_normalized() -> None:
    pressure = Pressure(min_evict_bytes="1MiB", tiers=["disk", "ram", "disk"], interval=2)  # type: ignore[arg-type]
    assert pressure.min_evict_bytes == 2**20
    assert pressure.tiers == ("disk", "ram")
    assert pressure == Pressure(min_evict_bytes=2**20, tiers=("disk", "ram"), interval=2.0)
    assert len({pressure, pressure}) == 1


# --- sources that fail ------------------------------------------------------


def raising() -> MemoryUsage:
    raise OSError("no meter")


def halfway() -> Iterator[MemoryUsage]:
    yield MemoryUsage(90, 100)
    raise OSError("no meter")


NONSENSE: list[object] = [
    MemoryUsage(-1, 100),
    MemoryUsage(100, 0),
    MemoryUsage(100, -100),
    MemoryUsage(float("nan"), 100),  # type: ignore[arg-type]
    MemoryUsage(90, float("inf")),  # type: ignore[arg-type]
    MemoryUsage("90", "100"),  # type: ignore[arg-type]
    MemoryUsage(None, None),  # type: ignore[arg-type]
    MemoryUsage(True, True),
    MemoryUsage(10**400, 100),
    (90, 100),
    None,
    3,
    [None],
    "full",
    {"used": 90},
]


@pytest.mark.parametrize("nonsense", NONSENSE, ids=repr)
def test_invalid_readings_are_faults_and_evict_nothing(nonsense: object) -> None:
    machine = Machine(90, 100)
    assert machine.watch(lambda: nonsense).check() == 0  # type: ignore[arg-type,return-value]
    assert machine.asked == []
    assert len(machine.faults) == 1


def test_a_raising_source_is_a_fault_and_is_read_again() -> None:
    machine = Machine(90, 100)
    failing = [True]
    watch = machine.watch(lambda: raising() if failing else machine.read())
    assert watch.check() == 0
    assert machine.faults == ["memory cannot be read: OSError: no meter"]
    failing.clear()
    assert watch.check() == 15


@pytest.mark.parametrize("source", [halfway, lambda: [MemoryUsage(-1, 1), MemoryUsage(90, 100)]])
def test_valid_readings_count_beside_invalid_ones(source: Source) -> None:
    machine = Machine(90, 100)
    assert machine.watch(source).check() == 15
    assert len(machine.faults) == 1


def test_every_fault_is_counted_and_a_repeated_one_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(0, 100)
    errors = iter(["a", "a", "b", "b", "", "b"])

    def read() -> MemoryUsage:
        if error := next(errors):
            raise OSError(error)
        return machine.read()

    watch = machine.watch(read)
    for _ in range(6):
        watch.check()
    assert len(machine.faults) == 5
    assert [message[-1] for message in caplog.messages] == ["a", "b", "b"]


@pytest.mark.parametrize("answer", [ValueError("broken"), None])
def test_a_failing_eviction_is_a_fault(answer: Exception | None) -> None:
    faults: list[str] = []

    def evict(n_bytes: int, tiers: tuple[str, ...]) -> int:
        if answer:
            raise answer
        return answer  # type: ignore[return-value]

    watch = PressureWatch(Pressure(source=Machine(90, 100).read), evict, faults.append)
    assert watch.check() == 0
    assert len(faults) == 1
    assert "eviction" in faults[0]


# --- the thread -------------------------------------------------------------


def pressure_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "erllama-cache-pressure"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    for thread in pressure_threads():
        thread.join(PATIENCE)
    assert pressure_threads() == []


class Turnstile:
    """A source that signals each call and waits until it is released."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()

    def __call__(self) -> MemoryUsage:
        self.entered.set()
        assert self.open.wait(PATIENCE)
        return MemoryUsage(90, 100)


def test_the_thread_evicts_again_and_again() -> None:
    rounds, done = iter(range(3)), threading.Event()

    def evict(n_bytes: int, tiers: tuple[str, ...]) -> int:
        if next(rounds, None) is None:
            done.set()
        return n_bytes

    watch = PressureWatch(Pressure(source=lambda: MemoryUsage(90, 100), interval=SOON), evict)
    watch.start()
    assert watch.running
    assert done.wait(PATIENCE)
    watch.stop()
    assert not watch.running


def test_the_thread_survives_faults_of_source_and_owner() -> None:
    machine, fine = Machine(90, 100), threading.Event()
    errors = iter([OSError("x"), ValueError("y")])

    def read() -> MemoryUsage:
        if error := next(errors, None):
            raise error
        fine.set()
        return MemoryUsage(0, 1)

    def count(fault: str) -> None:
        raise RuntimeError("cannot count")

    watch = PressureWatch(Pressure(source=read, interval=SOON), machine.evict, count)
    watch.start()
    assert fine.wait(PATIENCE)
    watch.stop()


def test_the_noop_source_starts_no_thread() -> None:
    watch = Machine(90, 100).watch("noop")
    watch.start()
    assert not watch.running
    assert pressure_threads() == []
    assert watch.check() == 0
    watch.stop()


def test_start_and_stop_can_be_repeated_in_any_order() -> None:
    machine = Machine(0, 100, cached=90)
    watch = machine.watch(interval=3600)
    watch.stop()
    watch.start()
    watch.start()
    assert len(pressure_threads()) == 1
    watch.stop()
    watch.stop()
    assert pressure_threads() == []
    watch.start()
    assert watch.running
    watch.stop()
    machine.used = 90
    assert watch.check() == 15


def test_stop_waits_for_a_check_in_progress_which_then_evicts_nothing() -> None:
    turnstile, machine = Turnstile(), Machine(90, 100)
    watch = machine.watch(turnstile)
    watch.start()
    assert turnstile.entered.wait(PATIENCE)
    stoppers = [threading.Thread(target=watch.stop) for _ in range(2)]
    for stopper in stoppers:
        stopper.start()
    while watch.running:
        pass
    turnstile.open.set()
    for stopper in stoppers:
        stopper.join(PATIENCE)
    assert pressure_threads() == []
    assert machine.asked == []


def test_a_hanging_source_does_not_block_stop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("erllama.cache.pressure.pressure.STOP_SECONDS", SOON)
    turnstile, machine = Turnstile(), Machine(90, 100)
    watch = machine.watch(turnstile)
    watch.start()
    assert turnstile.entered.wait(PATIENCE)
    watch.stop()
    assert "did not return" in caplog.text
    turnstile.open.set()
    for thread in pressure_threads():
        thread.join(PATIENCE)
    assert machine.asked == []


@pytest.mark.parametrize("place", ["source", "evict"])
def test_a_check_may_stop_the_watch(place: str) -> None:
    stopped = threading.Event()

    def stop(at: str) -> None:
        if at == place:
            watch.stop()
            stopped.set()

    def read() -> MemoryUsage:
        stop("source")
        return MemoryUsage(90, 100)

    def evict(n_bytes: int, tiers: tuple[str, ...]) -> int:
        stop("evict")
        return n_bytes

    watch = PressureWatch(Pressure(source=read, interval=SOON), evict)
    watch.start()
    assert stopped.wait(PATIENCE)
    for thread in pressure_threads():
        thread.join(PATIENCE)
    assert pressure_threads() == []


def test_a_check_in_another_thread_may_stop_the_watch(caplog: pytest.LogCaptureFixture) -> None:
    def evict(n_bytes: int, tiers: tuple[str, ...]) -> int:
        watch.start()
        watch.stop()
        return n_bytes

    watch = PressureWatch(Pressure(source=lambda: MemoryUsage(10**9, 10**9), interval=SOON), evict)
    assert watch.check() == 250_000_000
    assert not watch.running
    assert caplog.messages == []


def test_checks_in_two_threads_do_not_evict_twice() -> None:
    machine = Machine(90, 100)
    watch = machine.watch()
    checkers = [threading.Thread(target=watch.check) for _ in range(4)]
    for checker in checkers:
        checker.start()
    for checker in checkers:
        checker.join(PATIENCE)
    assert machine.asked == [15]


def test_a_thread_that_cannot_start_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    watch = Machine(90, 100).watch()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        watch.start()
    assert not watch.running
    assert "can't start new thread" in caplog.text
    assert watch.check() == 15
    watch.stop()


class Owner:
    """Owns a watch as a cache does. The watch references it weakly."""

    def __init__(self, source: Source, gone: Callable[[], int], **options: float) -> None:
        me = weakref.ref(self)

        def evict(n_bytes: int, tiers: tuple[str, ...]) -> int:
            return gone() if me() is None else n_bytes

        self.watch = PressureWatch(Pressure(source=source, **options), evict)  # type: ignore[arg-type]
        self.watch.start()


def unreachable() -> int:
    raise AssertionError("evicted for an owner that is gone")


def test_the_thread_ends_with_its_owner_without_pressure() -> None:
    owner = Owner(lambda: MemoryUsage(0, 1), unreachable, interval=3600)
    (thread,) = pressure_threads()
    known = weakref.ref(owner)
    del owner
    assert known() is None
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_the_thread_ends_with_an_owner_in_a_cycle() -> None:
    owner = Owner(lambda: MemoryUsage(0, 1), unreachable, interval=3600)
    (thread,) = pressure_threads()
    owner.itself = owner  # type: ignore[attr-defined]
    del owner
    gc.collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def vanished() -> int:
    raise ReferenceError("the cache is gone")


@pytest.mark.parametrize("gone", [vanished, lambda: -1])
def test_the_thread_ends_when_eviction_reports_that_the_owner_is_gone(
    gone: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    owner = Owner(lambda: MemoryUsage(90, 100), gone, interval=SOON)
    watch = owner.watch
    (thread,) = pressure_threads()
    del owner
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert watch.check() == 0
    assert caplog.messages == []


# --- the machine and its cgroups --------------------------------------------

MEBIBYTE = 2**20


class Cgroups:
    """A fake /proc/self/cgroup and /sys/fs/cgroup."""

    def __init__(self, path: Path) -> None:
        self.membership, self.mount = path / "membership", path / "mount"
        self.mount.mkdir()

    def join(self, *lines: str) -> None:
        self.membership.write_text("".join(f"{line}\n" for line in lines))

    def v2(self, path: str, limit: object, usage: object, stat: str = "anon 5\ninactive_file 0\n") -> None:
        self._write(self.mount / path, {"memory.max": limit, "memory.current": usage, "memory.stat": stat})

    def v1(self, path: str, limit: object, usage: object, stat: str = "inactive_file 7\n") -> None:
        files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": usage, "memory.stat": stat}
        self._write(self.mount / "memory" / path, files)

    @staticmethod
    def _write(folder: Path, files: dict[str, object]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(f"{content}\n")

    def read(self) -> list[tuple[int, int]]:
        return [(reading.used, reading.total) for reading in cgroup_memory(self.membership, self.mount)]


@pytest.fixture
def cgroups(tmp_path: Path) -> Cgroups:
    return Cgroups(tmp_path)


def test_cgroup_v2_limits_of_all_ancestors_count(cgroups: Cgroups) -> None:
    cgroups.join("0::/work.slice/job.service/worker")
    cgroups.v2("work.slice/job.service/worker", "max", 10)
    cgroups.v2("work.slice/job.service", 100, 90)
    cgroups.v2("work.slice", 1000, 200)
    cgroups.v2("", 5000, 4000)
    cgroups.v2("other.slice", 10, 10)
    assert cgroups.read() == [(90, 100), (200, 1000), (4000, 5000)]
    names = [reading.name for reading in cgroup_memory(cgroups.membership, cgroups.mount)]
    assert names == ["cgroup /work.slice/job.service", "cgroup /work.slice", "cgroup /"]


def test_reclaimable_page_cache_does_not_count_as_used(cgroups: Cgroups) -> None:
    cgroups.join("0::/a")
    cgroups.v2("a", 100, 90, "anon 1\nactive_file 20\ninactive_file 30\nworkingset_refault_file 9\n")
    cgroups.v2("", 100, 20, "inactive_file 30\n")
    assert cgroups.read() == [(60, 100), (0, 100)]


def test_cgroup_v1_limits_count_and_huge_numbers_mean_no_limit(cgroups: Cgroups) -> None:
    cgroups.join("5:cpu,cpuacct:/a/b", "4:hugetlb,memory:/a/b", "1:name=systemd:/x", "0::/")
    cgroups.v1("a/b", 9223372036854771712, 10)
    cgroups.v1("a", 100, 90, "inactive_file 1\ntotal_inactive_file 30\n")
    assert cgroups.read() == [(60, 100)]


@pytest.mark.parametrize("path", ["/docker/0123", "/../other", "/.."])
def test_a_cgroup_path_outside_the_mount_means_its_root(cgroups: Cgroups, path: str) -> None:
    cgroups.join(f"4:memory:{path}", f"0::{path}")
    cgroups.v1("", 100, 90)
    cgroups.v1("docker", 10, 10)
    cgroups.v2("", 200, 20)
    cgroups.v2("../other", 10, 10)
    assert cgroups.read() == [(90, 100), (20, 200)]


@pytest.mark.parametrize("lines", [[], [""], ["nonsense"], ["0::"], ["::::"], ["0::/gone"], ["4:memory:/gone"]])
def test_without_limits_there_are_no_readings(cgroups: Cgroups, lines: list[str]) -> None:
    cgroups.join(*lines)
    assert cgroups.read() == []


@pytest.mark.parametrize(("limit", "usage"), [("max", 5), (0, 5), ("", 5), ("-1", 5), (100, ""), (100, "many")])
def test_unreadable_cgroup_levels_are_skipped(cgroups: Cgroups, limit: object, usage: object) -> None:
    cgroups.join("0::/a")
    cgroups.v2("a", limit, usage)
    cgroups.v2("", 100, 50, "no such line\ninactive_file x\n")
    assert cgroups.read() == [(50, 100)]


def test_without_cgroups_there_are_no_readings(tmp_path: Path) -> None:
    assert cgroup_memory(tmp_path / "none", tmp_path / "none") == []


@pytest.fixture
def fake_psutil(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    memory = SimpleNamespace(total=1000 * MEBIBYTE, available=900 * MEBIBYTE, used=10 * MEBIBYTE)
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(virtual_memory=lambda: memory))
    return memory


def test_the_system_source_reads_available_memory(
    fake_psutil: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("erllama.cache.pressure.memory.cgroup_memory", list)
    machine = Machine(0, 1, cached=10**12)
    watch = machine.watch("system")
    assert watch.check() == 0
    fake_psutil.available = 100 * MEBIBYTE
    assert watch.check() == 150 * MEBIBYTE


def test_the_system_source_reads_cgroup_limits(
    fake_psutil: SimpleNamespace, cgroups: Cgroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "erllama.cache.pressure.memory.cgroup_memory", lambda: cgroup_memory(cgroups.membership, cgroups.mount)
    )
    cgroups.join("0::/job")
    cgroups.v2("job", 100 * MEBIBYTE, 95 * MEBIBYTE)
    machine = Machine(0, 1, cached=10**12)
    assert machine.watch("system").check() == 20 * MEBIBYTE


def test_the_system_source_works_on_this_machine() -> None:
    pytest.importorskip("psutil")
    machine = Machine(0, 1)
    machine.watch("system", high_watermark=1).check()
    assert machine.faults == []


def test_the_system_source_without_psutil_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(MissingPackage, match="pip install psutil"):
        Machine(0, 1).watch("system")


# --- GPUs -------------------------------------------------------------------


class FakeNvml:
    """The used part of pynvml, for GPUs given as [used, total]; None is a lost GPU."""

    class NVMLError(Exception):
        pass

    def __init__(self, *gpus: list[int] | None, driver: bool = True) -> None:
        self.gpus, self.driver, self.inits = list(gpus), driver, 0

    def nvmlInit(self) -> None:
        self.inits += 1
        if not self.driver:
            raise self.NVMLError("NVML Shared Library Not Found")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> list[int]:
        gpu = self.gpus[index]
        if gpu is None:
            raise self.NVMLError("GPU is lost")
        return gpu

    def nvmlDeviceGetName(self, handle: list[int]) -> str:
        return "Fake"

    def nvmlDeviceGetMemoryInfo(self, handle: list[int]) -> SimpleNamespace:
        used, total = handle
        return SimpleNamespace(total=total, free=total - used, used=used - 1)


def gpu_watch(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None, machine: Machine) -> PressureWatch:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return machine.watch("nvidia")


def test_each_gpu_counts_separately(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    machine, nvml = Machine(0, 1, cached=10**6), FakeNvml([0, 1000], [90, 100])
    watch = gpu_watch(monkeypatch, nvml, machine)
    with caplog.at_level(logging.INFO, "erllama.cache"):
        assert watch.check() == 15
    assert "GPU 1 Fake is 90% used" in caplog.text
    nvml.gpus = [[900, 1000], [90, 100]]
    assert watch.check() == 150
    nvml.gpus = [[840, 1000], [84, 100]]
    assert watch.check() == 0
    assert nvml.inits == 1


def test_a_lost_gpu_is_a_fault_and_the_others_count(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(0, 1, cached=10**6)
    assert gpu_watch(monkeypatch, FakeNvml(None, [90, 100]), machine).check() == 15
    assert machine.faults == ["memory cannot be read: NVMLError: GPU is lost"]


def test_a_missing_nvidia_package_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match=r"needs nvidia-ml-py: pip install 'erllama\[nvidia\]'") as caught:
        gpu_watch(monkeypatch, None, Machine(0, 1))
    assert isinstance(caught.value, MissingPackage)
    assert caught.value.name == "pynvml"


@pytest.mark.parametrize(
    ("nvml", "message"),
    [
        (FakeNvml(driver=False), "no NVIDIA driver .NVML Shared Library Not Found.; .*source='system'"),
        (FakeNvml(), "finds no GPU; use source='system'"),
    ],
)
def test_unreadable_gpus_raise_an_error_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml, message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        gpu_watch(monkeypatch, nvml, Machine(0, 1))
