"""The time of a process that imports erllama, or prints the version or the help of the command."""

from __future__ import annotations

import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from benchmarks.measure import Figure, Findings, Setup, Target

# Seconds that a user does not notice, of whole processes, including the start of the interpreter.
IMPORT_SECONDS, COMMAND_SECONDS = 0.25, 0.15
STARTS = 10


def startup(setup: Setup) -> Findings:
    """Compare the times of whole processes with their limits."""
    shown = {
        "import erllama": (("-c", "import erllama"), IMPORT_SECONDS),
        "erllama --version": (("-P", "-m", "erllama", "--version"), COMMAND_SECONDS),
        "erllama --help": (("-P", "-m", "erllama", "--help"), COMMAND_SECONDS),
    }
    n_starts = setup.of(STARTS, 1)
    found = Findings()
    bare = [_seconds(("-c", "pass"), n_starts) for _ in range(setup.runs)]
    for what, (arguments, allowed) in shown.items():
        ours = [_seconds(arguments, n_starts) for _ in range(setup.runs)]
        found.figures.append(
            Figure(
                "startup",
                f"{what}, in a separate process",
                f"{allowed * 1e3:.0f} ms",
                "ms",
                [value * 1e3 for value in ours],
                [allowed * 1e3] * setup.runs,
                Target("<=", 1.0),
                (shlex.join(("python", *arguments)),),
                (
                    f"each value is the median of {n_starts} starts, from beginning to end of the process",
                    f"Python alone takes {statistics.median(bare) * 1e3:.0f} ms",
                ),
            )
        )
    return found


def _seconds(arguments: Sequence[str], n: int) -> float:
    """Return the seconds of a Python process: the median of `n`, after one that fills the page cache."""
    taken = []
    for _ in range(n + 1):
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


SCENARIOS: dict[str, Callable[[Setup], Findings]] = {"startup": startup}
