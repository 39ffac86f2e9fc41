"""Object stores: where the objects of a remote tier lie, by name.

`BucketStore` and `DirectoryStore` implement the protocol. Any thread may call a store.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from erllama.checks import choice, shown
from erllama.errors import OptionError

BUCKET_SCHEMES = ("s3", "gs", "az")
_SCHEMES = (*BUCKET_SCHEMES, "file")
Content = bytes | memoryview
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class Stored(NamedTuple):
    """An object as a listing shows it: its name, its size, and when it was written, in seconds since 1970."""

    name: str
    n_bytes: int
    written: float


def do_nothing() -> None:
    """Stand in for a callback."""


class ObjectStore(Protocol):
    """Objects by name. A name is a relative path with "/" between its parts.

    Each method raises `RemoteAccessError` if the store refuses this client, and `RemoteUnreachable` if it does not
    answer in time.
    """

    def create(self) -> None:
        """Create the store if it does not exist. Has no effect once it did, so that one that is gone stays gone."""

    def get(self, name: str, limit: int, on_response: Callable[[], None] = do_nothing) -> memoryview:
        """Return the content of an object.

        Args:
            limit: the most bytes that it may have.
            on_response: called when the service has begun to answer.

        Raises:
            FileNotFoundError: there is no such object.
            CacheFormatError: it has more than `limit` bytes. It is not read then.
        """

    def put(self, name: str, parts: Sequence[Content], *, replace: bool = False) -> bool:
        """Write an object whole or not at all. Returns False, without a write, if it exists and not `replace`."""

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects. Ignores names that do not exist."""

    def list(self, prefix: str) -> Iterator[Stored]:
        """Return the objects whose names begin with `prefix` and "/", in any order."""


class Address(NamedTuple):
    """The checked address of a remote tier.

    Attributes:
        scheme: "s3", "gs", "az" or "file".
        text: the address as messages show it, and as another process can open it.
        path: the directory, for the scheme "file".
    """

    scheme: str
    text: str
    path: Path | None = None


def parse_address(value: object) -> Address:
    """Check the address of a remote tier.

    Args:
        value: "s3://bucket/prefix", "gs://bucket/prefix", "az://container/prefix", "file:///directory", or the path
            of a directory.

    Raises:
        OptionError: it is not such an address, or has credentials or parameters in it.
    """
    if not isinstance(value, str | os.PathLike) or not str(value) or "\0" in str(value):
        raise OptionError(f"remote={shown(value)}; pass an address such as s3://bucket/prefix, or a directory")
    text = os.fspath(value)
    if not isinstance(text, str):
        raise OptionError(f"remote={shown(value)}; pass text, not bytes")
    found = _SCHEME.match(text)
    if found is None:
        try:
            path = Path(text).expanduser().absolute()
        except RuntimeError as error:
            raise OptionError(f"remote={shown(value)}: {error}") from None
        return Address("file", str(path), path)
    scheme = choice("the scheme of remote", found[1].lower(), _SCHEMES)
    parts = urlsplit(text)
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise OptionError(
            f"the address {scheme}://… of remote has credentials or parameters; pass {scheme}://bucket/prefix, and "
            "set credentials, region and endpoint in the environment"
        )
    if scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise OptionError(f"remote={shown(value)}; pass file:///directory, with three slashes")
        path = Path(unquote(parts.path))
        return Address("file", str(path), path)
    if not parts.netloc:
        raise OptionError(f"remote={shown(value)} names no bucket; pass {scheme}://bucket/prefix")
    return Address(scheme, f"{scheme}://{parts.netloc}{parts.path.rstrip('/')}")
