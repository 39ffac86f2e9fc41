"""Callers, cancellations and limits while a process starts, hangs or has ended: no call waits for it too long."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import erllama
from erllama._process import cache_member
from erllama._process import endpoint as endpoints
from erllama._process.endpoint import Endpoint
from erllama._process.protocol import messages as m
from erllama._process.protocol import wire_types as w
from erllama._process.protocol.frames import FrameReader, Outbox
from erllama._process.protocol.wire_values import pack_ids, pack_options, unpack_options
from erllama._process.remote_requests import RemoteRequest, RequestTable
from erllama.cache import Policy
from erllama.engine import Grammar, ModelThread, Request, RequestOptions, Ticket
from erllama.engine.backends.stub import StubBackend
from support.threads import wait_until

GATED = """
import os, time
from erllama.engine.backends.stub import StubBackend

class Slow(StubBackend):
    def decode(self, batch):
        time.sleep(0.02)
        return super().decode(batch)

def make(gate):
    while os.path.exists(gate):
        time.sleep(0.01)
    return Slow(eog_bias=-100.0)
"""


class Gate:
    """Processes of models that do not finish their start while it is closed."""

    def __init__(self, folder: Path) -> None:
        (folder / "gated.py").write_text(GATED)
        self.file = folder / "gate"

    def close(self) -> None:
        self.file.touch()

    def open(self) -> None:
        self.file.unlink()

    @contextmanager
    def model(self, folder: Path, **options: object) -> Iterator[erllama.Model]:
        with (
            erllama.Cache(ram=None, ram_file=folder / "blocks", block_size=16) as cache,
            erllama.load_backend(
                "gated:make",
                {"gate": str(self.file)},
                cache=cache,
                process={"hang_timeout": 600.0},  # a slow start, on a busy machine, is not a hang
                **options,  # type: ignore[arg-type]
            ) as model,
        ):
            yield model


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gate:
    monkeypatch.syspath_prepend(str(tmp_path))
    return Gate(tmp_path)


def end_process(model: erllama.Model) -> None:
    os.kill(model.info.pid, signal.SIGKILL)
    wait_until(lambda: not model.info.pid)


# --- while the process is being replaced -----------------------------------------------------------


def test_a_deadline_passes_while_a_process_starts(gate: Gate, tmp_path: Path) -> None:
    with gate.model(tmp_path) as model:
        gate.close()
        end_process(model)
        with pytest.raises(erllama.DeadlineExceeded, match=r"timeout=0\.5 s"):
            model.complete([65], timeout=0.5)
        gate.open()  # the process starts no earlier


def test_requests_that_wait_for_a_start_are_bounded_and_complete(gate: Gate, tmp_path: Path) -> None:
    with gate.model(tmp_path, n_seq_max=2, max_pending=3) as model:
        gate.close()
        end_process(model)
        streams = [model.stream([65, n], max_tokens=3) for n in range(5)]
        with pytest.raises(erllama.QueueFull, match="max_pending=3"):
            model.stream([66], max_tokens=3)
        assert model.metrics.refused == 1
        gate.open()
        assert [len(stream.result().tokens) for stream in streams] == [3] * 5
        assert model._runner._submissions == {}  # type: ignore[attr-defined]
        assert len(model._runner._calls) == 0  # type: ignore[attr-defined]


def test_requests_that_wait_for_a_start_can_be_cancelled(gate: Gate, tmp_path: Path) -> None:
    with gate.model(tmp_path) as model:
        gate.close()
        end_process(model)
        stream = model.stream([65], max_tokens=3000)
        stream.cancel()
        gate.open()
        assert stream.result().finish_reason == "cancelled"


def test_unloading_does_not_wait_for_a_start(gate: Gate, tmp_path: Path) -> None:
    with gate.model(tmp_path) as model:
        gate.close()
        end_process(model)
        stream = model.stream([65], max_tokens=3)
        model.unload()  # the gate stays closed
        with pytest.raises(erllama.ModelUnloaded):
            stream.result()


# --- a process that hangs ----------------------------------------------------------------------------


@contextmanager
def stopped(model: erllama.Model) -> Iterator[None]:
    pid = model.info.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_the_cache_does_not_wait_for_a_process_that_hangs(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_member, "_ANSWER_SECONDS", 0.2)
    with gate.model(tmp_path) as model:
        model.complete([65], max_tokens=3)
        cache = model.cache
        with stopped(model):
            for call in (
                cache.counters,
                cache.rows,
                partial(cache.flush, 0.1),
                partial(cache.evict_bytes, 1, ("live",)),
            ):
                call()
                assert model.info.pid, "the process still hangs: it was not replaced"


def test_an_interrupted_submission_is_cancelled(gate: Gate, tmp_path: Path) -> None:
    with gate.model(tmp_path) as model:

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            with stopped(model):
                signal.setitimer(signal.ITIMER_REAL, 0.3)
                with pytest.raises(KeyboardInterrupt):
                    model.complete([65], max_tokens=3000)
        finally:
            signal.signal(signal.SIGALRM, before)
        wait_until(lambda: model.queue_depth == 0 and model.phase == "idle")


def test_an_event_loop_does_not_wait_for_a_process_that_hangs(gate: Gate, tmp_path: Path) -> None:
    async def run(model: erllama.Model) -> None:
        with stopped(model):
            task = asyncio.create_task(model.acomplete([65], max_tokens=2))
            await asyncio.sleep(0.01)
            assert not task.done()
        assert len((await task).tokens) == 2

    with gate.model(tmp_path) as model:
        asyncio.run(run(model))


# --- ends ----------------------------------------------------------------------------------------------


def test_a_dropped_model_leaves_nothing_behind(tmp_path: Path) -> None:
    with erllama.Cache(ram=None, ram_file=tmp_path, block_size=16) as cache:
        model = erllama.load_backend("erllama.engine.backends.stub:StubBackend", cache=cache, process=True)
        model.complete([65], max_tokens=3)
        runner = weakref.ref(model._runner)
        assert "live" in [status.tier for status in cache.tiers()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            del model
            gc.collect()

        def is_gone() -> bool:
            gc.collect()
            return runner() is None

        wait_until(is_gone)
        assert "live" not in [status.tier for status in cache.tiers()]


def test_an_unloaded_model_has_closed_its_vocabulary(tiny_gguf: Path, tmp_path: Path) -> None:
    with erllama.Cache(ram=None, ram_file=tmp_path) as cache:
        model = erllama.load_model(tiny_gguf, cache=cache, n_ctx=512, n_threads=1, process=True)
        file = model._backend._file  # type: ignore[attr-defined]
        model.unload()
        assert file.close.__self__._model.closed


def test_the_counts_of_the_last_saves_are_reported(gate: Gate, tmp_path: Path) -> None:
    with gate.model(tmp_path) as model:
        stream = model.stream(list(range(65, 105)), max_tokens=3000)
        next(stream)
        cache = model.cache
        before = cache.counters()["bytes_written"]
        model.unload()
        assert cache.counters()["bytes_written"] > before
        assert model.metrics.failed == {"ModelUnloaded": 1}


def test_a_program_may_have_many_open_files() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, limits[1]), limits[1]))
    handles = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            assert theirs.fileno() > 1023  # the limit of select()
            endpoints._wait_writable(theirs)
    finally:
        for handle in handles:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_fork_does_not_wait_for_a_lock_of_another_thread(tmp_path: Path) -> None:
    code = """
        import os, sys, threading, warnings, erllama
        warnings.simplefilter("ignore")
        cache = erllama.Cache(ram=None, ram_file=sys.argv[1])
        model = erllama.load_backend("erllama.engine.backends.stub:StubBackend", cache=cache, process=True)
        held, end = threading.Event(), threading.Event()
        def hold():
            with model._runner._supervisor._child.outbox._lock:
                held.set()
                end.wait()
        threading.Thread(target=hold).start()
        held.wait()
        child = os.fork()
        if not child:
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        end.set()
        model.unload()
    """
    program = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    try:
        assert program.communicate(timeout=60)[0].split() == ["7"]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)


# --- the child's side --------------------------------------------------------------------------------


@contextmanager
def endpoint(
    heartbeat_seconds: float = 60.0, max_waiting: int = 1 << 20
) -> Iterator[tuple[Endpoint, socket.socket]]:
    """An endpoint in this process, and the parent's end of its connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs, erllama.Cache() as cache:
        backend = StubBackend(eog_bias=-100.0)
        sizes = {"n_seq_max": 4, "prefill_chunk_size": 64, "parked_cells": 0, "max_pending": 4}
        runner = ModelThread(backend, cache, Policy(), "test", **sizes)
        served = Endpoint(
            theirs,
            FrameReader(),
            Outbox(theirs, lambda: None, max_waiting),
            backend,
            cache,
            runner,
            heartbeat_seconds,
        )
        thread = threading.Thread(target=served.run)
        thread.start()
        yield served, ours
        ours.shutdown(socket.SHUT_RDWR)
        thread.join()
        runner.stop()


