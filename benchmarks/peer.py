"""Compiles and runs the programs in this directory that time libllama."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

from benchmarks.measure import AbsentError, PeerError

HERE = Path(__file__).resolve().parent


def run_program(command: list[str], place: Path) -> str:
    """Run a command in `place` and return its output.

    Raises:
        PeerError: the command failed.
    """
    finished = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise PeerError(f"{shlex.join(command)} failed:\n{finished.stderr[-3000:]}")
    return finished.stdout


def compile_program(name: str, place: Path, backend: str) -> None:
    """Compile a program of this directory into `place`, with the libllama of this backend.

    Raises:
        AbsentError: libllama or the compiler is missing.
    """
    script = [str(HERE.parent / "scripts" / "build_llama.sh"), "--backend", backend]
    built = subprocess.run(script, stdout=subprocess.PIPE, text=True, check=False)
    if built.returncode:
        raise AbsentError("libllama's samplers: scripts/build_llama.sh failed and printed the reason")
    prefix = Path(built.stdout.splitlines()[-1])
    (library,) = (prefix / "lib").glob("libllama.*")
    # fmt: off
    command = [
        "c++", "-std=c++17", "-O2", "-I", str(prefix / "include"), str(HERE / f"{name}.cpp"), str(library),
        f"-Wl,-rpath,{prefix / 'lib'}", "-o", str(place / name),
    ]
    # fmt: on
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise AbsentError(
            f"libllama's samplers: `{shlex.join(command)}` failed; check that c++ is installed"
        ) from error
