"""The key that signs thinking. With a cache directory it survives restarts, and so do the signatures."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from pathlib import Path

from erllama.cache import Cache

log = logging.getLogger("erllama.server")

KEY_NAME = "signing-key"
_KEY_BYTES = 32


def signing_key(cache: Cache) -> bytes:
    """Return the key in the first disk directory of a cache, created if missing; a random one without a disk."""
    for status in cache.tiers():
        if status.tier == "disk" and not status.read_only and status.error is None:
            path = Path(status.location) / KEY_NAME
            try:
                return _read_or_create(path)
            except OSError as error:
                log.warning("%s: %s; signatures of thinking are valid until the server stops", path, error.strerror)
                break
    return secrets.token_bytes(_KEY_BYTES)


def _read_or_create(path: Path) -> bytes:
    """Return the key in a file of mode 0600. Of several servers that create it at once, one wins."""
    for _ in range(2):
        with contextlib.suppress(FileNotFoundError):
            key = path.read_bytes()
            if len(key) == _KEY_BYTES:
                return key
        # Written whole under another name first: another server never reads a part of it.
        new = path.with_name(f"{KEY_NAME}.{secrets.token_hex(8)}")
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
            with contextlib.suppress(FileExistsError):
                os.link(new, path)
        finally:
            new.unlink()
    raise OSError(0, f"it does not hold {_KEY_BYTES} bytes; remove it")
