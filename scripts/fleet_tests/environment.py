"""What each test of a fleet gets: directories, a port, and fleets of the demo model."""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

import erllama
import erllama.fleet
from erllama._process.protocol.messages import Started, decode_from_child
from erllama.fleet.ray_router import make_router

_PROXY_SECONDS = 300
# The options of a router have no effect on calls that name their replica.
_ANY_ROUTER = ("demo", "random", 0.0, False)


def free_port() -> int:
    """Return a port that no process listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class Environment:
    """One test: deploys fleets, one after another, and removes them and their directories at the end.

    Attributes:
        port: of the proxy.
        n_conversations, n_turns: how much to run.
        directory: for caches and files; empty at first.
    """

    def __init__(self, port: int, n_conversations: int, n_turns: int) -> None:
        self.port, self.n_conversations, self.n_turns = port, n_conversations, n_turns
        self.directory = Path(tempfile.mkdtemp(prefix="fleet"))
        self._n_fleets = 0

    def __enter__(self) -> Environment:
        return self

    def __exit__(self, *_: object) -> None:
        from ray import serve

        serve.delete("fleet")
        shutil.rmtree(self.directory, ignore_errors=True)

    def deploy(self, **options: object) -> None:
        """Deploy a fleet with empty caches, in place of the one before."""
        from ray import serve

        self._n_fleets += 1
        given: Any = options.pop("cache", {})
        cache: Any = {"disk": f"{self.directory}/{self._n_fleets}-{{rank}}", "ram": "256MiB", "block_size": 16}
        config = {
            "model": str(erllama.demo_model()),
            "name": "demo",
            "options": {"n_ctx": 16384, "n_threads": 1, "n_threads_batch": 1, "n_seq_max": 4},
            "cache": {**cache, **given},
            "report_interval": 0.5,
            "replica_resources": {"num_cpus": 0.1},
            "ingress_resources": {"num_cpus": 0.1},
            **options,
        }
        serve.delete("fleet")
        serve.run(erllama.fleet.build(config), name="fleet", route_prefix="/")
        self._wait_for_proxy()

    def _wait_for_proxy(self) -> None:
        deadline = time.monotonic() + _PROXY_SECONDS
        while True:
            with suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=10).status_code == 200:
                    return
            if time.monotonic() >= deadline:
                raise TimeoutError(f"the proxy of Ray does not answer on port {self.port}")
            time.sleep(0.5)

    @staticmethod
    def wait_for(condition: Callable[[], bool]) -> None:
        """Wait until a condition holds. Raises TimeoutError after some minutes."""
        deadline = time.monotonic() + _PROXY_SECONDS
        while not condition():
            if time.monotonic() >= deadline:
                raise TimeoutError("the fleet did not reach the expected state")
            time.sleep(0.5)

    @staticmethod
    def routing_counts() -> dict[str, int]:
        """Return what the router of the ingress has done."""
        from ray import serve

        handle: Any = serve.get_deployment_handle("FleetIngress", "fleet")
        found: dict[str, int] = handle.options(method_name="routing_counts").remote().result()
        return found

    def replicas(self) -> dict[str, Started]:
        """Return the running replicas by name, with what they say about themselves."""
        return asyncio.run(running_replicas())


async def running_replicas() -> dict[str, Started]:
    """Return the running replicas by name, with what they say about themselves."""
    from ray import serve
    from ray.exceptions import RayError

    handle: Any = serve.get_deployment_handle("FleetReplica", "fleet")
    await handle.options(method_name="name").remote()  # this process then knows all of them
    found = {}
    for name in make_router(*_ANY_ROUTER).serving:
        with suppress(RayError):
            answered, body = await handle.options(method_name="introduce").remote(to=name)
            started = decode_from_child(body)
            assert isinstance(started, Started)
            found[answered] = started
    return found
