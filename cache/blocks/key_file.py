"""Reads the file of secret keys that signs or encrypts the content of a cache.

The file has one key per line, as 64 hexadecimal digits: the newest first, and below it those that older content was
written with. Lines that are empty or start with "#" have no meaning. Only its owner may read it.

A key is never used itself. Each purpose has a key of its own, which HMAC-SHA256 derives from it: a signature says
nothing about the key that encrypts.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from erllama.errors import CacheKeyError

SECRET_BYTES = 32
_MAX_FILE_BYTES = 64 * 1024
_ID_BYTES = 8


class SecretKeys:
    """The keys of a file. Their representation shows none of them.

    Args:
        keys: one or more keys of 32 bytes, the newest first.
    """

    def __init__(self, keys: tuple[bytes, ...]) -> None:
        if not keys or any(len(key) != SECRET_BYTES for key in keys):
            raise ValueError(f"one or more keys of {SECRET_BYTES} bytes are needed")
        self._keys = keys

    def __repr__(self) -> str:
        return f"<SecretKeys: {', '.join(self.ids)}>"

    @property
    def ids(self) -> tuple[str, ...]:
        """A name of 16 hexadecimal digits for each key, the newest first. It can be shown and stored."""
        return tuple(key.hex() for key in self.derive("id", _ID_BYTES))

    def derive(self, purpose: str, size: int = SECRET_BYTES) -> tuple[bytes, ...]:
        """Return the keys for one purpose, the newest first, of up to 32 bytes each."""
        return tuple(hmac.digest(key, purpose.encode(), hashlib.sha256)[:size] for key in self._keys)


def read_key_file(path: str | os.PathLike[str]) -> SecretKeys:
    """Read a file of keys.

    Raises:
        CacheKeyError: the file is missing, can be read by others, or has a line that is not a key.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise CacheKeyError(f"key file {path}: {error.strerror}; `erllama cache new-key` creates one") from error
    if mode & 0o077:
        raise CacheKeyError(f"key file {path} has mode {mode:04o}, so others can read it; run `chmod 600 {path}`")
    if len(content) > _MAX_FILE_BYTES:
        raise CacheKeyError(f"key file {path} has more than {_MAX_FILE_BYTES} bytes; pass a file of keys")
    keys = []
    for number, line in enumerate(content.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith(b"#"):
            continue
        # The line itself is not shown: it may be a key with one wrong character.
        try:
            key = bytes.fromhex(line.decode("ascii"))
        except ValueError:
            raise CacheKeyError(f"key file {path}, line {number}: not a key of 64 hexadecimal digits") from None
        if len(key) != SECRET_BYTES:
            raise CacheKeyError(f"key file {path}, line {number}: {len(key)} bytes; a key has {SECRET_BYTES}")
        keys.append(key)
    if not keys:
        raise CacheKeyError(f"key file {path} has no key; `erllama cache new-key` writes one into a new file")
    return SecretKeys(tuple(keys))


def create_key_file(path: str | os.PathLike[str]) -> SecretKeys:
    """Write a file with a new random key, which only its owner can read. Creates its directory.

    Raises:
        CacheKeyError: the file exists, or it cannot be created.
    """
    path = Path(path)
    key = secrets.token_bytes(SECRET_BYTES)
    try:
        if not path.parent.exists():
            path.parent.mkdir(mode=0o700, parents=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(key.hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise CacheKeyError(f"key file {path} exists; its keys may be in use, so it is not overwritten") from None
    except OSError as error:
        raise CacheKeyError(f"key file {path}: {error.strerror}") from error
    return SecretKeys((key,))
