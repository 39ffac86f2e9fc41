"""`erllama.toml`: what it may say. `test_check.py` has mistakes in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from erllama.server.settings.configuration import Configuration, read_configuration
from erllama.server.settings.listening import ListenOptions
from erllama.server.settings.options import ServerOptions


def read_any(tmp_path: Path, text: str, environment: Mapping[str, str] | None = None) -> Configuration:
    path = tmp_path / "erllama.toml"
    path.write_text(text)
    path.chmod(0o600)
    return read_configuration(path, environment or {})


def read(tmp_path: Path, text: str, environment: Mapping[str, str] | None = None) -> Configuration:
    """Return the content of a file without mistakes."""
    found = read_any(tmp_path, text, environment)
    assert found.mistakes == ()
    return found


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, "# nothing yet\n") == Configuration()


def test_options_reach_the_server(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    text = """
    [server]
    host = "::1"
    port = 9000
    header_timeout = 5
    allowed_hosts = ["models.example"]
    max_body_bytes = "8MiB"
    restart_wait = 2.5
    access_log = "logs/access.jsonl"
    """
    found = read(tmp_path, text)
    listen = ListenOptions(**found.listen)  # type: ignore[arg-type]
    options = ServerOptions.of(found.server)
    assert (listen.host, listen.port, listen.header_timeout) == ("::1", 9000, 5)
    assert (options.allowed_hosts, options.max_body_bytes, options.restart_wait) == (
        ("models.example",),
        8 << 20,
        2.5,
    )
    assert found.access_log == str(tmp_path / "logs/access.jsonl")


def test_every_option_of_the_server_can_be_set(tmp_path: Path) -> None:
    for options in (ServerOptions(), ListenOptions()):
        for name in options.__slots__:
            value = getattr(options, name)
            if name == "keys":
                continue
            if value is None:
                value = {"state_dir": str(tmp_path), "memory_limit": "1GiB"}[name]
            written = (
                str(value).lower() if isinstance(value, bool | int | float) else repr(value).replace("()", "[]")
            )
            found = read(tmp_path, f"[server]\n{name} = {written}\n")
            assert {**found.server, **found.listen} == {name: value}


def test_paths_start_at_the_folder_of_the_file(tmp_path: Path, tiny_gguf: Path) -> None:
    text = f"""
    [server]
    state_dir = "state"
    [cache]
    disk = {{"a" = "1GiB", "{tmp_path}/b" = "2GiB"}}
    ram_file = ["c"]
    [[models]]
    path = "models/x.gguf"
    """
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "x.gguf").symlink_to(tiny_gguf)
    found = read(tmp_path, text)
    assert found.cache == {
        "disk": {str(tmp_path / "a"): "1GiB", str(tmp_path / "b"): "2GiB"},
        "ram_file": [str(tmp_path / "c")],
    }
    assert found.models[0].path == tmp_path / "models/x.gguf"
    assert found.server["state_dir"] == str(tmp_path / "state")


def test_keys_come_from_the_file_a_variable_or_another_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\ntwo\n")
    (tmp_path / "keys").chmod(0o600)
    text = """
    [[keys]]
    key = "plain"
    name = "laptop"
    cache_salt = "salt"
    requests_per_minute = 3
    tokens_per_minute = 4
    models = ["m"]
    [[keys]]
    key_env = "AGENT"
    [[keys]]
    key_file = "keys"
    models = []
    """
    laptop, agent, one, two = read(tmp_path, text, {"AGENT": "from-environment"}).keys
    assert (laptop.secret, laptop.name, laptop.cache_salt, laptop.models) == ("plain", "laptop", "salt", ("m",))
    assert (laptop.requests_per_minute, laptop.tokens_per_minute) == (3, 4)
    assert (agent.secret, agent.name, agent.models) == ("from-environment", "AGENT", None)
    assert [(key.secret, key.name, key.models) for key in (one, two)] == [
        ("one", "keys:1", ()),
        ("two", "keys:2", ()),
    ]
    assert "plain" not in repr(laptop)


def test_a_file_with_keys_that_all_users_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "erllama.toml"
    path.write_text('[[keys]]\nkey = "x"\n')
    path.chmod(0o604)
    (mistake,) = read_configuration(path, {}).mistakes
    assert mistake.line == 2
    assert "chmod o-rw" in mistake.message


@pytest.mark.parametrize("text", ["server = 1\n", "models = 1\n", "models = [1]\n", "keys = {}\n"])
def test_sections_of_the_wrong_kind_are_errors(tmp_path: Path, text: str) -> None:
    (mistake,) = read_any(tmp_path, text).mistakes
    assert mistake.line == 1
    assert "must be a" in mistake.message
