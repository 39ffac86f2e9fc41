"""RPC devices: the same replies as on this machine, and a server that is lost and comes back."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import erllama
from erllama import llama_ffi
from erllama.engine import Batch, PackedBlock
from erllama.engine.backends import llama_weights
from erllama.testing.models import TINY, write_llama
from support.engine_models import random_prompt
from support.recording_backend import llama_backend
from support.rpc import RpcServer, needs_rpc, rpc_server
from support.subprocesses import must_run

PROMPT = random_prompt(1, 300)
GREEDY = {"max_tokens": 24, "temperature": 0.0}
_COUNT_DEVICES = 15  # RPC_CMD_DEVICE_COUNT; its input is empty


@pytest.fixture
def server() -> Iterator[RpcServer]:
    with rpc_server() as started:
        yield started


def load(path: Path, server: RpcServer, **options: object) -> erllama.Model:
    defaults = {"cache": erllama.Cache(block_size=64), "n_ctx": 1024, "n_threads": 1}
    return erllama.load_model(path, rpc_servers=[server.address], **{**defaults, **options})  # type: ignore[arg-type]


def _connection_to(address: str) -> socket.socket:
    """Return a duplicate of this process's connection to a server."""
    for fd in range(3, 1024):
        with suppress(OSError):
            found = socket.socket(fileno=os.dup(fd))
            with suppress(OSError):
                if "{}:{}".format(*found.getpeername()) == address:
                    return found
            found.close()
    raise AssertionError(f"no connection to {address}")


def _is_open(connection: socket.socket) -> bool:
    """Return whether the other side has not closed a connection. Drops what it has sent."""
    connection.setblocking(False)
    try:
        while connection.recv(4096):
            pass
    except BlockingIOError:
        return True
    return False


@pytest.fixture
def expected(tiny_gguf: Path) -> erllama.Completion:
    """The reply on this machine, from a cold context."""
    with (
        erllama.Cache(ram=0) as none,
        erllama.load_model(tiny_gguf, devices=[], cache=none, n_ctx=1024, n_threads=1) as model,
    ):
        return model.complete(PROMPT, **GREEDY)


# --- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("servers", "message"),
    [
        ("127.0.0.1:50052", "pass a list of servers"),
        (["127.0.0.1"], "is not a host with a port"),
        (["127.0.0.1:0"], "is not a host with a port"),
        (["127.0.0.1:65536"], "is not a host with a port"),
        (["a b:1"], "is not a host with a port"),
        ([50052], "is not a host with a port"),
    ],
)
def test_servers_that_are_not_addresses_are_refused(tiny_gguf: Path, servers: object, message: str) -> None:
    with pytest.raises(erllama.OptionError, match=message):
        erllama.load_model(tiny_gguf, rpc_servers=servers)  # type: ignore[arg-type]


@pytest.mark.skipif(needs_rpc.args[0] is False, reason="this libllama was built with RPC")
def test_a_build_without_rpc_says_how_to_get_it(tiny_gguf: Path) -> None:
    with pytest.raises(erllama.OptionError, match="make setup RPC=1"):
        erllama.load_model(tiny_gguf, rpc_servers=["127.0.0.1:50052"])


