"""The default number of threads respects the processors that this process may use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import erllama
from erllama.engine.processors import ThreadDefault, cpu_quota, default_threads


class Cgroups:
    """A tree of cgroups in files, and the membership of a process."""

    def __init__(self, root: Path) -> None:
        self.membership, self.mount = root / "cgroup", root / "mount"
        self.mount.mkdir()

    def belong(self, *lines: str) -> None:
        self.membership.write_text("".join(f"{line}\n" for line in lines))

    def v2(self, path: str, text: str) -> None:
        self._write(self.mount / path.lstrip("/") / "cpu.max", text)

    def v1(self, path: str, quota: int, period: int, controller: str = "cpu") -> None:
        place = self.mount / controller / path.lstrip("/")
        self._write(place / "cpu.cfs_quota_us", str(quota))
        self._write(place / "cpu.cfs_period_us", str(period))

    def _write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")

    @property
    def quota(self) -> float | None:
        return cpu_quota(self.membership, self.mount)


@pytest.fixture
def cgroups(tmp_path: Path) -> Cgroups:
    return Cgroups(tmp_path)


def test_the_smallest_quota_up_to_the_root_group_counts(cgroups: Cgroups) -> None:
    cgroups.belong("0::/pod/container")
    cgroups.v2("/pod/container", "max 100000")
    assert cgroups.quota is None
    cgroups.v2("/pod/container", "300000 100000")
    assert cgroups.quota == 3
    cgroups.v2("/pod", "50000 100000")
    assert cgroups.quota == 0.5
    cgroups.v2("/another", "1000 100000")
    assert cgroups.quota == 0.5


def test_cgroup_v1_quotas_count(cgroups: Cgroups) -> None:
    cgroups.belong("4:memory:/elsewhere", "1:cpu,cpuacct:/pod/container", "0::/")
    cgroups.v1("/pod/container", -1, 100_000)
    assert cgroups.quota is None
    cgroups.v1("/pod", 150_000, 100_000)
    assert cgroups.quota == 1.5


def test_controllers_mounted_together_are_found(cgroups: Cgroups) -> None:
    cgroups.belong("1:cpu,cpuacct:/")
    cgroups.v1("/", 20_000, 10_000, controller="cpu,cpuacct")
    assert cgroups.quota == 2


def test_in_a_container_the_root_of_the_mount_counts(cgroups: Cgroups) -> None:
    cgroups.belong("0::/../../host/path/of/it")
    cgroups.v2("/", "25000 100000")
    assert cgroups.quota == 0.25


@pytest.mark.parametrize("text", ["", "max", "50000", "x y", "0 100000", "50000 0", "-1 100000"])
def test_invalid_quotas_are_ignored(cgroups: Cgroups, text: str) -> None:
    cgroups.belong("0::/", "nonsense", "")
    cgroups.v2("/", text)
    assert cgroups.quota is None


def test_without_cgroups_there_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "none", tmp_path) is None


@pytest.mark.parametrize(
    ("processors", "quota", "threads"),
    [
        (2, "50000 100000", 1),
        (2, "150000 100000", 2),
        (8, "250000 100000", 3),
        (2, "900000 100000", 2),
        (4, "max 1", 4),
    ],
)
def test_the_default_threads_are_the_processors_up_to_the_quota(
    cgroups: Cgroups, monkeypatch: pytest.MonkeyPatch, processors: int, quota: str, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)), raising=False)
    cgroups.belong("0::/own")
    cgroups.v2("/own", quota)
    assert default_threads(cgroups.membership, cgroups.mount, cgroups.mount).n == threads


class Machine:
    """The kernel's description of processors, in files."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self._monkeypatch = root, monkeypatch

    def processors(self, siblings: dict[int, str], capacities: dict[int, int] | None = None) -> None:
        """Describe processors: the logical processors of the core of each one, and its capacity."""
        self._monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(siblings), raising=False)
        for n, cores in siblings.items():
            topology = self.root / f"system/cpu/cpu{n}/topology"
            topology.mkdir(parents=True)
            (topology / "thread_siblings_list").write_text(cores + "\n")
        for n, capacity in (capacities or {}).items():
            (self.root / f"system/cpu/cpu{n}/cpu_capacity").write_text(f"{capacity}\n")

    def allow(self, *processors: int) -> None:
        self._monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(processors), raising=False)

    @property
    def threads(self) -> ThreadDefault:
        return default_threads(self.root / "none", self.root, self.root)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_hyperthreads_of_a_core_count_once(machine: Machine) -> None:
    machine.processors({0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7", 4: "0,4", 5: "1,5", 6: "2,6", 7: "3,7"})
    assert machine.threads == (4, "4 cores")
    machine.allow(0, 1, 4)
    assert machine.threads == (2, "2 cores")
    machine.allow(0, 3)
    assert machine.threads == (2, "2 processors")


def test_performance_cores_of_intel_count_alone(machine: Machine) -> None:
    machine.processors({0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3", 4: "4", 5: "5", 6: "6", 7: "7"})
    (machine.root / "cpu_core").mkdir()
    (machine.root / "cpu_core/cpus").write_text("0-3\n")
    assert machine.threads == (2, "2 performance cores")
    machine.allow(4, 5, 6)
    assert machine.threads == (3, "3 processors"), "there are only slow ones"


def test_performance_cores_of_arm_count_alone(machine: Machine) -> None:
    machine.processors({n: f"{n}" for n in range(6)}, {0: 1024, 1: 1024, 2: 1024, 3: 1024, 4: 400, 5: 400})
    assert machine.threads == (4, "4 performance cores")
    machine.allow(4, 5)
    assert machine.threads == (2, "2 processors")


@pytest.mark.parametrize("text", ["", "x", "0-", "1,,2", "\0"])
def test_unreadable_topologies_count_processors(machine: Machine, text: str) -> None:
    machine.processors({0: text, 1: text})
    assert machine.threads == (2, "2 processors")


def test_a_quota_is_the_reason_if_it_is_less_than_the_cores(
    cgroups: Cgroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    cgroups.belong("0::/own")
    cgroups.v2("/own", "150000 100000")
    found = default_threads(cgroups.membership, cgroups.mount, cgroups.mount)
    assert found == (2, "CPU quota of 1.5, 4 processors")


def test_a_model_reports_its_threads(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = ThreadDefault(1, "1 processor")
    monkeypatch.setattr("erllama.engine.backends.llama.default_threads", lambda: default)
    for options, threads, reason in (
        ({}, (1, 1), "1 processor"),
        ({"n_threads": 2}, (2, 2), "n_threads=2"),
        ({"n_threads_batch": 2}, (1, 2), "1 processor"),
    ):
        with erllama.load_model(tiny_gguf, n_ctx=256, warmup=False, **options) as model:  # type: ignore[arg-type]
            assert (model.info.n_threads, model.info.n_threads_batch) == threads
            assert model.info.threads_reason == reason


@pytest.fixture
def half_a_processor() -> Iterator[Path]:
    """A real cgroup with a quota of half a processor. Skips if it cannot be created."""
    root = Path("/sys/fs/cgroup")
    version_1 = (root / "cpu").is_dir()
    group = (root / "cpu" if version_1 else root) / f"erllama-test-{os.getpid()}"
    try:
        group.mkdir()
        try:
            if version_1:
                (group / "cpu.cfs_period_us").write_text("100000")
                (group / "cpu.cfs_quota_us").write_text("50000")
            else:
                (group / "cpu.max").write_text("50000 100000")
        except OSError:
            group.rmdir()
            raise
    except OSError as error:
        pytest.skip(f"no cgroup can be made: {error}")
    yield group
    group.rmdir()


def test_a_process_under_a_real_quota_uses_one_thread(half_a_processor: Path) -> None:
    code = (
        "import os, sys; open(sys.argv[1] + '/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "from erllama.engine.processors import cpu_quota, default_threads\n"
        "print(cpu_quota(), default_threads().n)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, str(half_a_processor)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if "Permission" in finished.stderr or "Device or resource busy" in finished.stderr:
        pytest.skip("this machine does not allow cgroups")
    assert finished.stdout == "0.5 1\n", finished.stderr
