"""The tools for contributors: the set-up, the fast tests, the hooks of git, and commit subjects."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable] if name.endswith(".py") else []
    command += [str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_extra_lists_its_requirements_and_those_of_nested_extras() -> None:
    metrics, dev = (script("extra_requirements.py", extra).stdout.splitlines() for extra in ("metrics", "dev"))
    assert metrics == ["prometheus-client>=0.20"]
    assert set(metrics) < set(dev)
    assert {"pytest", "mypy", "gguf", "mkdocs-material"} <= {re.split(r"[\[<>=]", line)[0] for line in dev}
    assert not [line for line in dev if line.startswith("erllama")]
    assert len(dev) == len(set(dev))


def test_an_unknown_extra_is_an_error_that_lists_the_extras() -> None:
    finished = script("extra_requirements.py", "develop")
    assert finished.returncode == 1
    assert "no extra 'develop'; choose one of clients, dev, docs, " in finished.stderr


@pytest.mark.parametrize(("length", "status"), [(1, 0), (72, 0), (73, 1)])
def test_a_commit_subject_has_at_most_72_characters(tmp_path: Path, length: int, status: int) -> None:
    message = tmp_path / "message"
    message.write_text("s" * length + "\n\n" + "b" * 100 + "\n")
    assert script("check_commit_subject.sh", message).returncode == status


def test_the_fast_tests_exist() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (listed,) = re.findall(r"^FAST_TESTS := \$\(addprefix tests/,(.*)\)$", makefile, re.MULTILINE)
    names = listed.split()
    assert len(names) == len(set(names)) > 10
    assert [name for name in names if not (ROOT / "tests" / name).is_file()] == []


def test_hooks_run_installed_tools_only() -> None:
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r"^ *(?:- )?repo: (.*)$", config, re.MULTILINE)) == {"local"}
    assert set(re.findall(r"^ *language: (.*)$", config, re.MULTILINE)) == {"system"}
    for entry in re.findall(r"^ *entry: (\S+)", config, re.MULTILINE):
        assert entry == ".venv/bin/ruff" or (ROOT / entry).is_file(), entry