@needs_rpc
def test_a_port_where_no_server_listens_is_reported(tiny_gguf: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(erllama.ServerLost, match=rf"{address} cannot be used.*Start `rpc-server`"):
            erllama.load_model(tiny_gguf, rpc_servers=[address])


@needs_rpc
def test_a_server_of_another_protocol_is_reported(tiny_gguf: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.recv(64)

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(erllama.ServerLost, match="not as an RPC server of this version"):
            erllama.load_model(tiny_gguf, rpc_servers=[address])
        thread.join()


@needs_rpc
def test_a_server_that_serves_another_process_is_reported(tiny_gguf: Path, server: RpcServer) -> None:
    code = """
        import sys, erllama
        try:
            erllama.load_model(sys.argv[1], rpc_servers=[sys.argv[2]])
        except erllama.ServerLost as error:
            print("one process at a time" in str(error))
    """
    with load(tiny_gguf, server):
        assert must_run(code, tiny_gguf, server.address).split() == ["True"]
    load_and_unload = "import sys, erllama; erllama.load_model(sys.argv[1], rpc_servers=sys.argv[2:]).unload()"
    must_run(load_and_unload, tiny_gguf, server.address)


@needs_rpc
def test_devices_of_a_server_are_used_by_name_or_by_default(tiny_gguf: Path, server: RpcServer) -> None:
    with load(tiny_gguf, server) as model:
        (remote,) = [device for device in erllama.devices() if device.description == server.address]
        assert model.info.devices == (remote.name, "CPU")
        assert remote.total_bytes > 0
        places = {buffer.place for buffer in model.info.buffers if buffer.holds == "kv"}
        assert places == {f"RPC0[{server.address}]"}
    with load(tiny_gguf, server, devices=[remote.name]) as model:
        assert model.info.devices == (remote.name, "CPU")
    # A model that names neither servers nor devices stays on this machine.
    if os.environ.get("ERLLAMA_TEST_RPC") != "1":
        with erllama.load_model(tiny_gguf, n_ctx=256, n_threads=1) as model:
            assert not any(name.startswith("RPC") for name in model.info.devices)


@needs_rpc
def test_listing_devices_does_not_connect_to_unused_servers(tiny_gguf: Path, server: RpcServer) -> None:
    load(tiny_gguf, server).unload()
    server.kill()
    host, _, port = server.address.partition(":")
    with socket.create_server((host, int(port))) as silent:
        silent.setblocking(False)
        (device,) = [device for device in erllama.devices() if device.description == server.address]
        assert (device.kind, device.total_bytes) == ("gpu", 0)
        with pytest.raises(BlockingIOError):
            silent.accept()


# --- the same computations -----------------------------------------------------------------------


@needs_rpc
@pytest.mark.parametrize("flash_attn", [True, False])
def test_every_kind_of_hit_gives_the_reply_of_this_machine(
    tiny_gguf: Path, server: RpcServer, expected: erllama.Completion, flash_attn: bool
) -> None:
    with load(tiny_gguf, server, flash_attn=flash_attn) as model:
        cold = model.complete(PROMPT, **GREEDY)
        live = model.complete(PROMPT, **GREEDY)
        model.evict()
        stored = model.complete(PROMPT, **GREEDY)
        model.evict()
        partial = model.complete(PROMPT[:200], **GREEDY)
        assert [c.cache.kind for c in (cold, live, stored, partial)] == ["cold", "exact", "exact", "exact"]
        assert (live.cache.tier, stored.cache.tier) == ("live", "ram")
        assert cold.tokens == live.tokens == stored.tokens == expected.tokens


@needs_rpc
def test_packed_kv_is_the_kv_of_this_machine_and_restores_it(tiny_gguf: Path, server: RpcServer) -> None:
    local = llama_backend(tiny_gguf, devices=[], n_sequences=3)
    remote = llama_backend(tiny_gguf, rpc_servers=[server.address], n_sequences=3)
    try:
        rows = np.arange(len(PROMPT), dtype=np.int32)
        output = (rows == rows[-1]).astype(np.int8)
        batch = Batch(PROMPT, rows, np.zeros_like(rows), output)
        np.testing.assert_array_equal(remote.decode(batch).copy(), local.decode(batch))
        packed = remote.pack(0, 0, 256)
        np.testing.assert_array_equal(packed, local.pack(0, 0, 256))
        remote.restore(1, 0, 256, memoryview(packed))
        np.testing.assert_array_equal(remote.pack(1, 0, 256), packed)
        remote.share(1, 2, 256)
        rest = Batch(PROMPT[256:], rows[256:], np.full(len(rows) - 256, 2, np.int32), output[256:])
        local.cut(0, 256)
        again = Batch(PROMPT[256:], rows[256:], np.zeros(len(rows) - 256, np.int32), output[256:])
        np.testing.assert_array_equal(remote.decode(rest).copy(), local.decode(again))
    finally:
        remote.close()
        local.close()


@needs_rpc
def test_embeddings_beside_replies_share_one_connection(tiny_gguf: Path, server: RpcServer) -> None:
    texts = ["one text", "another text, which is longer"]
    with erllama.load_model(tiny_gguf, devices=[], n_ctx=1024, n_threads=1) as model:
        rows, reply = model.embed(texts), model.complete(PROMPT, **{**GREEDY, "max_tokens": 100})
    with load(tiny_gguf, server) as model:
        stop = threading.Event()
        found: list[np.ndarray] = []

        def embed() -> None:
            while not stop.is_set():
                found.append(model.embed(texts))

        thread = threading.Thread(target=embed)
        thread.start()
        try:
            for _ in range(5):
                assert model.complete(PROMPT, **{**GREEDY, "max_tokens": 100}).tokens == reply.tokens
        finally:
            stop.set()
            thread.join()
        assert found
        for each in found:
            np.testing.assert_array_equal(each, rows)


# --- lost servers ----------------------------------------------------------------------------------


@needs_rpc
def test_a_server_restarted_while_idle_goes_unnoticed(
    tiny_gguf: Path, server: RpcServer, expected: erllama.Completion
) -> None:
    with load(tiny_gguf, server) as model:
        assert model.complete(PROMPT, **GREEDY).tokens == expected.tokens
        model.evict()
        model.complete(PROMPT, **GREEDY)  # parked: its cells are lost with the server
        server.restart()
        again = model.complete(PROMPT, **GREEDY)
        assert again.tokens == expected.tokens
        assert again.cache.tier == "ram"


@needs_rpc
def test_requests_fail_while_a_server_is_lost_and_work_once_it_is_back(
    tiny_gguf: Path, server: RpcServer, expected: erllama.Completion
) -> None:
    with load(tiny_gguf, server) as model:
        model.complete(PROMPT, **GREEDY)
        server.kill()
        for _ in range(3):
            with pytest.raises(erllama.ServerLost, match=server.address):
                model.complete(PROMPT, **GREEDY)
        with pytest.raises(erllama.ServerLost):
            model.embed(["a text"])
        assert model.detokenize(model.tokenize("still here")) == "still here"
        server.start()
        assert model.complete(PROMPT, **GREEDY).tokens == expected.tokens
        assert model.embed(["a text"]).shape[0] == 1


@needs_rpc
def test_a_server_lost_during_replies_fails_them_and_no_others(
    tiny_gguf: Path, server: RpcServer, expected: erllama.Completion
) -> None:
    with (
        load(tiny_gguf, server, n_seq_max=2) as model,
        erllama.load_model(tiny_gguf, devices=[], n_ctx=1024, n_threads=1) as other,
    ):
        replies = [model.stream(PROMPT[i:], max_tokens=600, stop=[]) for i in range(3)]
        first = iter(replies[0])
        next(first)
        server.kill()
        for reply in replies:
            with pytest.raises(erllama.ServerLost):
                reply.result()
        assert other.complete(PROMPT, **GREEDY).tokens == expected.tokens
        server.start()
        assert model.complete(PROMPT, **GREEDY).tokens == expected.tokens


@needs_rpc
def test_saves_of_a_lost_server_are_dropped_not_stored(tiny_gguf: Path, server: RpcServer) -> None:
    backend = llama_backend(tiny_gguf, rpc_servers=[server.address], n_sequences=2)
    try:
        rows = np.arange(64, dtype=np.int32)
        backend.decode(Batch(PROMPT[:64], rows, np.zeros_like(rows), np.zeros(64, np.int8)))
        payload = backend.pack(0, 0, 64)
        blocks = [PackedBlock(at, at + 32, memoryview(backend.pack(0, at, at + 32))) for at in (0, 32)]
        server.kill()
        with pytest.raises(erllama.ServerLost):
            backend.pack(0, 0, 64)
        with suppress(erllama.ServerLost):  # what is restored is sent without an answer
            backend.restore(1, 0, 64, memoryview(payload))
        backend.drop(1)
        with suppress(erllama.ServerLost):
            backend.restore_blocks(1, blocks)  # joined
        with pytest.raises(erllama.ServerLost):
            backend.decode(Batch(PROMPT[:1], rows[:1] + 64, rows[:1] + 1, np.ones(1, np.int8)))
        assert backend.memory_lost
        with pytest.raises(erllama.ServerLost):
            backend.recover()
        server.start()
        backend.recover()
        backend.clear()
        assert not backend.memory_lost
        backend.restore(0, 0, 64, memoryview(payload))
        np.testing.assert_array_equal(backend.pack(0, 0, 64), payload)
        backend.restore_blocks(1, blocks)
        assert backend.pack(1, 0, 64).tobytes()[16:] == payload.tobytes()[16:]
    finally:
        backend.close()


@needs_rpc
def test_blocks_joined_for_a_lost_server_raise(tiny_gguf: Path, server: RpcServer) -> None:
    backend = llama_backend(tiny_gguf, rpc_servers=[server.address], n_sequences=2)
    try:
        rows = np.arange(64, dtype=np.int32)
        backend.decode(Batch(PROMPT[:64], rows, np.zeros_like(rows), np.zeros(64, np.int8)))
        blocks = [PackedBlock(i, i + 16, memoryview(backend.pack(0, i, i + 16))) for i in range(0, 64, 16)]
        server.kill()

        def restore() -> None:
            for _ in range(100):  # what is restored is sent without an answer
                backend.restore_blocks(1, blocks)
                backend.drop(1)

        with pytest.raises(erllama.ServerLost):
            restore()
        server.start()
        backend.recover()
        backend.clear()
        backend.restore_blocks(1, blocks)
        for block in blocks:
            np.testing.assert_array_equal(backend.pack(1, block.start, block.end), block.payload)
    finally:
        backend.close()


@needs_rpc
def test_a_signal_does_not_end_the_connection(tiny_gguf: Path, server: RpcServer) -> None:
    signals: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: signals.append(number))
    backend = llama_backend(tiny_gguf, rpc_servers=[server.address], n_sequences=2)
    done = threading.Event()

    def interrupt(thread: int) -> None:
        while not done.wait(0.0005):
            signal.pthread_kill(thread, signal.SIGUSR1)

    thread = threading.Thread(target=interrupt, args=[threading.get_ident()])
    thread.start()
    try:
        rows = np.arange(len(PROMPT), dtype=np.int32)
        batch = Batch(PROMPT, rows, np.zeros_like(rows), np.ones(len(rows), np.int8))
        for _ in range(10):
            backend.decode(batch)
            backend.drop(0)
        assert signals
    finally:
        done.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)
        backend.close()