def send(connection: socket.socket, *messages: m.FromParent) -> None:
    for message in messages:
        body = m.encode(message)
        connection.sendall(len(body).to_bytes(4, "little") + body)


def test_a_request_is_cancelled_while_its_grammar_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled = threading.Event()

    def slowly(wire: w.WireOptions) -> RequestOptions:
        cancelled.wait(120)
        return unpack_options(wire)

    monkeypatch.setattr(endpoints, "unpack_options", slowly)
    options = RequestOptions(grammar=Grammar.gbnf('root ::= "a"*'), max_tokens=4000)
    ids = pack_ids(np.array([65], np.int32))
    with endpoint() as (_, parent):
        send(parent, m.Submit(1, ids, pack_options(options, None), 0, True, (), None))
        send(parent, m.Cancel(1), m.EndSession(2, "s", None))  # the answer to the last says that both were read
        reader, ended = FrameReader(), None
        parent.settimeout(120)
        while ended is None:
            for body in reader.feed(parent.recv(1 << 16)):
                message = m.decode_from_child(body)
                if isinstance(message, m.Returned):
                    cancelled.set()
                if isinstance(message, m.Updates):
                    ended = next((update.completion for update in message.updates if update.completion), ended)
        assert ended.finish_reason == "cancelled"


def test_signs_of_life_for_a_stopped_parent_are_bounded() -> None:
    with endpoint(heartbeat_seconds=0.0001, max_waiting=10_000) as (served, _):
        wait_until(lambda: served._outbox.full)
        time.sleep(0.3)
        assert served._outbox._n_kept < 20_000


