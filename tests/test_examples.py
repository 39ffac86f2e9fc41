"""Every example runs, from another directory, against what is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
WITHOUT_LIBLLAMA = "import sys; sys.modules['erllama.llama_ffi'] = None; import runpy; runpy.run_path(sys.argv[1])"


def run(*arguments: object, cwd: Path) -> str:
    finished = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env={**os.environ, "PYTHONWARNINGS": "error"},
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "inspect_cache.py",
        "memory_pressure.py",
        "numpy_backend.py",
        "smoke_test.py",
        "test_my_cache.py",
    }


def test_the_smoke_test_needs_no_model(tmp_path: Path) -> None:
    said = run("-c", WITHOUT_LIBLLAMA, EXAMPLES / "smoke_test.py", cwd=tmp_path)
    assert "3 tokens from disk: b'hi'" in said
    assert "saves_cold: 1\nmisses: 1\nhits_exact: 1\n" in said


def test_the_tests_of_a_cache_need_no_model(tmp_path: Path) -> None:
    said = run(
        "-m", "pytest", "-c", os.devnull, "-p", "no:cacheprovider", EXAMPLES / "test_my_cache.py", cwd=tmp_path
    )
    assert "2 passed" in said


def test_a_backend_of_ones_own_gives_libllamas_reply(tmp_path: Path) -> None:
    said = run(EXAMPLES / "numpy_backend.py", cwd=tmp_path)
    assert "numpy, exact hit:" in said
    assert "the same reply" in said


@pytest.mark.parametrize("name", ["inspect_cache.py", "memory_pressure.py"])
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    said = run(EXAMPLES / name, cwd=tmp_path)
    if name == "inspect_cache.py":
        assert "hits_longest_prefix: 1" in said
        assert "all is well" in said
