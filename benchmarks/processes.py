"""Measurements in a separate process, which loads the model and ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measure import Setup

ROOT = Path(__file__).resolve().parent.parent


def measure_in_process(module: str, setup: Setup, *arguments: object) -> Any:  # noqa: ANN401 - any JSON value
    """Run the measurement that a module of this directory passes to `answer`; return its result, read from JSON.

    The process gets a setup without peers.

    Args:
        arguments: further arguments of the measurement.
    """
    nowhere = dict.fromkeys(("peers", "llama_cpp_python", "vocabulary"))
    plain = {**asdict(setup), "model": str(setup.model.resolve()), **nowhere}
    command = [sys.executable, "-m", f"benchmarks.{module}", json.dumps([plain, *arguments])]
    finished = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT)
    return json.loads(finished.stdout)


def answer(measure: Callable[..., object]) -> None:
    """Run a measurement in the process, with the arguments on its command line, and print the result."""
    options, *arguments = json.loads(sys.argv[1])
    print(json.dumps(measure(Setup(**{**options, "model": Path(options["model"])}), *arguments)))
