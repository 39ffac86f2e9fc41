"""The processes of models that this process has started."""

from __future__ import annotations

from contextlib import suppress

import psutil


def model_processes() -> list[psutil.Process]:
    """Return the processes that run models."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if "erllama._process.child" in " ".join(child.cmdline()):
                found.append(child)
    return found
