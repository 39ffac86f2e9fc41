"""`erllama doctor`: what is built, what it computes on, where prompts go; what is wrong, and how to mend it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click
import psutil

import erllama
from erllama._runtime.printing import one_line, say
from erllama.cli.cache.directories import directories_option, json_option
from erllama.cli.console import is_terminal, print_json, size, terminal
from erllama.cli.doctor import build as build_findings
from erllama.cli.doctor import directories as directory_findings
from erllama.cli.doctor.findings import Finding

_STYLES = {"ok": "green", "note": "yellow", "wrong": "bold red"}


@click.command()
@directories_option
@json_option
def doctor(directories: tuple[Path, ...], as_json: bool) -> int:
    """What is built, and what is wrong; exit status 1 where something is."""
    found = []
    for finding in _look(directories):
        found.append(finding)
        if not as_json:
            _show(finding)
    if as_json:
        print_json([asdict(finding) for finding in found])
    else:
        say(build_findings.counted(found))
    return 1 if any(finding.state == "wrong" for finding in found) else 0


def _look(directories: tuple[Path, ...]) -> Iterator[Finding]:
    yield Finding("erllama", "ok", f"{erllama.__version__}, in {Path(erllama.__file__).parent}")
    yield Finding("Python", "ok", f"{platform.python_version()}, {platform.platform()}")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    text = f"{usable} processors, {size(memory.available)} of {size(memory.total)} of memory available"
    yield Finding("machine", "ok", text)
    yield from build_findings.library()
    yield from directory_findings.directories(directories)
    yield from build_findings.packages()
    yield from build_findings.self_check()


def _show(finding: Finding) -> None:
    if is_terminal():
        terminal().print(f"{finding.state:>5}", style=_STYLES[finding.state], end="  ")
    else:
        say(f"{finding.state:>5}", end="  ")
    say(f"{one_line(finding.what)}: {one_line(finding.text)}")
    if finding.mend:
        say(f"{'':7}{'to have it' if finding.state == 'ok' else 'mend'}: {one_line(finding.mend)}")


@click.command("doctor-worker", hidden=True)
@click.argument("directory", type=click.Path(path_type=Path))
def doctor_worker(directory: Path) -> None:
    """Run by `doctor`."""
    say(json.dumps(build_findings.run_self_check(directory)))
