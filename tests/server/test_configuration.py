"""`erllama.toml`: what it may say, and how mistakes in it are reported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from erllama.errors import OptionError
from erllama.server.configuration import Configuration, read_configuration
from erllama.server.listening import ListenOptions
from erllama.server.options import ServerOptions


def read(tmp_path: Path, text: str, environment: Mapping[str, str] | None = None) -> Configuration:
    path = tmp_path / "erllama.toml"
    path.write_text(text)
    path.chmod(0o600)
    return read_configuration(path, environment or {})


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, "# nothing yet\n") == Configuration()


def test_options_reach_the_server(tmp_path: Path) -> None:
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
            if name == "state_dir":
                value = str(tmp_path)
            if name == "memory_limit":
                value = "12GiB"
            written = (
                str(value).lower() if isinstance(value, bool | int | float) else repr(value).replace("()", "[]")
            )
            found = read(tmp_path, f"[server]\n{name} = {written}\n")
            assert {**found.server, **found.listen} == {name: value}


def test_paths_start_at_the_folder_of_the_file(tmp_path: Path) -> None:
    text = """
    [cache]
    disk = {"a" = "1GiB", "/b" = "2GiB"}
    ram_file = ["c"]
    [[models]]
    path = "models/x.gguf"
    """
    found = read(tmp_path, text)
    assert found.cache == {"disk": {str(tmp_path / "a"): "1GiB", "/b": "2GiB"}, "ram_file": [str(tmp_path / "c")]}
    assert found.models[0].path == tmp_path / "models/x.gguf"


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
    with pytest.raises(OptionError, match=r"line 1: .*chmod o-rw"):
        read_configuration(path, {})


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("[server\n", 1, "Expected"),
        ("x = 1\n", 1, "no option 'x'"),
        ("\n[modles]\npath = 1\n", 2, "did you mean 'models'"),
        ("[server]\n# a comment\nport = 1\nhots = 'x'\n", 4, "'hots'; did you mean 'host'"),
        ("[server]\nport = 700000\n", 2, "port=700000"),
        ("[server]\nport = '80'\n", 2, "port must be an integer"),
        ("[server]\ninsecure = 1\n", 2, "insecure must be True or False"),
        ("[server]\nallowed_hosts = 'x'\n", 2, "allowed_hosts must be a list"),
        ("[server]\nrestart_wait = -1\n", 2, "restart_wait=-1"),
        ("[server]\nkeys = []\n", 2, "no option 'keys'"),
        ("[server]\naccess_log = 1\n", 2, "access_log must be"),
        ("[cache]\ndisk_qouta = 1\n", 2, "did you mean 'disk_quota'"),
        ("[[models]]\nname = 'x'\n", 1, "a model needs a path"),
        ("[[models]]\npath = 'a'\n[[models]]\npath = 'b'\nnctx = 4\n", 5, "did you mean 'n_ctx'"),
        ("[[models]]\npath = 'a'\nname = ''\n", 3, "name must be a text"),
        ("[[models]]\npath = 'a'\naliases = 'b'\n", 3, "aliases must be a list"),
        ("[[models]]\npath = 'a'\ncache = 'b'\n", 3, "no option 'cache'"),
        ("[[models]]\npath = 'a'\nload = 'later'\n", 3, "load='later'"),
        ("[[models]]\npath = 'a'\nkeep_alive = '5 parsecs'\n", 3, "keep_alive='5 parsecs'"),
        ("[server]\nmemory_limit = '12 apples'\n", 2, "memory_limit='12 apples'"),
        ("[server]\nmemory_limit = 0\n", 2, "memory_limit is 0"),
        ("[server]\nmodel_keep_alive = true\n", 2, "model_keep_alive=True"),
        ("[server]\nmemory_pressure = 2\n", 2, "memory_pressure=2"),
        ("[[keys]]\nname = 'x'\n", 1, "a key needs one of key, key_env, key_file"),
        ("[[keys]]\nkey = 'x'\nkey_env = 'X'\n", 2, "a key needs one of"),
        ("[[keys]]\nkey = 'x'\nrequests_per_minute = 0\n", 3, "requests_per_minute=0"),
        ("[[keys]]\nkey = 'x'\nmodel = 'm'\n", 3, "did you mean 'models'"),
        ("[[keys]]\nkey = 7\n", 2, "key must be a text"),
        ("[[keys]]\nkey_env = 'MISSING'\n", 2, "MISSING is not set"),
        ("[[keys]]\nkey = 'k'\nname = 7\n", 3, "name must be a text"),
    ],
)
def test_mistakes_are_reported_with_their_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    with pytest.raises(OptionError) as error:
        read(tmp_path, text)
    assert str(error.value).startswith(str(tmp_path / "erllama.toml"))
    assert f"line {line}" in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["server = 1\n", "models = 1\n", "models = [1]\n", "keys = {}\n"])
def test_sections_of_the_wrong_kind_are_errors(tmp_path: Path, text: str) -> None:
    with pytest.raises(OptionError, match="must be a"):
        read(tmp_path, text)