@needs_rpc
def test_a_broken_connection_to_a_running_server_is_made_again(tiny_gguf: Path, server: RpcServer) -> None:
    backend = llama_backend(tiny_gguf, rpc_servers=[server.address], n_sequences=2)
    try:
        with _connection_to(server.address) as connection:
            connection.sendall(bytes([_COUNT_DEVICES]) + bytes(8))  # an answer that the client does not expect
        one = np.zeros(1, np.int32)
        with pytest.raises(erllama.ServerLost):
            backend.decode(Batch(one, one, one, np.ones(1, np.int8)))
        backend.recover()
        backend.clear()
        backend.decode(Batch(one, one, one, np.ones(1, np.int8)))
    finally:
        backend.close()


@needs_rpc
def test_a_server_that_does_not_answer_delays_no_users_of_others(tiny_gguf: Path, server: RpcServer) -> None:
    model = llama_backend(tiny_gguf, rpc_servers=[server.address], n_sequences=2)
    silent = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{silent.getsockname()[1]}"

    def connect() -> None:
        with suppress(llama_ffi.ServerError):
            llama_ffi.add_rpc_server(address)

    thread = threading.Thread(target=connect)
    thread.start()
    try:
        connection, _ = silent.accept()
        with connection:
            assert connection.recv(1)  # the client now waits for an answer
            assert llama_ffi.rpc_connection(server.address)
            assert _is_open(connection)  # it still waits
    finally:
        silent.close()
        thread.join()
        model.close()


