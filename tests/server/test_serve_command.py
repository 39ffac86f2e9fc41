"""`erllama serve` from its start to its exit: address, keys, log, restarts, signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import httpx
import pytest

from support.cli import Command, write_replying_model
from support.http_server import CHAT, chat_body, read_until, request_bytes, serve_command
from support.threads import wait_until

FAST = ("--threads", 1, "--n-ctx", 1024)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.delenv("ERLLAMA_API_KEY", raising=False)
    return Command(tmp_path, monkeypatch, capsys)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_replying_model(tmp_path / "little.gguf", "Hi you")


def endless(tmp_path: Path) -> Path:
    return write_replying_model(tmp_path / "endless.gguf", "abcdefg", for_ever=True)


def test_a_model_is_served_saved_and_found_after_a_restart(tmp_path: Path, path: Path) -> None:
    # New in every run: processes of models share a directory in memory, which outlives them.
    text = uuid.uuid4().hex + " a long text" * 40
    cached = []
    for _ in range(2):
        with serve_command(tmp_path, path, *FAST) as server:
            answer = httpx.post(server.url + CHAT, json=chat_body(text), timeout=120).json()
            assert answer["model"] == "little"
            assert answer["choices"][0]["message"]["content"] == "Hi you"
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            server.stop()
        (line,) = server.access_lines()
        assert (line["status"], line["model"], line["completion_tokens"]) == (200, "little", 6)
        assert line["computed_tokens"]
        assert "long text" not in server.log.read_text()
    assert cached[0] < 50
    assert cached[1] > 400


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_finish(tmp_path: Path, path: Path, number: signal.Signals) -> None:
    slow = endless(tmp_path)
    with serve_command(tmp_path, slow, *FAST, "--in-process") as server:
        address = server.url.removeprefix("http://").split(":")
        client = socket.create_connection((address[0], int(address[1])), timeout=120)
        client.sendall(request_bytes(chat_body(stream=True, max_tokens=300)))
        read_until(client, b'"content":"')
        server.process.send_signal(number)
        received = read_until(client, b"data: [DONE]")
        assert b'"finish_reason":"length"' in received
        client.close()
        assert server.process.wait(120) == 0
    with pytest.raises(OSError):
        socket.create_connection((address[0], int(address[1])), timeout=5)


def test_requests_that_outlast_their_time_end_with_an_error_event(tmp_path: Path) -> None:
    config = tmp_path / "erllama.toml"
    config.write_text("[server]\nshutdown_seconds = 0.3\n")
    slow = endless(tmp_path)
    with serve_command(tmp_path, slow, "--threads", 1, "--n-ctx", 60000, "--config", config) as server:
        address = server.url.removeprefix("http://").split(":")
        client = socket.create_connection((address[0], int(address[1])), timeout=120)
        client.sendall(request_bytes(chat_body(stream=True)))
        read_until(client, b'"content":"')
        server.process.send_signal(signal.SIGTERM)
        received = read_until(client, b"0\r\n\r\n")
        assert b'"model_unavailable"' in received
        client.close()
        assert server.process.wait(120) == 0


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path, path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# for the agent\nkey-first\n\nkey-second\n")
    keys.chmod(0o600)
    around = {"ERLLAMA_API_KEY": "third"}
    with serve_command(tmp_path, path, *FAST, "--api-key-file", keys, environment=around) as server:
        for key, status in (
            ("key-first", 200),
            ("key-second", 200),
            ("third", 200),
            ("# for the agent", 401),
            ("", 401),
        ):
            answer = httpx.post(
                server.url + CHAT, json=chat_body(max_tokens=1), headers={"x-api-key": key}, timeout=60
            )
            assert answer.status_code == status
        server.stop()
    assert [line["key"] for line in server.access_lines() if "key" in line] == [
        "keys:2",
        "keys:4",
        "ERLLAMA_API_KEY",
    ]
    assert "key-first" not in server.log.read_text()


def test_a_configuration_file_sets_models_keys_cache_and_server(tmp_path: Path, path: Path) -> None:
    config = tmp_path / "erllama.toml"
    config.write_text(
        f"""
        [server]
        access_log = "access.jsonl"
        log_prompts = true

        [cache]
        disk = "prompts"
        ram = "64MiB"

        [[models]]
        path = "little.gguf"
        name = "tiny"
        aliases = ["gpt-4o"]
        n_ctx = 512
        n_threads = 1
        process = false

        [[models]]
        path = "{endless(tmp_path).name}"
        n_threads = 1

        [[keys]]
        key_env = "AGENT"
        models = ["tiny"]
        """
    )
    around = {"AGENT": "secret", "ERLLAMA_CACHE_DIR": ""}  # the variable would override the file
    with serve_command(tmp_path, "--config", config, "--n-ctx", 1024, environment=around) as server:

        def ask(model: str) -> httpx.Response:
            return httpx.post(
                server.url + CHAT,
                json=chat_body("what I wrote", model=model, max_tokens=1),
                headers={"authorization": "Bearer secret"},
                timeout=60,
            )

        assert ask("gpt-4o").json()["model"] == "tiny"
        assert ask("endless").status_code == 403
        assert ask("other").status_code == 404
        server.stop()
    assert (tmp_path / "prompts" / "index.db").exists()
    assert (tmp_path / "access.jsonl").stat().st_mode & 0o777 == 0o600  # it has prompts
    lines = [json.loads(line) for line in (tmp_path / "access.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == [200, 403, 404]
    assert lines[0]["key"] == "AGENT"
    assert lines[0]["prompt"] == [{"role": "user", "content": "what I wrote"}]


def test_an_address_of_others_needs_a_key(command: Command, path: Path) -> None:
    result = command("serve", path, "--host", "0.0.0.0")
    assert result.status == 1
    assert "there is no key; pass --api-key-file" in result.err


def test_a_key_file_that_all_users_can_read_is_refused(command: Command, path: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("key\n")
    keys.chmod(0o644)
    assert "chmod o-rw" in command("serve", path, "--api-key-file", keys).err
    keys.chmod(0o640)
    keys.write_text("# none\n")
    assert "has no key" in command("serve", path, "--api-key-file", keys).err


def test_mistakes_are_reported_before_a_model_is_loaded(command: Command, tmp_path: Path, path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = command("serve", path, "--port", port)
        assert (result.status, f"port {port}" in result.err) == (1, True)
    assert "does not exist" in command("serve", tmp_path / "none.gguf").err
    assert command("serve", path, "--port", 70000).status == 2
    config = tmp_path / "erllama.toml"
    config.write_text("[server]\nprot = 1\n")
    assert "line 2: [server] has no option 'prot'; did you mean 'port'?" in command("serve", "--config", config).err


def test_a_server_goes_on_when_its_output_is_closed(tmp_path: Path, path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    around = {**os.environ, "ERLLAMA_CACHE_DIR": str(tmp_path / "kv"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "erllama", "serve", str(path), "--port", str(port), "--in-process"]
    with subprocess.Popen([*command, *map(str, FAST)], stdout=writer, env=around) as server:
        os.close(writer)

        def answers() -> bool:
            assert server.poll() is None
            try:
                return httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code == 200
            except httpx.ConnectError:
                return False

        wait_until(answers, 120)
        server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 0
