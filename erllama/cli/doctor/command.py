"""`erllama doctor`: checks the build, the devices and the cache directories, and suggests fixes."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click
import psutil

import erllama
from erllama._runtime.printing import echo, one_line
from erllama.cache.sizes import format_size
from erllama.cli.cache.directories import directories_option, json_option
from erllama.cli.console import format_count, is_terminal, print_json, rich_console
from erllama.cli.doctor import build
from erllama.cli.doctor.directories import check_directories
from erllama.cli.doctor.findings import Finding
from erllama.engine.processors import allowed_processors, default_threads

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}
_STATE_WIDTH = 7


@click.command()
@directories_option
@json_option
def doctor(directories: tuple[Path, ...], as_json: bool) -> int:
    """Check the installation and the cache directories. Exit status 1 if there is an error."""
    findings = []
    for finding in _checks(directories):
        findings.append(finding)
        if not as_json:
            _print_finding(finding)
    n_errors = sum(finding.state == "error" for finding in findings)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        echo(format_count(n_errors, "error") if n_errors else "no errors")
    return 1 if n_errors else 0


def _checks(directories: tuple[Path, ...]) -> Iterator[Finding]:
    yield Finding("erllama", "ok", f"{erllama.__version__}, in {Path(erllama.__file__).parent}")
    yield Finding("Python", "ok", f"{platform.python_version()}, {platform.platform()}")
    memory = psutil.virtual_memory()
    processors = format_count(len(allowed_processors()), "processor")
    threads = default_threads()
    text = (
        f"{processors}, {format_size(memory.available)} of {format_size(memory.total)} of memory available, "
        f"{format_count(threads.n, 'thread')} per model ({threads.reason})"
    )
    yield Finding("machine", "ok", text)
    yield from build.check_library()
    yield from check_directories(directories)
    yield from build.check_packages()
    yield from build.self_check()


def _print_finding(finding: Finding) -> None:
    state = f"{finding.state:<{_STATE_WIDTH}}"
    if is_terminal():
        rich_console().print(state, style=_STYLES[finding.state], end="  ")
    else:
        echo(state, end="  ")
    echo(f"{one_line(finding.name)}: {one_line(finding.text)}")
    if finding.fix:
        label = "to install" if finding.state == "ok" else "fix"
        echo(f"{'':{_STATE_WIDTH + 2}}{label}: {one_line(finding.fix)}")


@click.command("doctor-worker", hidden=True)
@click.argument("directory", type=click.Path(path_type=Path))
def doctor_worker(directory: Path) -> None:
    """Run the self-check of `doctor`, which starts this command."""
    echo(json.dumps(build.run_self_check(directory)))
