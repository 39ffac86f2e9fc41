"""SIGHUP reloads keys and models of `erllama serve`, and disturbs no request."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import erllama
from erllama.engine.backends.stub import StubBackend
from erllama.server.application import make_server
from erllama.server.reload import Reloader
from erllama.server.settings.settings import CommandOptions, read_settings
from support.cli import write_replying_model
from support.http_server import CHAT, JSON, ServeCommand, chat_body, read_until, request_bytes, serve_command
from support.pseudo_terminal import PseudoTerminal
from support.threads import in_threads, wait_until

N_CLIENTS, N_REQUESTS = 12, 10  # requests of each client


class Folder:
    """A folder with models, and a configuration that a test changes.

    Attributes:
        path: of the configuration.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "erllama.toml"
        write_replying_model(folder / "one.gguf", "Hi you")
        write_replying_model(folder / "two.gguf", "abc")
        write_replying_model(folder / "endless.gguf", "abcdefg", for_ever=True)

    def write(self, *sections: str) -> None:
        """Replace the configuration at once, as an editor does."""
        new = self.path.with_suffix(".new")
        new.write_text("\n".join(sections))
        new.chmod(0o600)
        new.rename(self.path)


def model(name: str) -> str:
    # With an alias: a single model without one answers under any name.
    return (
        f'[[models]]\npath = "{name}.gguf"\naliases = ["{name}s"]\nn_ctx = 2048\nn_threads = 1\nprocess = false\n'
    )


def key(secret: str, *options: str) -> str:
    return "\n".join(["[[keys]]", f'key = "{secret}"', f'name = "{secret}"', *options, ""])


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture
def start(tmp_path: Path, folder: Folder) -> Iterator[ServeCommand]:
    """A server of model `one`, for clients with the key "k"."""
    folder.write(model("one"), key("k"))
    with serve_command(tmp_path, "--config", folder.path, environment={"ERLLAMA_CACHE_DIR": ""}) as server:
        yield server


def reload(server: ServeCommand) -> str:
    """Send SIGHUP, and return what the server logs about it."""
    lines = reports(server)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(reports(server)) > len(lines))
    return reports(server)[len(lines)]


def reports(server: ServeCommand) -> list[str]:
    lines = server.log.read_text().splitlines()
    return [line for line in lines if line.startswith(("erllama: reloaded", "erllama: not reloaded"))]


def ask(server: ServeCommand, model: str = "one", key: str = "k") -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(server.url + CHAT, json=chat_body(model=model), headers=headers, timeout=120)


def n_reloads(server: ServeCommand, result: str, key: str = "k") -> float:
    text = httpx.get(server.url + "/metrics", headers={"x-api-key": key}, timeout=60).text
    name = f'erllama_reloads_total{{result="{result}"}} '
    return sum(float(line.removeprefix(name)) for line in text.splitlines() if line.startswith(name))


def open_stream(server: ServeCommand, model: str, n_tokens: int) -> socket.socket:
    """Send a request for a stream, and wait for its first token."""
    host, port = server.url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), timeout=120)
    body = chat_body(model=model, stream=True, max_tokens=n_tokens)
    client.sendall(request_bytes(body, headers={"authorization": "Bearer k"}))
    read_until(client, b'"content":"')
    return client


def test_an_added_model_answers_and_a_removed_one_does_not(start: ServeCommand, folder: Folder) -> None:
    assert ask(start, "two").status_code == 404
    folder.write(model("one"), model("two"), key("k"))
    assert "reloaded (models: 2, keys: 1, pins: 0)" in reload(start)
    assert ask(start, "two").json()["model"] == "two"
    folder.write(model("two"), key("k"))
    reload(start)
    assert ask(start, "one").status_code == 404
    assert ask(start, "two").status_code == 200


def test_a_stream_of_a_removed_model_finishes(start: ServeCommand, folder: Folder) -> None:
    folder.write(model("one"), model("endless"), key("k"))
    reload(start)
    with open_stream(start, "endless", 300) as client:
        folder.write(model("one"), key("k"))
        reload(start)
        assert ask(start, "endless").status_code == 404
        assert b'"finish_reason":"length"' in read_until(client, b"data: [DONE]")
    assert ask(start).status_code == 200


def test_a_removed_key_is_refused_and_its_stream_finishes(start: ServeCommand, folder: Folder) -> None:
    folder.write(model("one"), model("endless"), key("k"))
    reload(start)
    with open_stream(start, "endless", 300) as client:
        folder.write(model("one"), model("endless"), key("new"))
        reload(start)
        assert ask(start, key="k").status_code == 401
        assert ask(start, key="new").status_code == 200
        assert b'"finish_reason":"length"' in read_until(client, b"data: [DONE]")


