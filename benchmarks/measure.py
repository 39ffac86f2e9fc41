"""Results of benchmarks: figures, ratios of two things measured in turn, and series for plots."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class Target:
    """A target of a ratio.

    Attributes:
        sense: whether the ratio must be at least or at most `bound`.
    """

    sense: Literal[">=", "<="]
    bound: float

    def met(self, ratio: float) -> bool:
        return ratio >= self.bound if self.sense == ">=" else ratio <= self.bound

    def __str__(self) -> str:
        return f"{self.sense} {self.bound:g}"


class AbsentError(Exception):
    """A scenario cannot be measured: a peer is missing, or the model is too small. The message says what to do."""


class PeerError(Exception):
    """A peer failed during its measurement. The message has its command, or what it answered."""


class Runs(list[float]):
    """The values of one side, run by run.

    Attributes:
        failure: why a peer has fewer values than this library; empty if it did not fail.
    """

    def __init__(self, values: Iterable[float] = (), failure: str = "") -> None:
        super().__init__(values)
        self.failure = failure


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the table: this library against a peer, run by run.

    A peer that failed has a row, too: with the failure, and without a ratio.

    Attributes:
        scenario: the name of the scenario, such as "streams-8".
        what: a description, such as "8 streams, decode, all together".
        peer: the other side, such as "llama-server -np 8".
        unit: of both sides, such as "tokens/s".
        ours: the values of this library, one per run.
        theirs: the values of the peer. The n-th values of both sides were measured one after the other.
        target: target of the ratio ours / theirs; None for no target.
        commands: the commands of both sides, this library's first.
        notes: facts that a reader needs to trust the figure, such as the number of computed tokens.
    """

    scenario: str
    what: str
    peer: str
    unit: str
    ours: Sequence[float]
    theirs: Sequence[float]
    target: Target | None = None
    commands: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def failure(self) -> str:
        """Why the peer has no values; empty if it has."""
        return self.theirs.failure if isinstance(self.theirs, Runs) else ""

    @property
    def ratios(self) -> list[float]:
        """The ratio of each run; empty if the peer failed."""
        return [] if self.failure else [a / b for a, b in zip(self.ours, self.theirs, strict=True)]

    @property
    def ratio(self) -> float | None:
        """The median of the ratios of the runs; None if the peer failed."""
        return None if self.failure else statistics.median(self.ratios)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without a target, or if the peer failed."""
        ratio = self.ratio
        return None if self.target is None or ratio is None else self.target.met(ratio)


@dataclass(frozen=True, slots=True)
class Line:
    """A named series of points (x, y), ordered by x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot.

    Attributes:
        name: file name without extension.
        title, x, y: title, and labels of the axes with units.
        lines: at least one.
        log_x, log_y: whether an axis is logarithmic. Its values are then positive.
    """

    name: str
    title: str
    x: str
    y: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False


@dataclass(slots=True)
class Findings:
    """The results of scenarios.

    Attributes:
        absent: missing peers, and how to install them.
        measured: the day, as YYYY-MM-DD in UTC; empty for results of several scenarios.
    """

    figures: list[Figure] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    measured: str = ""

    def add(self, other: Findings) -> None:
        self.figures += other.figures
        self.plots += other.plots
        self.absent += [each for each in other.absent if each not in self.absent]


@dataclass(frozen=True, slots=True)
class Setup:
    """The settings of all scenarios.

    Attributes:
        model: the GGUF file to measure.
        title: the name of the model in reports.
        real: whether the model is trained. Its prompts are then text.
        threads: threads of both sides.
        runs: number of pairs of runs.
        quick: run only to check that a scenario works; its figures are meaningless.
        backend: backend of libllama, such as "cpu" or "cuda".
        peers: the directory that `scripts/build_llama.sh --peers` printed; None to run the script.
        llama_cpp_python: the Python of an environment with llama-cpp-python; None to skip it.
        vocabulary: a GGUF file with a large vocabulary, for grammars; None to skip it.
    """

    model: Path
    threads: int
    runs: int
    quick: bool = False
    backend: str = "cpu"
    peers: Path | None = None
    llama_cpp_python: Path | None = None
    vocabulary: Path | None = None
    title: str = ""
    real: bool = False

    @property
    def gpu_layers(self) -> int:
        """The number of layers on a GPU, for both sides: all or none."""
        return 0 if self.backend == "cpu" else 999

    def of(self, full: int, quick: int) -> int:
        """Return the full size, or the small one for a quick run."""
        return quick if self.quick else full


def n_cores() -> int:
    """Return the number of cores that this process may use, if the system reports it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_turn(first: Callable[[], float], second: Callable[[], float], runs: int) -> tuple[Runs, Runs]:
    """Return the values of this library and of its peer, run by run. The order changes with each run.

    A peer that fails is not measured again; its `Runs` has the failure.
    """
    ours, theirs = Runs(), Runs()
    for run in range(runs):
        order = [(ours, first), (theirs, second)]
        for values, measure in order if run % 2 else order[::-1]:
            if values is ours:
                ours.append(measure())
            elif not theirs.failure:
                try:
                    theirs.append(measure())
                except PeerError as error:
                    theirs.failure = str(error) or "failed"
    return ours, theirs


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the median and the range as text; "-" without values."""
    if not values:
        return "-"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
