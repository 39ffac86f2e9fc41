"""Child processes that run Python code."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path


def run_python(
    code: str,
    *arguments: object,
    timeout: float = 120,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter, away from the checkout, so that it imports the installed package."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd or "/",
        env={**os.environ, **(environment or {})},
        check=False,
    )


def must_run(code: str, *arguments: object, timeout: float = 120) -> str:
    finished = run_python(code, *arguments, timeout=timeout)
    assert finished.returncode == 0, f"exit {finished.returncode}\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout
