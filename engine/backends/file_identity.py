"""The identity of model files: what changes whenever a file's content may have changed.

The fingerprint of a model is remembered by this identity, a load compares it
before and after, and `MappedFiles` compares it again as long as the files are
mapped: a process that writes to a mapped file changes the weights of a model
that is loaded.
"""

from __future__ import annotations

import time
from pathlib import Path

from erllama.engine.backends.gguf_parts import parts
from erllama.errors import ModelLoadError

# File systems note the time of a change by the kernel's tick, which is at most 10 ms. A second change within that
# time would keep the ctime.
_TICK_NS = 20_000_000


def identity(path: Path) -> str:
    """The identity of a model's files: device, inode, size and times of each part.

    Raises:
        ModelLoadError: a part is missing.
    """
    return " ".join(file_identity(part) for part in parts(path))


def file_identity(path: Path) -> str:
    """The identity of one file, whatever its name. Waits up to 20 ms where the file was changed just now.

    Raises:
        ModelLoadError: it cannot be read.
    """
    try:
        age = time.time_ns() - path.stat().st_ctime_ns
        if 0 <= age < _TICK_NS:
            time.sleep((_TICK_NS - age) / 1e9)
        return _identity(path)
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from None


def _identity(path: Path) -> str:
    status = path.stat()
    # ctime, too: mtime can be kept through a change of content, ctime cannot.
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


class MappedFiles:
    """The mapped files of a loaded model. Safe to use from any thread.

    Args:
        path: the model's file, the first part of a split one.
        loaded: the `identity` of the files when they were fingerprinted and loaded.
    """

    def __init__(self, path: Path, loaded: str) -> None:
        self._loaded = dict(zip(parts(path), loaded.split(" "), strict=True))
        self._changed = ""

    def problem(self) -> str:
        """Return why the weights may have changed since they were loaded; empty as long as they have not.

        Takes some microseconds for each file. A file that was changed, replaced or removed stays a problem. A file
        that cannot be looked at is one until it can be.
        """
        if not self._changed:
            for part, loaded in self._loaded.items():
                try:
                    found = _identity(part)
                except FileNotFoundError:
                    found = ""
                except OSError as error:
                    return f"{part} cannot be looked at: {error}"
                if found != loaded:
                    self._changed = f"{part} was changed, replaced or removed since it was loaded"
                    break
        return self._changed
