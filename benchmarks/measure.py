"""Results of benchmarks: figures, ratios of two things measured in turn, and series for plots."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the table: this library against a peer, run by run.

    Attributes:
        scenario: the name of the scenario, such as "streams-8".
        what: a description, such as "8 streams, decode, all together".
        peer: the other side, such as "llama-server -np 8".
        unit: of both sides, such as "tokens/s".
        ours, theirs: one value per run. The n-th values of both were measured one after the other.
        target: target of the ratio ours / theirs; None for no target.
        commands: the commands of both sides, ours first.
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
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours, self.theirs, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of the ratios of the runs."""
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without a target."""
        return None if self.target is None else self.target.met(self.ratio)


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
    """

    figures: list[Figure] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        self.figures += other.figures
        self.plots += other.plots
        self.absent += [each for each in other.absent if each not in self.absent]


@dataclass(frozen=True, slots=True)
class Setup:
    """The settings of all scenarios.

    Attributes:
        model: the GGUF file to measure.
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


def in_turn(first: Callable[[], float], second: Callable[[], float], runs: int) -> tuple[list[float], list[float]]:
    """Return the values of both sides, run by run. The order changes with each run."""
    ours: list[float] = []
    theirs: list[float] = []
    for run in range(runs):
        order = [(ours, first), (theirs, second)]
        for values, measure in order if run % 2 else order[::-1]:
            values.append(measure())
    return ours, theirs


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the median and the range as text."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