def test_what_a_kept_key_has_used_is_remembered(start: ServeCommand, folder: Folder) -> None:
    limited = key("k", "requests_per_minute = 2")
    folder.write(model("one"), limited)
    reload(start)
    assert [ask(start).status_code for _ in range(2)] == [200, 200]
    folder.write(model("one"), limited, key("more"))
    reload(start)
    assert ask(start).status_code == 429
    assert ask(start, key="more").status_code == 200


def test_a_wrong_file_changes_nothing(start: ServeCommand, folder: Folder) -> None:
    folder.write(model("two"), key("new"), "[server]\nprot = 1\n")
    line = reload(start)
    assert f"not reloaded: {folder.path}, line 13: [server] has no option 'prot'" in line
    assert ask(start).status_code == 200
    assert (n_reloads(start, "ok"), n_reloads(start, "error")) == (0, 1)
    folder.path.unlink()
    assert "No such file" in reload(start)
    folder.write(model("two"), key("new"))
    reload(start)
    assert ask(start, "two", "new").status_code == 200
    assert (n_reloads(start, "ok", "new"), n_reloads(start, "error", "new")) == (1, 2)


def test_options_that_need_a_restart_are_named(start: ServeCommand, folder: Folder) -> None:
    folder.write(model("one"), key("k"), "[server]\nidle_timeout = 9\nslots = false\n[cache]\nram = '64MiB'\n")
    assert "restart the server to change idle_timeout, slots, cache.ram" in reload(start)
    assert httpx.get(start.url + "/slots", headers={"x-api-key": "k"}, timeout=60).status_code == 200


def test_reloads_under_load_lose_no_request(start: ServeCommand, folder: Folder) -> None:
    """Models and keys come and go every few milliseconds while clients use those that stay."""
    variants = [(), (model("two"),), (key("l"),), (model("two"), key("l", 'models = ["two"]'))]
    done = threading.Event()

    def send_signals() -> None:
        for variant in itertools.cycle(variants):
            folder.write(model("one"), key("k"), *variant)
            start.process.send_signal(signal.SIGHUP)
            if done.wait(0.005):
                return

    def client(number: int) -> None:
        connection = http.client.HTTPConnection(start.url.removeprefix("http://"), timeout=300)
        connection.connect()
        connection.auto_open = 0  # a connection that the server closes is an error
        for i in range(N_REQUESTS):
            body = chat_body(f"{number} {i}", model="one", stream=i % 2 == 1)
            connection.request("POST", CHAT, json.dumps(body), {"x-api-key": "k", **JSON})
            answer = connection.getresponse()
            text = answer.read().decode()
            assert answer.status == 200, text
            assert ("[DONE]" if i % 2 else '"Hi you"') in text
        connection.close()

    sender = threading.Thread(target=send_signals)
    sender.start()
    try:
        in_threads(client, N_CLIENTS)
    finally:
        done.set()
        sender.join()
    assert n_reloads(start, "ok") > 1
    assert n_reloads(start, "error") == 0
    assert "Traceback" not in start.log.read_text()


def test_the_last_key_stays_while_other_machines_can_connect(tmp_path: Path) -> None:
    path = tmp_path / "erllama.toml"
    path.write_text('[server]\nhost = "0.0.0.0"\n[[keys]]\nkey = "k"\n')
    path.chmod(0o600)
    started = read_settings(CommandOptions(config=path))
    with erllama.load_backend(StubBackend(), cache=erllama.Cache()) as model:
        server = make_server(model, started.options)
        reloader = Reloader(server, started, lambda: read_settings(CommandOptions(config=path)))
        path.write_text('[server]\nhost = "127.0.0.1"\n')  # of the next start alone

        async def reload_now() -> None:
            reloader.request()
            assert reloader._running is not None
            await reloader._running

        asyncio.run(reload_now())
        assert [key.secret for key in server.options.keys] == ["k"]


def test_the_service_manager_hears_of_each_state(tmp_path: Path, folder: Folder) -> None:
    address = str(tmp_path / "notify")
    folder.write(model("one"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(120)
        with serve_command(tmp_path, "--config", folder.path, environment={"NOTIFY_SOCKET": address}) as server:
            states = [manager.recv(4096).decode()]
            server.process.send_signal(signal.SIGHUP)
            states += [manager.recv(4096).decode() for _ in range(2)]
            server.stop()
            states.append(manager.recv(4096).decode())
    assert states[1].splitlines()[1].startswith("MONOTONIC_USEC=")
    assert [state.splitlines()[0] for state in states] == ["READY=1", "RELOADING=1", "READY=1", "STOPPING=1"]


def test_closing_its_terminal_stops_the_server(tmp_path: Path, folder: Folder) -> None:
    command = [sys.executable, "-m", "erllama", "serve", "--port", "0", str(folder.path.with_name("one.gguf"))]
    around = {"ERLLAMA_CACHE_DIR": str(tmp_path / "kv"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with PseudoTerminal([*command, "--in-process", "--threads", "1"], around) as terminal:
        terminal.wait_for("Hello", 120)  # the last line that it prints
        assert terminal.hang_up(120) == 0
