"""Measurements that are made in a process of their own, which loads the model anew and ends."""

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


def measured_apart(module: str, setup: Setup, *given: object) -> Any:  # noqa: ANN401 - whatever JSON holds
    """What the measurement that a module of this directory hands to `answer` returns, as JSON gives it back.

    The process is told nothing of peers.

    Args:
        given: what the measurement takes beside the setup.
    """
    nowhere = dict.fromkeys(("peers", "llama_cpp_python", "vocabulary"))
    plain = {**asdict(setup), "model": str(setup.model.resolve()), **nowhere}
    command = [sys.executable, "-m", f"benchmarks.{module}", json.dumps([plain, *given])]
    finished = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT)
    return json.loads(finished.stdout)


def answer(measure: Callable[..., object]) -> None:
    """The end of the process: measure what its argument asks for."""
    options, *given = json.loads(sys.argv[1])
    print(json.dumps(measure(Setup(**{**options, "model": Path(options["model"])}), *given)))
