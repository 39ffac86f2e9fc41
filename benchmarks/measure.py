"""What a benchmark finds: figures, each a ratio of two things measured in turn, and series to draw."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class Target:
    """What a ratio must reach.

    Attributes:
        sense: whether it must be at least, or at most, `bound`.
    """

    sense: Literal[">=", "<="]
    bound: float

    def met(self, ratio: float) -> bool:
        return ratio >= self.bound if self.sense == ">=" else ratio <= self.bound

    def __str__(self) -> str:
        return f"{self.sense} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table: ours against a peer, run by run.

    Attributes:
        scenario: the name it is asked for by, as "streams-8".
        what: for people, as "8 streams, decode, all together".
        peer: whom it is compared with, as "llama-server -np 8".
        unit: of both sides, as "tokens/s".
        ours, theirs: one value for each run; the n-th of both were measured one after the other.
        target: of the ratio ours / theirs; None where none is set.
        commands: what was run, ours first.
        notes: facts that the reader needs to trust it, as how many tokens were computed.
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
        """The median of the runs' ratios."""
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool | None:
        """Whether the target is; None where none is set."""
        return None if self.target is None else self.target.met(self.ratio)


@dataclass(frozen=True, slots=True)
class Line:
    """A named row of points (x, y), in the order of x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Plot:
    """Something to draw.

    Attributes:
        name: of the file, without its ending.
        title, x, y: what is shown, and along the axes, with units.
        lines: at least one.
        log_x, log_y: whether an axis is logarithmic; its values are all positive then.
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
    """What scenarios give back.

    Attributes:
        absent: peers that are not there, and what would bring them.
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
    """What all scenarios are told.

    Attributes:
        model: the GGUF that the engine is measured with.
        threads: of both sides.
        runs: how many pairs of runs.
        quick: as little as shows that a scenario works; its figures mean nothing.
        backend: of libllama, as "cpu" or "cuda".
        peers: the directory that `scripts/build_llama.sh --peers` printed; None to run that.
        llama_cpp_python: the Python of an environment that has llama-cpp-python; None for none.
        vocabulary: a GGUF with a large vocabulary, for grammars; None for none.
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
        """Layers on a GPU, for both sides: all that there are, or none."""
        return 0 if self.backend == "cpu" else 999

    def of(self, full: int, quick: int) -> int:
        """A size, as long as it is not only tried."""
        return quick if self.quick else full


def n_cores() -> int:
    """Cores that this process may use, as far as the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_turn(first: Callable[[], float], second: Callable[[], float], runs: int) -> tuple[list[float], list[float]]:
    """What both give, run by run, who goes first changing each time."""
    ours: list[float] = []
    theirs: list[float] = []
    for run in range(runs):
        order = [(ours, first), (theirs, second)]
        for values, measure in order if run % 2 else order[::-1]:
            values.append(measure())
    return ours, theirs


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, and from where to where."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
