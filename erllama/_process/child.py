"""The process of one model, which runs this module.

The parent starts it with one end of a socket pair, as the number of a file handle, and with its own process number.
It sends a `Start`. The child loads the model, answers `Started`, and serves the parent until it ends. It ends with
its parent, however that ends.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from erllama._process.backend_factory import BackendFactory
from erllama._process.child_process import library_version, mark_as_child
from erllama._process.endpoint import Endpoint
from erllama._process.protocol import messages as m
from erllama._process.protocol import wire_types as w
from erllama._process.protocol.frames import FrameReader, Outbox, ProtocolError, receive
from erllama._process.protocol.wire_values import pack_error
from erllama.cache import Cache, Policy
from erllama.engine import Backend, ModelFacts, ModelThread
from erllama.engine.scheduling.options import SchedulingOptions
from erllama.events.publishing import follow_adapters, start_publisher

_PR_SET_PDEATHSIG = 1
# Bytes that may wait for the parent. Beyond it, replies stay in their tickets, which join their pieces.
_MAX_WAITING = 1 << 20


def main(arguments: list[str]) -> int:
    """Run the process; return its exit status."""
    connection, parent = socket.socket(fileno=int(arguments[0])), int(arguments[1])
    mark_as_child()
    _end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    faulthandler.enable()  # a crash prints the stacks of all threads, which the parent logs
    reader = FrameReader()
    start = _receive_start(connection, reader)
    if start is None:
        return 0
    outbox = Outbox(connection, lambda: None, _MAX_WAITING)
    try:
        _check_version(start)
        _set_up_logging(start.log_levels)
        # A module of a custom backend may be where only the parent's program has it.
        sys.path += [path for path in start.python_path if path and path not in sys.path]
        with _signs_of_life(outbox, start.heartbeat_seconds):
            endpoint, started = _start_model(connection, reader, start, outbox)
    except BaseException as error:
        if not isinstance(error, Exception):
            raise
        outbox.send(m.encode(m.StartFailed(pack_error(error))))
        return 0
    endpoint.send(started)
    endpoint.run()
    return 0


def _end_with_parent(parent: int) -> None:
    """Make the kernel kill this process when the parent ends. Without Linux, the closed socket ends it."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(0)  # it has ended already


def _receive_start(connection: socket.socket, reader: FrameReader) -> m.Start | None:
    """Return the first message; None if the parent has ended."""
    while received := receive(connection):
        for body in reader.feed(received):
            return m.decode_start(body)
    return None


def _check_version(start: m.Start) -> None:
    here = library_version()
    if (start.protocol, start.version) != (m.PROTOCOL, here):
        raise ProtocolError(
            f"the process of the model runs erllama {here} (protocol {m.PROTOCOL}), and its parent {start.version} "
            f"(protocol {start.protocol}): the package was changed while the parent ran; start the program again"
        )


def _set_up_logging(levels: dict[str, int]) -> None:
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s:%(name)s:%(message)s")
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@contextmanager
def _signs_of_life(outbox: Outbox, seconds: float) -> Iterator[None]:
    """Send signs of life in the `with` block, in which the model is loaded."""
    loaded = threading.Event()

    def send() -> None:
        while not loaded.wait(seconds):
            outbox.send(m.encode(m.Loading(None)))

    sender = threading.Thread(target=send, name="erllama-loading", daemon=True)
    sender.start()
    try:
        yield
    finally:
        loaded.set()
        sender.join()


def _start_model(
    connection: socket.socket, reader: FrameReader, start: m.Start, outbox: Outbox
) -> tuple[Endpoint, m.Started]:
    cache = Cache.of_spec(start.cache)
    model = start.model
    if isinstance(model, m.GgufModel):
        backend = _open_gguf(model, cache, outbox)
    else:
        backend = BackendFactory(model.module, model.function, model.options).make()
    sizes = SchedulingOptions(*start.sizes).for_limits(backend.limits)
    publisher = start_publisher(
        start.kv_events, cache, start.id, backend.namespace, wait_for_address=start.is_replacement
    )
    on_stopped = publisher.close if publisher is not None else None
    runner = ModelThread(
        backend, cache, Policy.of(start.policy), start.id, **sizes._asdict(), on_stopped=on_stopped
    )
    follow_adapters(publisher, runner.adapters, backend.namespace)
    if start.warmup and backend.limits.can_generate:
        runner.warm_up()
    endpoint = Endpoint(connection, reader, outbox, backend, cache, runner, start.heartbeat_seconds)
    facts = getattr(backend, "facts", None) or ModelFacts()
    started = m.Started(
        pid=os.getpid(),
        limits=backend.limits,
        facts=facts,
        namespace=json.dumps(dict(backend.namespace)).encode(),
        recipe=backend.recipe,
        backend=type(backend).__name__,
        description=str(getattr(backend, "description", "")),
        vocabulary=None if isinstance(model, m.GgufModel) else _vocabulary(backend),
        n_seq_max=sizes.n_seq_max,
        state=endpoint.state(),
    )
    return endpoint, started


def _open_gguf(model: m.GgufModel, cache: Cache, outbox: Outbox) -> Backend:
    # Imported here: custom backends work without a built libllama.
    from erllama.engine.backends.fingerprint import Fingerprint
    from erllama.engine.backends.llama_options import LlamaOptions
    from erllama.engine.backends.open_gguf import open_gguf

    last = [-1.0]

    def report(fraction: float) -> None:
        if fraction - last[0] >= 0.01 or fraction == 1.0:
            last[0] = fraction
            outbox.send(m.encode(m.Loading(fraction)))

    options = LlamaOptions(**json.loads(model.options))
    naming = Fingerprint(model.fingerprint, model.own_fingerprint)
    return open_gguf(Path(os.fsdecode(model.path)), options, naming, cache, report)


def _vocabulary(backend: Backend) -> w.WireVocabulary:
    vocabulary = backend.vocabulary
    infill = getattr(vocabulary, "infill_tokens", None)
    return w.WireVocabulary(
        pieces=tuple(vocabulary.piece(token) for token in range(vocabulary.n_tokens)),
        eog=tuple(token for token in range(vocabulary.n_tokens) if vocabulary.is_eog[token]),
        longest_piece=int(getattr(vocabulary, "longest_piece", 0)),
        infill=None if infill is None else tuple(infill),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
