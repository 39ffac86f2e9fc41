"""Files that the command writes for its user: private, and whole or not there at all.

`/save` and `cache export` write through `new_file`; the history of `chat` is
kept in a directory that `private_directory` makes. Prompts are in all of them.
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
    """Yield a new file that only its owner can read; rename it to `path` when the `with` ends well.

    A file or a link at `path` is replaced: its mode is not kept, and what the link points to stays as it is.

    Raises:
        OSError: it cannot be written, or `path` is a directory, a device or a pipe.
    """
    with _about(path):
        with suppress(FileNotFoundError):
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
                raise OSError(errno.EINVAL, "not a regular file; give the name of a file")
        temporary = path.with_name(f".erllama-{secrets.token_hex(8)}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        with _about(path):
            temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def private_directory(path: Path) -> None:
    """Make a directory of the user's alone, with its parents, whatever the umask is.

    Raises:
        OSError: it cannot be made, or others can write to it.
    """
    with _about(path):
        make_private(path)
        status = path.stat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise PermissionError(errno.EPERM, "other users can write to this directory")


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Name the user's file in an error, rather than a temporary one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
