"""The binding of libllama for the modules of the llama backend.

The only module that imports `llama_ffi`. Without the binding, the import raises an error that says how to build it.
`translate_errors` converts the binding's errors.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from erllama._runtime.printing import printable
from erllama.errors import (
    AdapterLoadError,
    BackendError,
    LibraryNotBuilt,
    ModelLoadError,
    OptionError,
    PromptError,
    ServerLost,
)

try:
    from erllama import llama_ffi as llama_ffi
except ImportError as error:
    raise LibraryNotBuilt(
        f"the binding of libllama is missing ({error}); build it with `make setup` in a checkout, "
        "or install erllama with pip, which builds it"
    ) from error


def _make_printable(record: logging.LogRecord) -> bool:
    """Make a line of libllama's log printable, since it may quote a model's metadata."""
    record.msg, record.args = printable(record.getMessage()), None
    return True


logging.getLogger("erllama.llama").addFilter(_make_printable)

_SERVER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}:([0-9]{1,5})")

_GET_RPC = "build it with `make setup RPC=1` in a checkout, or with ERLLAMA_RPC=1 and pip"

MAX_SEQUENCES = llama_ffi.max_sequences() - 1  # one is the scratch sequence


def devices() -> list[llama_ffi.Device]:
    """Return the devices that libllama can compute on, including the CPU.

    Raises:
        BackendError: libllama cannot start, for example in a process forked from one that had started it.
    """
    with translate_errors(BackendError):
        return llama_ffi.devices()


def add_rpc_servers(servers: object) -> tuple[str, ...]:
    """Add the devices of RPC servers to `devices()`, where they stay.

    Args:
        servers: host and port of each, such as "10.0.0.2:50052". Hosts are names or IPv4 addresses.

    Returns:
        the servers, each once.

    Raises:
        OptionError: `servers` is not a list of hosts with ports, or this libllama has no RPC.
        ServerLost: a server cannot be used.
    """
    if isinstance(servers, str | bytes) or not isinstance(servers, Sequence):
        raise OptionError(f"rpc_servers={servers!r}; pass a list of servers, such as ['10.0.0.2:50052']")
    found = dict.fromkeys(_checked_server(server) for server in servers)
    for server in found:
        add_rpc_server(server)
    return tuple(found)


def rpc_server_program() -> Path:
    """Return the program that offers this machine's devices to other machines.

    Raises:
        OptionError: this libllama has no RPC.
    """
    program = llama_ffi.rpc_server_program()
    if program is None:
        raise OptionError(f"this libllama was built without RPC; {_GET_RPC}")
    return program


def _checked_server(server: object) -> str:
    match = _SERVER.fullmatch(server) if isinstance(server, str) else None
    if match is None or not 1 <= int(match[1]) <= 65535:
        raise OptionError(
            f"rpc_servers: {server!r} is not a host with a port; use the form '10.0.0.2:50052', with a name or "
            "an IPv4 address"
        )
    return match[0]


def add_rpc_server(server: str) -> None:
    """Add the devices of an RPC server, or connect again to one that was added before.

    Raises:
        OptionError: this libllama has no RPC.
        ServerLost: the server cannot be used.
    """
    try:
        llama_ffi.add_rpc_server(server)
    except llama_ffi.ServerError as error:
        if not error.built:
            raise OptionError(f"rpc_servers: {error}; {_GET_RPC}") from None
        raise ServerLost(
            f"{error}. Start `rpc-server` there, allow its port, and check that no other process uses it: "
            "a server serves one process at a time"
        ) from error
    except llama_ffi.LlamaError as error:
        raise BackendError(str(error)) from error


@contextmanager
def translate_errors(
    kind: type[AdapterLoadError | BackendError | ModelLoadError | PromptError], context: str = ""
) -> Iterator[None]:
    """Raise `kind` for the binding's errors."""
    try:
        yield
    except llama_ffi.LlamaError as error:
        raise kind(f"{context}: {error}" if context else str(error)) from error
