"""Every command of the pages runs as written and prints what the page shows.

A block of `console` has commands after `$ ` and what they print; they are run, in one empty directory for each
page. A block of `sh` has commands alone. Those that would take minutes, build, or run this very suite are asked
what they would do.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from erllama.models.names import has_model
from support.doc_pages import NAMES, blocks, prose
from support.paths import ROOT

BIN = Path(sys.executable).parent
# Variables of the make and the pytest that run this test.
_NOT_PASSED_ON = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTEST_ADDOPTS")
PATH = f"{BIN}{os.pathsep}{os.environ['PATH']}"
# Files of the checkout that a reader's commands see, unchanged.
BESIDE = ("examples", "benchmarks", "scripts", "tests", "docs", "pyproject.toml")

# Pages whose commands are compared by other tests, with models made for them.
ELSEWHERE = {"docs/cli.md": "tests/docs/test_cli_docs.py"}


# The model of the pages' first minute. Its commands run where it is on this machine; no test downloads it.
DOWNLOADED = "smollm2"


class Command(NamedTuple):
    """A command of a page, and the output that the page shows, or None."""

    line: int
    text: str
    printed: str | None


def page_commands(page: str) -> list[Command]:
    found = []
    for block in blocks(page, "console"):
        parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
        assert not parts[0], f"{page}, line {block.line}: a block of console begins with a command"
        for part in parts[1:]:
            text, _, printed = part.partition("\n")
            found.append(Command(block.line, text, printed))
    for block in blocks(page, "sh"):
        found += [Command(block.line, text, None) for text in block.text.splitlines() if text.strip()]
    return found


def stable_output(text: str) -> str:
    """Return the parts that page and run must share: no times, no values that depend on them, no replies."""
    text = text.replace(str(Path.home()), "~")
    # The reply of a model from elsewhere, before the line of its statistics, differs between processors.
    text = re.sub(r"\A.*^\d+ tokens, (.*?)(?:, length)?$", r"…\n# tokens, \1", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\d+(?:\.\d+)?(?= ?(?:ms|s|tok/s|MiB|times)\b)", "#", text)
    text = re.sub(
        r" \(\d:\d\d:\d\d\)$", "", text, flags=re.MULTILINE
    )  # pytest adds this to durations over a minute
    text = re.sub(r"(?<=partial hit from live, )\d+ of \d+", "# of #", text)  # the same number of characters
    text = re.sub(r"(?:^    .+\n)+", "    …\n", text, flags=re.MULTILINE)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def run(text: str, cwd: Path) -> str:
    # As in a separate shell: a `make` that runs the suite sets variables for its children.
    around = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
    if cwd != ROOT:
        around |= {
            "ERLLAMA_CACHE_DIR": str(cwd / "prompts-of-the-command"),
            "LLM_USER_PATH": str(cwd / "llm-files"),
        }
        around["PIP_NO_INDEX"] = "1"  # `erllama pull` finds its model on this machine, or fails
    finished = subprocess.run(
        ["bash", "-c", text],
        cwd=cwd,
        env={**around, "PATH": PATH, "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    assert finished.returncode == 0, f"{text}\n{finished.stdout}"
    return finished.stdout


def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))


@cache
def check_exists(text: str) -> None:
    """Check that a command which is not run here exists."""
    words = [word for word in shlex.split(text, comments=True) if "=" not in word.split("/")[0] or "'" in word]
    match words:
        case ["make", *what]:
            assert set(what) <= targets(), text
            run(f"make --dry-run {' '.join(what)}", ROOT)
        case ["pip", "install", what]:
            extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
            given = re.fullmatch(r"(?:\.|erllama)(?:\[(\w+)\])?", what)
            assert given, text
            assert given[1] is None or given[1] in extras, text
        case [".", ".venv/bin/activate"]:
            pass  # this process runs in such an environment
        case ["python" | ".venv/bin/python", "-m", "pytest", *what]:
            assert all((ROOT / path).exists() for path in what), text
        case ["python", example] if example.endswith(".py"):
            assert example == "examples/NAME.py" or (ROOT / example).exists(), text
        case ["erllama", command, *_]:
            run(f"erllama {command} --help", ROOT)
        case ["python", "-c", code]:
            compile(code, text, "exec")
        case ["python" | ".venv/bin/python", "-P", "-m", module, *_]:
            run(f"python -P -m {module} --help", ROOT)
        case ["python" | ".venv/bin/python", "-m", module, *_]:
            run(f"python -m {module} --help", ROOT)
        case ["erllama", *what]:
            names = itertools.takewhile(re.compile("[a-z-]+").fullmatch, what)
            run(f"erllama {' '.join(names)} --help", ROOT)
        case _:
            pytest.fail(f"no test covers {text!r}: show its output in a console block, or add a check here")


def test_pages_listed_as_compared_elsewhere_are() -> None:
    for page, test in ELSEWHERE.items():
        assert page not in NAMES or page.removeprefix("docs/") in (ROOT / test).read_text()


@pytest.mark.parametrize("page", [name for name in NAMES if blocks(name, "console") and name not in ELSEWHERE])
def test_pages_show_the_real_output_of_their_commands(page: str, tmp_path: Path) -> None:
    for name in BESIDE:
        (tmp_path / name).symlink_to(ROOT / name)
    for block in blocks(page, "python"):
        saved = re.match(r"# ([\w.]+)\n", block.text)
        if saved:
            (tmp_path / saved[1]).write_text(block.text)
    n_left_out = 0
    for command in page_commands(page):
        if command.printed is None:
            continue
        if DOWNLOADED in command.text.lower() and not has_model(DOWNLOADED):
            n_left_out += 1
            continue
        at_root = command.text.startswith("make ")
        if (
            at_root
            and subprocess.run(["make", "-q", "setup"], cwd=ROOT, capture_output=True, check=False).returncode
        ):
            pytest.skip("`make setup` has work to do, which a test does not start")
        printed = run(command.text, ROOT if at_root else tmp_path)
        assert stable_output(printed) == stable_output(command.printed), (
            f"{page}, line {command.line}: {command.text}"
        )
    if n_left_out:
        pytest.skip(
            f"{n_left_out} commands need {DOWNLOADED}, which `make real-models` downloads; the others passed"
        )


@pytest.mark.parametrize("page", [name for name in NAMES if blocks(name, "sh")])
def test_commands_that_are_not_run_exist(page: str) -> None:
    for command in page_commands(page):
        if command.printed is None:
            check_exists(command.text)


@pytest.mark.parametrize("page", NAMES)
def test_commands_within_sentences_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for span in re.findall(r"`([^`\n]+)`", prose(page)):
        words = span.split()
        if words[0] in ("make", "pip", "python", ".venv/bin/python") and len(words) > 1:
            check_exists(re.sub(r"(BENCH|BACKEND|RPC|N)=(\"[^\"]*\"?|\S*)", "", span))
        elif words[0].startswith("scripts/"):
            assert (ROOT / words[0]).exists(), span
    assert not re.search(r"^```\n(?:\$ |make |pip |python )", text, re.MULTILINE), (
        "a block with a command needs a language"
    )


def test_a_command_with_different_output_is_found(tmp_path: Path) -> None:
    assert stable_output("token 1.5 ms, 3 times\n    a\n    b\nc") == stable_output(
        "token 900.25 ms, 7.1 times\n    d\nc"
    )
    assert stable_output("    a\nb\n") != stable_output("    a\nc\n")
    assert stable_output("cold: 0 of 5") != stable_output("cold: 1 of 5")
    with pytest.raises(AssertionError, match="no-such"):
        run("no-such-command", tmp_path)
