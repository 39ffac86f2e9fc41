"""The loaded libllama as a whole: starting it, its errors, its log, its devices.

Owns the process-wide state of libllama. Every other module of this package
goes through `lib` and `ffi` here, so that libllama is started before its first
use and never started by an import alone.

A process forked from one that used libllama cannot use it: the threads that
did the work are not in the child. `generation()` counts forks, and every
native object refuses to work in a generation other than its own.
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
# What libllama says of a failure is in the error we raise: unasked, it need not be on the terminal, too.
log.addHandler(logging.NullHandler())

_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}
_LINE_BYTES = 4096

_start_lock = threading.Lock()
_started = False
_generation = 0


class LlamaError(RuntimeError):
    """libllama refused or failed; the message carries what it said."""


class NoCellsError(LlamaError):
    """No free KV cells for the batch; nothing was decoded."""


class DecodeError(LlamaError):
    """libllama failed in a decode."""


class AbortedError(LlamaError):
    """The decode was aborted on request."""


def _after_fork_in_child() -> None:
    global _generation, _start_lock
    _generation += 1
    _start_lock = threading.Lock()  # a thread that was not forked may have held it


os.register_at_fork(after_in_child=_after_fork_in_child)


def generation() -> int:
    """How many forks lie between this process and the one that imported the library."""
    return _generation


def start() -> None:
    """Start libllama's backends, once per process; cheap afterwards.

    Raises:
        LlamaError: the backends could not start, or the process is a fork of
            one that had started them.
    """
    global _started
    if _generation:
        raise LlamaError(
            "this process was forked from one that had loaded libllama, which does not survive a fork; "
            "start workers with multiprocessing's 'spawn' method, or load models after forking"
        )
    if _started:
        return
    with _start_lock:
        if not _started:
            check(lib.erl_init(), "starting libllama")
            _started = True
            drain_log()


def last_error() -> str:
    """Why the calling thread's last native call failed, as text; empty when libllama gave no reason."""
    return text(lib.erl_last_error())


def check(code: int, action: str) -> int:
    """Return `code` unless it reports a failure, which is raised as LlamaError."""
    if code <= lib.ERL_ASSERTION:
        raise LlamaError(f"{action} failed: {last_error()}")
    return code


def text(pointer: object) -> str:
    """A C string as str; the empty string for NULL."""
    return ffi.string(pointer).decode("utf-8", "replace") if pointer else ""


def drain_log() -> list[str]:
    """Hand the lines that libllama has logged to the logger `erllama.llama`.

    libllama's information lines are passed on at DEBUG: they are many, and a
    library's user did not ask for them.

    Returns:
        The error and warning lines among them, for use in an error message.
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
    """Log a line of libllama's. A handler that fails disturbs no call of libllama, and is printed to stderr."""
    try:
        log.log(level, "%s", line)
    except Exception:
        _print_failure()
    except BaseException:
        # In the main thread it may be Ctrl-C. No other thread is interrupted, or may end, by a handler.
        if threading.current_thread() is threading.main_thread():
            raise
        _print_failure()


def _print_failure() -> None:
    if logging.raiseExceptions:
        with suppress(Exception):
            traceback.print_exc()


_DEVICE_KINDS = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accel"}


@dataclass(frozen=True, slots=True)
class Device:
    """One device that libllama can compute on.

    Attributes:
        name: as "CPU" or "CUDA0"; no two have the same.
        description: of the hardware, as its driver words it.
        kind: "cpu", "gpu" (memory of its own), "igpu" (the machine's memory) or "accel" (helps the CPU).
        free_bytes, total_bytes: its memory now; 0 where the driver does not tell.
        id: the hardware's own, such as a PCI address; empty where it has none.
    """

    name: str
    description: str
    kind: str
    free_bytes: int
    total_bytes: int
    id: str = ""


def devices() -> list[Device]:
    """The devices that this build of libllama sees, the CPU among them; numbered as they stand here."""
    start()
    found = []
    for i in range(check(lib.erl_n_devices(), "counting devices")):
        device = ffi.new("erl_device *")
        check(lib.erl_device_of(i, device), "reading a device")
        kind = _DEVICE_KINDS.get(device.kind, f"kind {device.kind}")
        memory = int(device.free_bytes), int(device.total_bytes)
        found.append(Device(text(device.name), text(device.description), kind, *memory, text(device.id)))
    return found


def system_info() -> str:
    """The features that libllama was built with and found, as it prints them."""
    start()
    return text(lib.erl_system_info()).strip()


def build_info() -> dict[str, str]:
    """What was built: `source` (release tag or digest of a checkout), `backend` and `key`."""
    path = Path(__file__).with_name("build.json")
    found = json.loads(path.read_text()) if path.exists() else {}
    return {name: str(found.get(name, "unknown")) for name in ("source", "backend", "key")}


def state_version() -> int:
    """The version libllama gives its per-sequence state format."""
    return int(lib.erl_state_seq_version())


def max_sequences() -> int:
    """Most sequences that one context can hold."""
    return int(lib.erl_max_sequences())


def ggml_type(name: str) -> int:
    """ggml's number for a type name such as "f16" or "q8_0"; -1 when it has none."""
    return int(lib.erl_ggml_type(name.encode()))


def ggml_block_size(type_number: int) -> int:
    """How many elements one quantisation block of a ggml type holds."""
    return int(check(lib.erl_ggml_block_size(type_number), "reading a block size"))
