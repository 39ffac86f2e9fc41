"""Objects in a bucket of S3, Google Cloud Storage, Azure, or a service that speaks one of their protocols.

obstore, from the extra `remote`, speaks to them. Credentials, region and endpoint come from the environment, as of
those services' own clients: AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL, GOOGLE_SERVICE_ACCOUNT and so on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from erllama.cache.remote.stores import Address, Content, ObjectStore, Stored, do_nothing
from erllama.checks import import_optional
from erllama.errors import CacheFormatError, OptionError, RemoteAccessError, RemoteUnreachable

if TYPE_CHECKING:
    import obstore.store

_CONNECT_SECONDS = 3.0  # a machine that does not answer a connection by then is not reachable
_RETRIES = 0  # reads are not worth a second wait, and the tier itself repeats all else
_DELETE_BATCH = 1000  # the most that one request of S3 may name
_LONGEST_MESSAGE = 300

_NO_BUCKET = r"NoSuchBucket|ContainerNotFound|bucket does not exist"
# What a service says, and what its user can do about it.
_REMEDIES = (
    (
        r"RequestTimeTooSkewed|RequestExpired|skew",
        "the clock of this machine differs from the service's by more than 15 minutes; set the clock",
    ),
    (
        r"AuthorizationHeaderMalformed|PermanentRedirect|IllegalLocationConstraint|IncorrectEndpoint|"
        r"301 Moved|307 Temporary|LocationConstraint|configured region",
        "the bucket is in another region; set AWS_REGION to its region",
    ),
    (_NO_BUCKET, "there is no such bucket; create it, or correct the address"),
    (
        r"InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|InvalidToken|credential|metadata",
        "the credentials are missing, wrong or expired; set them in the environment",
    ),
    (
        r"AccessDenied|403 Forbidden|401 Unauthorized|Forbidden|AuthorizationPermissionMismatch",
        "the credentials lack a permission; the tier lists, gets, puts and deletes objects under its prefix. With "
        "read_only=True, it only lists and gets",
    ),
)


def open_bucket(address: Address, timeout: float) -> ObjectStore:
    """Return the store of a bucket; see `open_store`."""
    import_optional("obstore", needed_by=f"remote={address.text!r}", package="obstore", install='"erllama[remote]"')
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    try:
        store = from_url(
            address.text,
            client_options={
                "allow_http": True,  # the endpoint decides: a service in the own network may have no certificate
                "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
                "timeout": timedelta(seconds=timeout),
            },
            retry_config={
                "max_retries": _RETRIES,
                "retry_timeout": timedelta(seconds=timeout),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=100),
                    "max_backoff": timedelta(seconds=1),
                    "base": 2,
                },
            },
        )
    except (BaseError, ValueError, TypeError) as error:
        raise OptionError(f"remote={address.text!r}: {_first_line(error)}") from None
    return BucketStore(store, address.text)


class BucketStore:
    """The object store in a bucket, below a prefix.

    Args:
        store: obstore's own store, with the prefix.
        address: for messages.
    """

    def __init__(self, store: obstore.store.ObjectStore, address: str) -> None:
        self._store, self._address = store, address

    def create(self) -> None:
        """Leave the bucket to its owner: one that is missing is an error."""

    def get(self, name: str, limit: int, on_response: Callable[[], None] = do_nothing) -> memoryview:
        import obstore

        with self._errors("reading"):
            result = obstore.get(self._store, name)
            on_response()
            if result.meta["size"] > limit:
                raise CacheFormatError(f"an object of {result.meta['size']} bytes; at most {limit} are expected")
            return memoryview(result.bytes())
        raise AssertionError  # `_errors` raises

    def put(self, name: str, parts: Sequence[Content], *, replace: bool = False) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        content = b"".join(parts)
        with self._errors("writing"):
            try:
                # Not as a multipart upload, which could not be refused if the object exists.
                obstore.put(
                    self._store, name, content, mode="overwrite" if replace else "create", use_multipart=False
                )
            except (AlreadyExistsError, PreconditionError):
                return False
            return True
        raise AssertionError

    def delete(self, names: Iterable[str]) -> None:
        import obstore

        waiting = list(names)
        for at in range(0, len(waiting), _DELETE_BATCH):
            with self._errors("removing"):
                try:
                    obstore.delete(self._store, waiting[at : at + _DELETE_BATCH])
                except FileNotFoundError:  # Google and Azure report the objects that are missing
                    self._delete_each(waiting[at : at + _DELETE_BATCH])

    def _delete_each(self, names: Sequence[str]) -> None:
        import obstore

        for name in names:
            try:
                obstore.delete(self._store, name)
            except FileNotFoundError:
                continue

    def list(self, prefix: str) -> Iterator[Stored]:
        import obstore

        pages = obstore.list(self._store, prefix=prefix)
        while True:
            with self._errors("listing"):
                page = next(iter(pages), None)
            if page is None:
                return
            for meta in page:
                yield Stored(meta["path"], meta["size"], meta["last_modified"].timestamp())

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        """Raise what obstore raises as one of this library's errors."""
        from obstore.exceptions import BaseError

        try:
            yield
        except CacheFormatError:
            raise
        except (BaseError, OSError) as error:
            text = str(error)
            if isinstance(error, FileNotFoundError) and not re.search(_NO_BUCKET, text):
                raise FileNotFoundError(_first_line(error)) from None
            for pattern, remedy in _REMEDIES:
                if re.search(pattern, text):
                    raise RemoteAccessError(f"{action} {self._address}: {remedy} ({_first_line(error)})") from error
            raise RemoteUnreachable(f"{action} {self._address}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """Return the first part of obstore's message, whose rest is a dump of its internal state."""
    text = " ".join(str(error).split("\n\nDebug source:")[0].split())
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[: _LONGEST_MESSAGE - 1]}…"