# --- which request ends the process ------------------------------------------------------------------


def table_of(n: int) -> tuple[RequestTable, list[RemoteRequest]]:
    table = RequestTable()
    requests = [
        RemoteRequest(id, Ticket(Request(np.array([1], np.int32), RequestOptions(), 0), streaming=False), ())
        for id in range(n)
    ]
    for request in requests:
        table.add(request)
    return table, requests


def send_all(table: RequestTable) -> list[RemoteRequest]:
    return list(iter(table.next_to_send, None))


def test_after_an_end_requests_are_sent_one_by_one() -> None:
    table, (a, b, c) = table_of(3)
    assert send_all(table) == [a, b, c]
    assert table.process_ended(2) == []
    assert send_all(table) == [a]
    table.progressed(a)
    assert send_all(table) == [b]
    table.remove(b)
    assert send_all(table) == [c]


def test_a_request_that_passed_is_a_suspect_again_at_the_next_end() -> None:
    table, (a, b, c) = table_of(3)
    send_all(table)
    table.process_ended(2)
    assert send_all(table) == [a]
    table.progressed(a)
    a.deaths = 0
    assert send_all(table) == [b]
    assert table.process_ended(2) == [b]
    assert (a.deaths, c.deaths) == (1, 0)
    assert send_all(table) == [a]  # alone: it may be the cause
    assert table.process_ended(2) == [a]
    assert send_all(table) == [c]


def test_the_counts_that_the_parent_receives_never_decrease(monkeypatch: pytest.MonkeyPatch) -> None:
    read_state = Endpoint.state

    def slowly(self: Endpoint) -> w.ModelState:
        state = read_state(self)
        if threading.current_thread().name.startswith("erllama-send_heartbeats"):
            time.sleep(0.01)
        return state

    monkeypatch.setattr(Endpoint, "state", slowly)
    ids, options = pack_ids(np.array([65], np.int32)), pack_options(RequestOptions(max_tokens=1), None)
    with endpoint(heartbeat_seconds=0.0001) as (_, parent):
        parent.settimeout(120)
        reader, counts = FrameReader(), [0]
        for id in range(1, 31):
            send(parent, m.Submit(id, ids, options, 0, True, (), None))
            ended = False
            while not ended:
                for body in reader.feed(parent.recv(1 << 16)):
                    message = m.decode_from_child(body)
                    if isinstance(message, m.Updates):
                        ended |= any(update.completion is not None for update in message.updates)
                    if isinstance(message, m.Heartbeat | m.Accepted | m.Updates) and message.state is not None:
                        counts.append(sum(message.state.metrics.finished.values()))
        assert counts == sorted(counts)
        assert counts[-1] == 30
