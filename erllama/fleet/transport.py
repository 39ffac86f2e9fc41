"""How the ingress reaches replicas: the calls that Ray makes, and the errors that mean "try another replica"."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple, Protocol

from msgspec import Struct

from erllama.errors import Error


class ReplicaLost(Error):  # noqa: N818
    """A replica ended while it ran a request, or cannot be reached."""

    @classmethod
    def of(cls, error: BaseException, line: int) -> ReplicaLost:
        """Return the error that stands for another one: its type, and one line of its text, which may be empty."""
        kind, lines = type(error).__name__, str(error).splitlines()
        return cls(f"{kind}: {lines[line]}" if lines else kind)


class WirePrefix(Struct, frozen=True, array_like=True):
    """A prefix to load from the cache: its salt, and its tokens as int32, little-endian."""

    salt: str | None
    tokens: bytes


class Received(NamedTuple):
    """What a replica has sent about a request.

    Attributes:
        replica: its name.
        bodies: messages of the protocol between a model and its caller, in order.
    """

    replica: str
    bodies: Sequence[bytes]


class ReplicaCalls(Protocol):
    """Calls replicas. All methods run in the event loop of the runner."""

    def run(self, request: str, body: bytes, identity: str) -> AsyncIterator[Received]:
        """Run a request on the replica that the router chooses. Closing the iterator cancels it there.

        Args:
            request: names it to the router and to the replica.
            body: an encoded `Submit`.
            identity: of the model that the replica must have.

        Raises:
            ReplicaLost: the replica has ended.
        """
        ...

    async def cancel(self, replica: str, request: str) -> None:
        """End a request early. Raises ReplicaLost."""
        ...

    async def call(self, body: bytes, replica: str | None = None) -> bytes:
        """Answer an encoded call, on one replica or on any. Raises ReplicaLost."""
        ...

    async def describe(self) -> tuple[str, bytes]:
        """Return the identity of the model of any replica, and its encoded `Started`. Waits for a replica."""
        ...

    async def warm(self, replica: str, prefixes: Sequence[WirePrefix]) -> int:
        """Load prefixes from a replica's cache into its memory. Return how many tokens were found."""
        ...
