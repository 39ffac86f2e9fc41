"""Runs llama-cpp-python's tests of its high-level interface against `erllama.llama_cpp`.

    python -m scripts.llama_cpp_python_tests [PYTEST ARGUMENT ...]

Downloads the source distribution from the package index first, and unpacks its tests and a vocabulary of
llama.cpp into build/llama-cpp-python. Needs the real models (`make real-models`). Exits with pytest's status: a
test that fails, or one that passes against expectation, is an error.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "llama-cpp-python"
VERSION = "0.3.36"
_NAME = f"llama_cpp_python-{VERSION}"
_UNPACKED = (f"{_NAME}/tests/", f"{_NAME}/vendor/llama.cpp/models/ggml-vocab-llama-spm.gguf")


def unpack_tests() -> Path:
    """Return the unpacked source distribution with its tests, downloaded if it does not exist."""
    folder = FOLDER / _NAME
    archive = FOLDER / f"{_NAME}.tar.gz"
    if not archive.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps"]
        command = [*pip, "--no-binary", "llama-cpp-python", "--dest", str(FOLDER), f"llama-cpp-python=={VERSION}"]
        subprocess.run(command, check=True)
    if not folder.exists():
        with tarfile.open(archive) as tar:
            members = [member for member in tar if member.name.startswith(_UNPACKED)]
            tar.extractall(FOLDER, members, filter="data")
    return folder


def main() -> int:
    """Run the tests and return pytest's exit status."""
    folder = unpack_tests()
    environment = {
        **os.environ,
        "ERLLAMA_LLAMA_CPP_PYTHON_TESTS": str(FOLDER),
        "ERLLAMA_CACHE_DIR": str(FOLDER / "cache"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "scripts.llama_cpp_python_tests.plugin",
        "-p",
        "no:cacheprovider",
    ]
    command = [*pytest, "-c", os.devnull, "--rootdir", str(folder), "-rxX", "tests", *sys.argv[1:]]
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