@needs_rpc
def test_a_block_is_not_blamed_for_a_server_that_embeddings_found_lost(tiny_gguf: Path, server: RpcServer) -> None:
    backend = llama_backend(tiny_gguf, rpc_servers=[server.address], n_sequences=2)
    embedder = backend.embedder()
    try:
        rows = np.arange(64, dtype=np.int32)
        backend.decode(Batch(PROMPT[:64], rows, np.zeros_like(rows), np.zeros(64, np.int8)))
        payload = memoryview(backend.pack(0, 0, 64))
        server.restart()
        embedder.embed([PROMPT[:8]], "mean")  # connects, and loads the weights again
        with pytest.raises(erllama.ServerLost):
            backend.restore(1, 0, 64, payload)
        assert backend.memory_lost
        backend.recover()
        backend.clear()
        backend.restore(1, 0, 64, payload)
    finally:
        embedder.close()
        backend.close()


@needs_rpc
def test_adapters_are_loaded_again_with_the_model(tiny_gguf: Path, server: RpcServer, loras: list[Path]) -> None:
    with load(tiny_gguf, server) as model:
        plain = model.complete(PROMPT, **GREEDY)
        adapter = model.load_adapter(loras[0])
        adapted = model.complete(PROMPT, **GREEDY)
        assert adapted.tokens != plain.tokens
        server.restart()
        assert model.complete(PROMPT, **GREEDY).tokens == adapted.tokens
        adapter.unload()
        assert model.complete(PROMPT, **GREEDY).tokens == plain.tokens


