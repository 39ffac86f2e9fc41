"""Command lines of the child processes that erllama starts.

A child runs with the parent's interpreter and without the current directory on the module search path: that
directory may contain a downloaded model together with Python files, which must not run. `erllama demo`, `erllama
doctor` and models in processes of their own use this module.
"""

from __future__ import annotations

import sys


def erllama_command(*arguments: str) -> list[str]:
    """Return the command line that runs `erllama` in a child process."""
    return python_command("erllama", *arguments)


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command line that runs a module in a child process.

    `-P` keeps the current directory off `sys.path`, which `-m` would put first. `PYTHONPATH`, editable
    installs and the virtual environment stay in effect, unless the parent runs without them.
    """
    flags = ["-P"]
    if sys.flags.ignore_environment:
        flags.append("-E")
    if sys.flags.no_user_site:
        flags.append("-s")
    return [sys.executable, *flags, "-m", module, *arguments]
