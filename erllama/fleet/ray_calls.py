"""`RayCalls`: calls replicas through a deployment handle of Ray Serve."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from erllama.errors import Error
from erllama.fleet.transport import Received, ReplicaLost, WirePrefix


class RayCalls:
    """Implements `ReplicaCalls`.

    Args:
        handle: of the deployment of replicas.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def run(self, request: str, body: bytes, identity: str) -> AsyncIterator[Received]:
        """Run a request on the replica that the router chooses."""
        replies: Any = self._handle.options(method_name="run", stream=True).remote(request, body, identity)
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
        await self._invoke("cancel", request, to=replica)

    async def call(self, body: bytes, replica: str | None = None) -> bytes:
        """Answer an encoded call."""
        answer: bytes = await self._invoke("call", body, to=replica)
        return answer

    async def describe(self) -> tuple[str, bytes]:
        """Return the identity of the model of any replica, and its encoded `Started`."""
        found: tuple[str, bytes] = await self._invoke("describe")
        return found

    async def warm(self, replica: str, prefixes: Sequence[WirePrefix]) -> int:
        """Load prefixes from a replica's cache into its memory."""
        n: int = await self._invoke("warm", [(each.salt, each.tokens) for each in prefixes], to=replica)
        return n

    async def _invoke(self, method: str, *args: object, to: str | None = None) -> Any:
        with _ray_errors():
            return await self._handle.options(method_name=method).remote(*args, to=to)


@contextmanager
def _ray_errors() -> Iterator[None]:
    """Raise errors of Ray as `ReplicaLost`."""
    try:
        yield
    except RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, Error):
            raise cause from None
        raise ReplicaLost(f"{type(error).__name__}: {str(error).splitlines()[-1]}") from error
    except (RayError, RayServeException) as error:
        raise ReplicaLost(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
