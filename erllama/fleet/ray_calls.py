"""`RayCalls`: calls replicas through a deployment handle of Ray Serve."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from erllama.errors import Error
from erllama.fleet.transport import Received, ReplicaLost, WirePrefix

_T = TypeVar("_T")


class RayCalls:
    """Implements `ReplicaCalls`.

    Args:
        handle: of the deployment of replicas.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._run: Any = handle.options(method_name="run", stream=True)

    async def run(self, request: str, body: bytes, identity: str) -> AsyncIterator[Received]:
        """Run a request on the replica that the router chooses."""
        replies: Any = self._run.remote(request, body, identity)
        ended = False
        try:
            with _ray_errors():
                async for replica, bodies in replies:
                    yield Received(replica, bodies)
            ended = True
        finally:
            if not ended:
                replies.cancel()

    async def cancel(self, replica: str, request: str) -> None:
        """End a request early."""
        await self._call(None, "cancel", request, to=replica)

    async def call(self, body: bytes, replica: str | None = None) -> bytes:
        """Answer an encoded call."""
        return await self._call(bytes, "call", body, to=replica)

    async def describe(self) -> tuple[str, bytes]:
        """Return the identity of the model of any replica, and its encoded `Started`."""
        identity, body = await self._call(tuple, "describe")
        return identity, body

    async def warm(self, replica: str, prefixes: Sequence[WirePrefix]) -> int:
        """Load prefixes from a replica's cache into its memory."""
        return await self._call(int, "warm", [(each.salt, each.tokens) for each in prefixes], to=replica)

    async def _call(self, kind: type[_T] | None, method: str, *args: object, to: str | None = None) -> _T:
        """Return what a method of a replica returns, of this type."""
        with _ray_errors():
            found: _T = await self._handle.options(method_name=method).remote(*args, to=to)
        assert kind is None or isinstance(found, kind)
        return found


@contextmanager
def _ray_errors() -> Iterator[None]:
    """Raise errors of Ray as `ReplicaLost`."""
    try:
        yield
    except RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, Error):
            raise cause from None
        raise ReplicaLost.of(error, -1) from error
    except (RayError, RayServeException) as error:
        raise ReplicaLost.of(error, 0) from error
