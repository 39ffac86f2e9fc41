"""The process-wide state of libllama: its start, errors, log and devices.

All other modules of this package use `lib` and `ffi` from here. libllama starts at its first use, never at an
import.

A process that was forked from one that used libllama cannot use it, because the child lacks the worker threads.
`Process.generation` counts forks, and every native object raises an error in a generation other than its own.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from erllama.llama_ffi._binding import ffi as ffi
from erllama.llama_ffi._binding import lib as lib

log = logging.getLogger("erllama.llama")
# Errors quote libllama's log, so by default the log does not also go to the terminal.
log.addHandler(logging.NullHandler())

_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}
_LINE_BYTES = 4096

_start_lock = threading.Lock()
_started = False


class LlamaError(RuntimeError):
    """libllama refused or failed. The message has its reason."""


class NoCellsError(LlamaError):
    """Too few free KV cells for the batch, which was not decoded."""


class DecodeError(LlamaError):
    """libllama failed in a decode."""


class ServerError(LlamaError):
    """An RPC server cannot be used. The message has the reason.

    Attributes:
        built: False if this libllama was built without RPC.
    """

    def __init__(self, message: str, *, built: bool = True) -> None:
        super().__init__(message)
        self.built = built


class AbortedError(LlamaError):
    """The decode was aborted on request."""


class Process:
    """This process.

    Attributes:
        generation: the number of forks between this process and the process that imported the library. Each decode
            reads it, so it is not a function.
    """

    generation = 0


def _after_fork_in_child() -> None:
    global _start_lock
    Process.generation += 1
    _start_lock = threading.Lock()  # another thread may have held it at the fork


os.register_at_fork(after_in_child=_after_fork_in_child)


def start() -> None:
    """Start libllama's backends. Only the first call in a process has an effect.

    Raises:
        LlamaError: the backends could not start, or the process is a fork of a process that had started them.
    """
    global _started
    if Process.generation:
        raise LlamaError(
            "this process was forked from one that had loaded libllama, which cannot be used after a fork; "
            "start workers with multiprocessing's 'spawn' method, or load models after forking"
        )
    if _started:
        return
    with _start_lock:
        if not _started:
            check(lib.erl_init(), "starting libllama")
            _started = True
            drain_log()
            if backend := missing_gpu():
                log.warning("libllama was built for %s, but finds no GPU; the CPU computes", backend)


def last_error() -> str:
    """Return the reason that the calling thread's last native call failed; empty if libllama gave none."""
    return text(lib.erl_last_error())


def check(code: int, action: str) -> int:
    """Return `code`, or raise LlamaError if it reports a failure."""
    if code <= lib.ERL_ASSERTION:
        raise LlamaError(f"{action} failed: {last_error()}")
    return code


def text(pointer: object) -> str:
    """Convert a C string to str; NULL becomes the empty string."""
    return ffi.string(pointer).decode("utf-8", "replace") if pointer else ""


def drain_log() -> list[str]:
    """Pass libllama's log lines to the logger `erllama.llama`.

    Lines of libllama's level INFO are logged at DEBUG, because there are many of them.

    Returns:
        The error and warning lines, for an error message.
    """
    if lib.erl_log_pending() == 0:
        return []
    problems = []
    level = ffi.new("int32_t *")
    buffer = ffi.new("char[]", _LINE_BYTES)
    while (n := lib.erl_log_next(level, buffer, _LINE_BYTES)) >= 0:
        line = bytes(ffi.buffer(buffer, n)).decode("utf-8", "replace").rstrip()
        if not line:
            continue
        _log(_LEVELS.get(level[0], logging.DEBUG), line)
        if level[0] >= 3:
            problems.append(line)
    return problems


def _log(level: int, line: str) -> None:
    """Log a line of libllama. A failing handler does not disturb the call; its traceback goes to stderr."""
    try:
        log.log(level, "%s", line)
    except Exception:
        _print_failure()
    except BaseException:
        # In the main thread it may be Ctrl-C. A handler must not end any other thread.
        if threading.current_thread() is threading.main_thread():
            raise
        _print_failure()


def _print_failure() -> None:
    if logging.raiseExceptions:
        with suppress(Exception):
            traceback.print_exc()


