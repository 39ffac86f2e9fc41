"""Fingerprints: names for the content of a model file, under which the cache stores its KV.

With "safe" and a persistent cache, the fingerprint is the SHA-256 of the file. The file is read once, and the cache
remembers the digest by the file's identity. With an in-memory cache, the identity itself is the fingerprint and the
file is not read. "gguf_chunked" reads a part of the file, and "fast_unsafe" trusts the caller's name. The
fingerprints of each kind begin with a distinct prefix, so no two kinds share KV.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from erllama.cache import Cache
from erllama.checks import choice
from erllama.engine.backends.file_identity import file_identity, identity
from erllama.engine.backends.gguf_parts import parts
from erllama.errors import LoadCancelled, ModelLoadError, OptionError

FINGERPRINT_KINDS = ("safe", "gguf_chunked", "fast_unsafe")
_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """How to compute the fingerprint of a model file.

    Attributes:
        kind: one of FINGERPRINT_KINDS.
        own: the caller's name for the content, with "fast_unsafe" only.
    """

    kind: str = "safe"
    own: str | bytes | None = None

    def __post_init__(self) -> None:
        choice("fingerprint", self.kind, FINGERPRINT_KINDS)
        if self.kind == "fast_unsafe":
            if not isinstance(self.own, str | bytes) or not self.own:
                raise OptionError(
                    f"own_fingerprint={self.own!r}; with fingerprint='fast_unsafe' pass the text or bytes that "
                    "name the file's content"
                )
        elif self.own is not None:
            raise OptionError(
                f"own_fingerprint with fingerprint={self.kind!r}, which computes the name; "
                "pass fingerprint='fast_unsafe', or leave own_fingerprint out"
            )

    @property
    def own_bytes(self) -> bytes | None:
        """The caller's name in bytes; None without one."""
        return self.own.encode("utf-8", "surrogatepass") if isinstance(self.own, str) else self.own

    def of(self, path: Path, cache: Cache, on_progress: Callable[[float], object]) -> str:
        """Return the fingerprint of a model's content, including all parts of a split model.

        Args:
            on_progress: called with the fraction read, 0.0 to 1.0, if whole files are read. Returning False
                cancels.

        Raises:
            ModelLoadError: a file cannot be read, or changes while it is read.
            LoadCancelled: `on_progress` returned False.
        """
        own = self.own_bytes
        if own is not None:
            return f"own:{hashlib.sha256(own).hexdigest()}"
        if self.kind == "gguf_chunked":
            # Imported here, because this module works without a built libllama.
            from erllama.engine.backends.llama_file import sampled_digest

            return "chunked:" + " ".join(sampled_digest(part) for part in parts(path))
        if not cache.persistent:
            return f"file:{identity(path)}"
        return "sha256:" + " ".join(_digests(parts(path), cache, on_progress))


def content_digest(path: Path, cache: Cache) -> str:
    """Return the SHA-256 of a file, in hex. Reads the file unless the cache remembers its digest.

    Raises:
        ModelLoadError: the file cannot be read, or changes while it is read.
    """
    return _digests([path], cache, lambda _: None)[0]


def _digests(paths: Sequence[Path], cache: Cache, on_progress: Callable[[float], object]) -> list[str]:
    """Return the SHA-256 of each file, in hex. Reads the files whose digests the cache does not remember."""
    files = {part: file_identity(part) for part in paths}
    digests = {part: cache.fingerprint(identity) for part, identity in files.items()}
    unknown = [part for part, digest in digests.items() if digest is None]
    n_bytes = sum(part.stat().st_size for part in unknown)
    n_read = 0

    def read(n: int) -> None:
        nonlocal n_read
        n_read += n
        if on_progress(min(n_read / max(n_bytes, 1), 1.0)) is False:
            raise LoadCancelled(f"{paths[0]}: the load was cancelled")

    for part in unknown:
        read(0)
        digests[part] = digest = _sha256(part, read)
        if file_identity(part) != files[part]:
            raise ModelLoadError(f"{part} was changed while it was read; load it again when it is complete")
        cache.remember_fingerprint(files[part], digest)
    return [str(digest) for digest in digests.values()]


def _sha256(path: Path, on_read: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    try:
        with path.open("rb", buffering=0) as file:
            while n := file.readinto(buffer):
                digest.update(view[:n])
                on_read(n)
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from None
    return digest.hexdigest()
