"""Files that the command writes: readable by their owner only, and complete or absent.

`/save` and `cache export` write through `new_file`. The history of `chat` is in
a directory that `private_directory` creates. All of these files contain prompts.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from erllama.cache.tiers.directory import make_private


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a new file that only its owner can read; rename it to `path` when the `with` ends without an error.

    Replaces a file or a link at `path`: the mode of the old file is not kept, and the target of the link is not
    changed.

    Raises:
        OSError: the file cannot be written, or `path` is a directory, a device or a pipe.
    """
    with _errors_name(path):
        with suppress(FileNotFoundError):
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
                raise OSError(errno.EINVAL, "not a regular file; pass the name of a file")
        temporary = path.with_name(f".erllama-{secrets.token_hex(8)}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        with _errors_name(path):
            temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def private_directory(path: Path) -> None:
    """Create a directory that only the user can read, and its parents, regardless of the umask.

    Raises:
        OSError: the directory cannot be created, or other users can write to it.
    """
    with _errors_name(path):
        make_private(path)
        status = path.stat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise PermissionError(errno.EPERM, "other users can write to this directory")


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Replace the file name in an OSError by `path`: the user did not name the temporary file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
