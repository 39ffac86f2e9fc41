"""Files in the current directory, such as those beside a downloaded model, are not run by the command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.subprocesses import must_run, run_python

# Runs the parent as the installed command does, without the current directory on the path.
ERLLAMA = [sys.executable, "-P", "-m", "erllama"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, tiny_gguf: Path) -> Path:
    """A directory with a module of every name that `demo`, `doctor` and their children import."""
    work = tmp_path_factory.mktemp("work")
    code = """
        import sys
        from erllama.__main__ import main
        import erllama.cli.bench, erllama.cli.chat.command, erllama.cli.demo, erllama.cli.doctor.command
        import rich.progress, rich.table

        main(["doctor-worker", sys.argv[1]])
        main(["demo-worker", "cold", sys.argv[2], sys.argv[1] + "/demo", "64", "1"])
        print("names", *{name.partition(".")[0] for name in sys.modules} - set(sys.builtin_module_names))
        """
    names = must_run(code, work, tiny_gguf).splitlines()[-1].split()[1:]
    assert {"erllama", "numpy", "json", "click", "sqlite_utils", "llguidance"} <= set(names)
    directory = tmp_path_factory.mktemp("download")
    for name in {*names, "sitecustomize", "usercustomize", "hostile_plugin"}:
        (directory / f"{name}.py").write_text(f"open({str(directory / 'ran')!r}, 'a').write('{name} ')\n")
    # Found by libraries that search the path for plugins.
    plugin = directory / "hostile-1.0.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: hostile\nVersion: 1.0\n")
    (plugin / "entry_points.txt").write_text("[sqlite_utils]\nhostile = hostile_plugin\n")
    return directory


def erllama_in(directory: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ERLLAMA, *map(str, arguments)],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize("command", ["doctor", "demo"])
def test_child_processes_run_no_file_of_the_current_directory(
    hostile: Path, tmp_path: Path, tiny_gguf: Path, command: str
) -> None:
    model = ["--model", tiny_gguf, "--tokens", 64, "--max-tokens", 1] if command == "demo" else []
    finished = erllama_in(hostile, command, *model, ERLLAMA_CACHE_DIR=str(tmp_path / "kv"))
    ran = hostile / "ran"
    assert not ran.exists(), ran.read_text()
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_the_test_directory_affects_a_child_without_isolation(hostile: Path) -> None:
    run_python("import runpy; runpy.run_module('erllama', run_name='__main__')", cwd=hostile)
    assert (hostile / "ran").read_text()
    (hostile / "ran").unlink()


@pytest.mark.parametrize(("flags", "kept"), [((), True), (("-E",), False)])
def test_a_child_keeps_pythonpath_if_the_parent_uses_it(tmp_path: Path, flags: tuple[str, ...], kept: bool) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'doctor-worker' in sys.orig_argv:\n"
        f"    open({str(tmp_path / 'argv')!r}, 'w').write(' '.join(sys.orig_argv))\n"
    )
    finished = subprocess.run(
        [sys.executable, *flags, "-P", "-m", "erllama", "doctor"],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "ERLLAMA_CACHE_DIR": str(tmp_path / "kv")},
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert (tmp_path / "argv").exists() == kept