_GPU_BACKENDS = ("cuda", "hip", "metal", "vulkan")
_DEVICE_KINDS = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accel"}


@dataclass(frozen=True, slots=True)
class Device:
    """A device that libllama can compute on.

    Attributes:
        name: unique, such as "CPU" or "CUDA0".
        description: the driver's description of the hardware.
        kind: "cpu", "gpu" (with its own memory), "igpu" (shares the machine's memory) or "accel" (accelerates the
            CPU).
        free_bytes, total_bytes: its memory now; 0 if the driver does not report it, or if it is a server's device
            and no model uses the server.
        id: the hardware's id, such as a PCI address; empty if it has none.
        server: the RPC server that has the device, such as "10.0.0.2:50052"; empty for this machine's.
    """

    name: str
    description: str
    kind: str
    free_bytes: int
    total_bytes: int
    id: str = ""
    server: str = ""


def devices() -> list[Device]:
    """Return the devices that this build of libllama finds, including the CPU. Their indices are their numbers."""
    start()
    found = []
    for i in range(check(lib.erl_n_devices(), "counting devices")):
        device = ffi.new("erl_device *")
        check(lib.erl_device_of(i, device), "reading a device")
        kind = _DEVICE_KINDS.get(device.kind, f"kind {device.kind}")
        memory = int(device.free_bytes), int(device.total_bytes)
        names = text(device.name), text(device.description)
        found.append(Device(*names, kind, *memory, text(device.id), text(device.server)))
    return found


def add_rpc_server(server: str) -> None:
    """Add the devices of an RPC server to those of `devices()`, or connect again if the connection was lost.

    Takes at most about 5 seconds, if the server's machine does not answer.

    Args:
        server: host and port, such as "10.0.0.2:50052".

    Raises:
        ServerError: this libllama has no RPC, or the server cannot be used.
    """
    start()
    code, reason = lib.erl_rpc_add(server.encode()), last_error()
    drain_log()
    if code == 1:
        raise ServerError("this libllama was built without RPC", built=False)
    if code != 0:
        raise ServerError(f"the RPC server {server} cannot be used: {reason}")


def rpc_server_program() -> Path | None:
    """Return the program that offers this machine's devices as an RPC server; None if it was built without RPC."""
    path = Path(__file__).with_name("rpc-server")
    return path if path.exists() else None


def rpc_connection(server: str) -> int:
    """Return the number of the working connection to an RPC server, or 0 without a connection.

    The weights and KV that a server holds for this process end with the connection. A later one has another number.
    Takes some microseconds.
    """
    return int(lib.erl_rpc_connection(server.encode()))


def system_info() -> str:
    """Return the features that libllama was built with and detected, in its own format."""
    start()
    return text(lib.erl_system_info()).strip()


def build_info() -> dict[str, str]:
    """Return the build of libllama: `source` (release tag or digest of a checkout), `backend` and `key`."""
    path = Path(__file__).with_name("build.json")
    found = json.loads(path.read_text()) if path.exists() else {}
    return {name: str(found.get(name, "unknown")) for name in ("source", "backend", "key")}


def missing_gpu() -> str:
    """Return the kind of GPU that libllama was built for, such as "cuda", if it finds none; otherwise "".

    libllama must have started.
    """
    backend = build_info()["backend"]
    if backend not in _GPU_BACKENDS:
        return ""
    device = ffi.new("erl_device *")
    for i in range(lib.erl_n_devices()):
        if lib.erl_device_of(i, device) == 0 and _DEVICE_KINDS.get(device.kind) in ("gpu", "igpu"):
            return ""
    return backend


def state_version() -> int:
    """Return the version of libllama's per-sequence state format."""
    return int(lib.erl_state_seq_version())


def max_sequences() -> int:
    """Return the maximum number of sequences in one context."""
    return int(lib.erl_max_sequences())


def ggml_type(name: str) -> int:
    """Return ggml's number of a type name such as "f16" or "q8_0"; -1 for an unknown name."""
    return int(lib.erl_ggml_type(name.encode()))


def ggml_block_size(type_number: int) -> int:
    """Return the number of elements in a quantization block of a ggml type."""
    return int(check(lib.erl_ggml_block_size(type_number), "reading a block size"))
