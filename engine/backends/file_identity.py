"""The identity of model files, which changes whenever a file's content may have changed.

Fingerprints of models are stored under this identity, and a load compares it before and after. `MappedFiles`
compares it while files are mapped, because a process that writes to a mapped file changes the weights of a loaded
model.
"""

from __future__ import annotations

import time
from pathlib import Path

from erllama.engine.backends.gguf_parts import parts
from erllama.errors import ModelLoadError

# File systems record the time of a change with the resolution of the kernel's tick, at most 10 ms. A second change
# within a tick would leave the ctime unchanged.
_TICK_NS = 20_000_000


def identity(path: Path) -> str:
    """Return the identity of a model's files: device, inode, size and times of each part.

    Raises:
        ModelLoadError: a part is missing.
    """
    return " ".join(file_identity(part) for part in parts(path))


def file_identity(path: Path) -> str:
    """Return the identity of one file, independent of its name. Waits up to 20 ms if the file has just changed.

    Raises:
        ModelLoadError: the file cannot be read.
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
    # With ctime, because a program can restore the mtime after a change, but not the ctime.
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


class MappedFiles:
    """The mapped files of a loaded model. Thread-safe.

    Args:
        path: the model's file, or the first part of a split model.
        loaded: the `identity` of the files at the time of the fingerprint and the load.
    """

    def __init__(self, path: Path, loaded: str) -> None:
        self._loaded = dict(zip(parts(path), loaded.split(" "), strict=True))
        self._changed = ""

    def problem(self) -> str:
        """Return the reason why the weights may have changed since the load; empty if they have not.

        Takes some microseconds per file. A changed, replaced or removed file stays a problem. A file that cannot be
        examined is a problem until it can be.
        """
        if not self._changed:
            for part, loaded in self._loaded.items():
                try:
                    found = _identity(part)
                except FileNotFoundError:
                    found = ""
                except OSError as error:
                    return f"{part} cannot be examined: {error}"
                if found != loaded:
                    self._changed = f"{part} was changed, replaced or removed since it was loaded"
                    break
        return self._changed
