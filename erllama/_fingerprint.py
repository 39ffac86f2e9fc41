"""Names the content of a model file for the cache.

Where blocks outlive the process, the name is the SHA-256 of the file, read
once and remembered by the file's identity. Where they do not, the identity
itself serves: nothing is read.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from erllama.cache import Cache
from erllama.errors import ModelLoadError

_CHUNK = 1 << 22
_SPLIT = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")


def fingerprint(path: Path, cache: Cache) -> str:
    """The name of a model's content, all parts of a split one included."""
    digests = []
    for part in parts(path):
        identity = _identity(part)
        if not cache.persistent:
            digests.append(identity)
            continue
        digest = cache.fingerprint(identity)
        if digest is None:
            digest = _sha256(part)
            cache.remember_fingerprint(identity, digest)
        digests.append(digest)
    return " ".join(digests)


def parts(path: Path) -> list[Path]:
    """The files of a model: `path`, or every part where its name is that of a split file's first."""
    found = _SPLIT.fullmatch(path.name)
    if not found:
        return [path]
    count = int(found["count"])
    return [path.with_name(f"{found['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]


def _identity(path: Path) -> str:
    try:
        status = path.stat()
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from None
    # ctime, too: mtime can be kept through a change of content, ctime cannot.
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    try:
        with path.open("rb", buffering=0) as file:
            while n := file.readinto(buffer):
                digest.update(view[:n])
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from None
    return digest.hexdigest()
