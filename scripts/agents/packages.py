"""Installs the agents into the user's cache directory: the versions and digests of `package-lock.json`.

The scripts of the packages are not run.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import platformdirs

_HERE = Path(__file__).parent
_FILES = ("package.json", "package-lock.json")


def cache_directory() -> Path:
    """Return the directory of everything that the agents need or write. Codex refuses one below /tmp."""
    directory = Path(platformdirs.user_cache_dir("erllama")) / "agents"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def install_agents() -> Path:
    """Return the folder of the installed packages, and install them first if they are missing: 600 MB.

    Exits with a message if this machine cannot run them.
    """
    lock = (_HERE / "package-lock.json").read_bytes()
    folder = cache_directory() / f"packages-{hashlib.sha256(lock).hexdigest()[:12]}"
    if folder.exists():
        return folder
    if sys.platform != "linux" or platform.machine() != "x86_64":
        sys.exit("the agents' programs are pinned for Linux on x86-64 only; run this there")
    npm = shutil.which("npm")
    if npm is None:
        sys.exit("npm is missing; install Node.js 20 or newer")
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name in _FILES:
        shutil.copy(_HERE / name, part)
    print(f"installing the agents in {folder}", file=sys.stderr)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    subprocess.run(command, cwd=part, check=True, stdout=sys.stderr)
    os.replace(part, folder)
    return folder


def pinned_version(package: str) -> str:
    """Return the version of a package of `package.json`."""
    version: str = json.loads((_HERE / "package.json").read_text())["dependencies"][package]
    return version
