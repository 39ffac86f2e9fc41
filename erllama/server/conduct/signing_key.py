"""The key that signs thinking, and its file, which keeps signatures valid after a restart of the server."""

from __future__ import annotations

import logging
import os
import secrets
from contextlib import suppress
from pathlib import Path

log = logging.getLogger("erllama.server")

_NAME = "thinking-signing.key"
_BYTES = 32


def load_signing_key(directory: str | Path | None) -> bytes:
    """Return the key of a directory, which is created with it if they are missing.

    A directory that cannot be used is logged, and the key is then a new one.

    Args:
        directory: private to the user; None for a key of this process alone.
    """
    new = secrets.token_bytes(_BYTES)
    if directory is None:
        return new
    path = Path(directory).expanduser() / _NAME
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Written in full under another name first: another server may read it at once.
        written = path.with_name(f"{_NAME}.{os.getpid()}-{secrets.token_hex(4)}")
        try:
            with open(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(new)
            with suppress(FileExistsError):
                os.link(written, path)
        finally:
            written.unlink(missing_ok=True)
        key = path.read_bytes()
    except OSError as error:
        log.warning("%s: %s; thinking that was signed before a restart will be skipped", path, error)
        return new
    if len(key) != _BYTES:
        log.warning("%s has %d bytes instead of %d; remove it", path, len(key), _BYTES)
        return new
    return key
