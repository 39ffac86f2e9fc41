"""Builds the cffi binding with the libllama of scripts/build_llama.sh.

pyproject.toml has everything static. This script finds or builds libllama, compiles
the binding with its headers, and copies its libraries beside the binding.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY_PATTERNS = ("*.so.*", "*.so", "*.dylib")


def libllama_prefix() -> Path:
    """Return the directory of a built libllama: $ERLLAMA_LLAMA_PREFIX, or the output of the script."""
    prefix = os.environ.get("ERLLAMA_LLAMA_PREFIX")
    if prefix:
        return Path(prefix)
    command = [str(ROOT / "scripts" / "build_llama.sh"), "--backend", os.environ.get("ERLLAMA_BACKEND", "auto")]
    if os.environ.get("ERLLAMA_PORTABLE") == "1":
        command.append("--portable")
    if os.environ.get("ERLLAMA_RPC") == "1":
        command.append("--rpc")
    # The interpreter outside any virtual environment: the one of an isolated build has no pip.
    environment = {
        **os.environ,
        "PYTHON": os.environ.get("PYTHON", getattr(sys, "_base_executable", sys.executable)),
    }
    finished = subprocess.run(command, check=False, env=environment, stdout=subprocess.PIPE, text=True)
    if finished.returncode != 0:
        raise SystemExit("erllama: libllama was not built; scripts/build_llama.sh printed the reason above")
    return Path(finished.stdout.strip().splitlines()[-1])


def libraries(directory: Path) -> list[Path]:
    return sorted({path for pattern in LIBRARY_PATTERNS for path in directory.glob(pattern)})


class BuildBinding(build_ext):
    def build_extension(self, ext: Extension) -> None:
        prefix = libllama_prefix()
        mac = sys.platform == "darwin"
        ext.include_dirs += [str(prefix / "include"), str(ROOT / "llama_ffi")]
        # Link by path: the directory has only the names that the loader looks up, without lib*.so links.
        ext.extra_objects += [
            str(p) for p in libraries(prefix / "lib") if p.name.startswith(("libllama", "libggml"))
        ]
        ext.extra_link_args += ["-Wl,-rpath,@loader_path" if mac else "-Wl,-rpath,$ORIGIN"]
        super().build_extension(ext)
        beside = Path(self.get_ext_fullpath(ext.name)).parent
        destinations = {beside}
        if self.inplace or getattr(self, "editable_mode", False):
            destinations = {ROOT / "llama_ffi"}
        for destination in destinations:
            destination.mkdir(parents=True, exist_ok=True)
            for old in libraries(destination):
                if old.name.startswith(("libllama", "libggml", "libgomp")):
                    old.unlink()
            for library in libraries(prefix / "lib"):
                shutil.copy2(library, destination / library.name)
            (destination / "rpc-server").unlink(missing_ok=True)
            for extra in ("build.json", "LICENSE.llama.cpp", "lib/rpc-server"):
                if (prefix / extra).exists():
                    shutil.copy2(prefix / extra, destination / Path(extra).name)


# The directory of each top-level package in the repository.
PACKAGE_DIRS = {"erllama": "erllama", **{f"erllama.{name}": name for name in ("cache", "engine", "llama_ffi")}}


def packages() -> list[str]:
    """Return all packages: those of `PACKAGE_DIRS`, and their subpackages."""
    return [
        name for top, place in PACKAGE_DIRS.items() for name in (top, *(f"{top}.{p}" for p in find_packages(place)))
    ]


setup(
    packages=packages(),
    package_dir=PACKAGE_DIRS,
    cffi_modules=["llama_ffi/build.py:ffibuilder"],
    cmdclass={"build_ext": BuildBinding},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
