"""The weights of a model, which are loaded again after an RPC server that had a part of them was lost.

A context belongs to the weights that it was created on. After a reload, the backend and its embedder create new
contexts, each in its own thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from erllama._runtime.log import logger
from erllama.engine.backends.llama_library import add_rpc_server, llama_ffi
from erllama.errors import BackendError, Error, LoadCancelled, ModelLoadError, ServerLost

log = logger("erllama.engine")

_Loaded = TypeVar("_Loaded")


def load_remote(servers: Sequence[str], load: Callable[[], _Loaded]) -> _Loaded:
    """Return the result of `load`; raise ServerLost if it fails and a server does not answer any more."""
    try:
        return load()
    except ModelLoadError as error:
        if not isinstance(error, LoadCancelled):
            for server in servers:
                add_rpc_server(server)
        raise


class LlamaWeights:
    """The loaded weights of a model. Thread-safe.

    Args:
        model: the loaded model. It is closed by `close`.
        servers: the RPC servers that have a part of it; empty for a model on this machine.
        load: loads it again.

    Attributes:
        model: the model whose weights are in use. `reload` replaces it.
    """

    def __init__(
        self, model: llama_ffi.LlamaModel, servers: Sequence[str], load: Callable[[], llama_ffi.LlamaModel]
    ) -> None:
        self.model = model
        self._load = load
        self._lock = threading.Lock()
        self._connections = {server: llama_ffi.rpc_connection(server) for server in servers}
        self._closed = False

    @property
    def remote(self) -> bool:
        """Whether an RPC server has a part of the weights."""
        return bool(self._connections)

    @property
    def lost_server(self) -> str:
        """The address of a server whose connection is lost. Its weights and KV are lost, too. Empty if all work."""
        for server, connection in self._connections.items():
            if llama_ffi.rpc_connection(server) != connection or connection == 0:
                return server
        return ""

    def check(self) -> None:
        """Raise ServerLost if a connection was lost."""
        if server := self.lost_server:
            raise ServerLost(
                f"the connection to the RPC server {server} was lost, and with it weights and KV of the model; "
                "send the request again when the server is back: the model is then loaded again"
            )

    def reload(self) -> None:
        """Load the weights again, if a connection was lost.

        Raises:
            ServerLost: a server is not back.
            BackendError: the model cannot be loaded.
        """
        with self._lock:
            server = self.lost_server
            if not server or self._closed:
                return
            for name in self._connections:
                add_rpc_server(name)
            log.info("the RPC server %s is back: the model is loaded again", server)
            try:
                model = load_remote(list(self._connections), self._load)
            except BackendError:
                raise
            except Error as error:
                raise BackendError(f"the model could not be loaded again: {error}") from error
            connections = {name: llama_ffi.rpc_connection(name) for name in self._connections}
            old, self.model, self._connections = self.model, model, connections
            old.close()
        self.check()

    def close(self) -> None:
        """Release the weights. Idempotent."""
        with self._lock:
            self._closed = True
            self.model.close()