@needs_rpc
def test_a_changed_file_is_not_loaded_in_place_of_the_lost_one(
    tiny_gguf: Path, server: RpcServer, tmp_path: Path
) -> None:
    copy = tmp_path / "model.gguf"
    shutil.copy(tiny_gguf, copy)
    with load(copy, server) as model:
        model.complete(PROMPT, **GREEDY)
        shutil.copy(tiny_gguf, tmp_path / "other.gguf")
        (tmp_path / "other.gguf").replace(copy)
        server.restart()
        with pytest.raises(erllama.BackendError, match="was changed since it was loaded"):
            model.complete(PROMPT, **GREEDY)


@needs_rpc
def test_a_server_lost_during_a_load_is_reported(
    tiny_gguf: Path, server: RpcServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_native = llama_ffi.LlamaModel.__init__

    def load_after_crash(self: llama_ffi.LlamaModel, *args: object, **options: object) -> None:
        server.kill()
        load_native(self, *args, **options)  # type: ignore[arg-type]

    with rpc_server() as kept, load(tiny_gguf, kept) as model:
        monkeypatch.setattr(llama_weights.llama_ffi.LlamaModel, "__init__", load_after_crash)
        with pytest.raises(erllama.ServerLost):
            load(tiny_gguf, server)
        monkeypatch.undo()
        model.complete(PROMPT, **GREEDY)


@needs_rpc
def test_a_model_on_two_servers_survives_the_loss_of_one(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model.gguf", replace(TINY, n_layer=4), seed=1)
    with rpc_server() as first, rpc_server() as second, erllama.Cache(ram=0) as none:
        servers = [first.address, second.address]
        with erllama.load_model(path, devices=[], cache=none, n_ctx=1024, n_threads=1) as model:
            expected = model.complete(PROMPT, **GREEDY).tokens
        with erllama.load_model(
            path, rpc_servers=servers, tensor_split=[1, 1], cache=none, n_ctx=1024, n_threads=1
        ) as model:
            assert len({buffer.place for buffer in model.info.buffers if buffer.holds == "kv"}) == 2
            assert model.complete(PROMPT, **GREEDY).tokens == expected
            second.restart()
            assert model.complete(PROMPT, **GREEDY).tokens == expected
