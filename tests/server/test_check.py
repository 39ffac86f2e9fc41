"""`erllama serve --check`: each mistake in a configuration is reported with its line, and `serve` refuses it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from erllama.server.settings.mistakes import ConfigurationError
from erllama.server.settings.settings import CommandOptions, read_settings
from erllama.server.settings.toml_lines import toml_lines
from support.cli import Command

# In each file, "#! text" at the end of a line says that the line has a mistake whose message has this text.
BROKEN = {
    "a header without its end": "[cache]\n[server #! Expected\nport = 1\n",
    "a text without its end": '[server]\nport = 1\nhost = "x #! Illegal\n',
    "an option twice": "[server]\nport = 1\n\nport = 2 #! Cannot overwrite\n",
    "unknown sections and options": """
        color = 1  #! no option 'color'
        [server]
        prot = 1  #! did you mean 'port'
        port = 2
        keys = []  #! no option 'keys'
        [modles]  #! did you mean 'models'
        [cache]
        tiers = []  #! no option 'tiers'
        """,
    "values of the server that are out of range": """
        [server]
        port = 700000  #! port=700000
        restart_wait = -1  #! restart_wait=-1
        max_json_depth = 0  #! max_json_depth=0
        max_body_bytes = "much"  #! max_body_bytes='much'
        body_timeout = 5
        header_timeout = 0  #! header_timeout=0
        """,
    "values of the server of the wrong type": """
        [server]
        insecure = 1  #! insecure must be True or False
        port = "80"  #! port must be an integer
        host = ""  #! host must be an address
        allowed_hosts = "models.example"  #! allowed_hosts must be a list
        access_log = 1  #! access_log must be a path
        log_prompts = "yes"  #! log_prompts must be True or False
        """,
    "memory and times of models": """
        [server]
        memory_limit = "12 apples"  #! memory_limit='12 apples'
        model_keep_alive = true  #! model_keep_alive=True
        memory_pressure = 2  #! memory_pressure=2
        [[models]]
        path = "good.gguf"
        load = "later"  #! load='later'
        keep_alive = "5 parsecs"  #! keep_alive='5 parsecs'
        """,
    "a log in a folder that does not exist": """
        [server]
        access_log = "nowhere/access.jsonl"  #! nowhere is not a directory
        """,
    "an address of others without a key": """
        [server]
        port = 1
        host = "0.0.0.0"  #! there is no key
        """,
    "options of the cache": """
        [cache]
        disk = "prompts"
        disk_quota = "many"  #! disk_quota='many'
        ram = -1  #! ram=-1
        block_size = 100  #! power of two
        watch = "no"  #! watch must be True or False
        disk_qouta = 1  #! did you mean 'disk_quota'
        """,
    "directories of the cache in one another": """
        [cache]
        ram = "64MiB"
        disk = ["prompts", "prompts/more"]  #! one lies in the other
        """,
    "a directory of the cache that is a file": """
        [cache]
        disk = "text.gguf/prompts"  #! is not a directory
        ram_file = "good.gguf"  #! is not a directory
        """,
    "options of memory pressure in a section of their own": """
        [cache]
        disk = "prompts"

        [cache.pressure]
        interval = 3
        high_watermark = 2  #! high_watermark=2
        """,
    "files of models": """
        [[models]]
        path = "good.gguf"
        [[models]]
        path = "missing.gguf"  #! does not exist
        [[models]]
        name = "text"
        path = "text.gguf"  #! is not a GGUF file
        [[models]]
        path = "cut.gguf"  #! cannot be loaded
        [[models]]
        path = "folder"  #! is a directory
        [[models]]  #! a model needs a path
        name = "none"
        [[models]]
        path = "some-00001-of-00002.gguf"  #! some-00002-of-00002.gguf does not exist
        """,
    "options of models": """
        [[models]]
        path = "good.gguf"
        nctx = 4096  #! did you mean 'n_ctx'
        n_ctx = 0  #! n_ctx=0
        n_threads = "two"  #! n_threads must be an integer
        kv_type_k = "q9"  #! kv_type_k='q9'
        cache = "x"  #! no option 'cache'

        [[models]]
        path = "good.gguf"
        name = ""  #! name must be a text
        aliases = "b"  #! aliases must be a list
        mmap = 1  #! mmap must be True or False
        """,
    "options of models that contradict each other": """
        [[models]]
        path = "good.gguf"
        flash_attn = false
        kv_type_v = "q8_0"  #! needs flash attention
        [[models]]
        path = "good.gguf"
        name = "other"
        rope_scaling = "linear"
        yarn_orig_ctx = 4096  #! has no effect
        n_ctx = 512
        parked_cells = 4096  #! parked_cells=4096
        """,
    "options of a model's policy and process": """
        [[models]]
        path = "good.gguf"
        policy = { min_tokens = -1 }  #! min_tokens=-1
        [models.process]
        restart = 3  #! process has no option 'restart'
        """,
    "names of models": """
        [[models]]
        path = "good.gguf"
        aliases = ["gpt-4o", "*"]
        [[models]]
        path = "good.gguf"  #! two models have the name 'good'
        [[models]]
        name = "gpt-4o"  #! two models have the name 'gpt-4o'
        path = "good.gguf"
        [[models]]
        path = "good.gguf"
        name = "chat"
        aliases = ["*"]  #! two models have the name '*'
        """,
    "sources of keys": """
        [[keys]]  #! a key needs one of key, key_env, key_file
        name = "none"
        [[keys]]
        name = "both"
        key = "a"  #! a key needs one of key, key_env, key_file
        key_env = "A"
        [[keys]]
        key = 7  #! key must be a text
        [[keys]]
        key = "schlüssel"  #! not ASCII
        [[keys]]
        name = "unset"
        key_env = "MISSING_KEY"  #! MISSING_KEY is not set
        """,
    "files of keys": """
        [[keys]]
        name = "read by all"
        key_file = "open-keys"  #! chmod o-rw
        [[keys]]
        key_file = "no-keys"  #! has no key
        [[keys]]
        key_file = "missing-keys"  #! No such file
        [[keys]]
        key_file = "good-keys"
        """,
    "limits of keys": """
        [[keys]]
        key = "a"
        requests_per_minute = 0  #! requests_per_minute=0
        model = "good"  #! did you mean 'models'
        [[keys]]
        key = "b"
        tokens_per_minute = "many"  #! tokens_per_minute must be an integer
        name = 7  #! name must be a text
        [[keys]]
        key = "a"  #! two keys are equal
        """,
    "models of keys": """
        [[models]]
        path = "good.gguf"
        name = "chat"
        aliases = ["gpt-4o"]
        [[keys]]
        key_file = "good-keys"
        models = ["chat", "gpt-4o"]  #! has the model 'gpt-4o'; the server has chat
        [[keys]]
        key = "b"
        models = "chat"  #! models must be a list
        """,
    "lines that look like options": '''
        [server]
        allowed_hosts = [
            "a.example",  # port = 1
            """
        port = 700000
        """,
        ]
        "port" = 700000  #! port=700000
        [[keys]]
        name = """
        [[keys]]
        key = 7
        """
        key = 8  #! key must be a text
        [models]  #! models must be a list of sections
        ''',
    "entries in one line": """
        server.port = 8080
        server.hots = "x"  #! did you mean 'host'
        keys = [{ key = "a" }, { key = 7 }]  #! key must be a text
        models = [
            { path = "good.gguf", nctx = 1 },
        ]
        """,
    "mistakes in every section": """
        [server]
        port = -1  #! port=-1
        host = "0.0.0.0"
        [cache]
        ram = "x"  #! ram='x'
        [[models]]
        path = "good.gguf"
        n_batch = 0  #! n_batch=0
        [[keys]]
        key_env = "MISSING_KEY"  #! is not set
        """,
}
# The value starts on the line of `models`, and TOML's parser gives no other.
BROKEN["entries in one line"] = BROKEN["entries in one line"].replace(
    "models = [", "models = [  #! did you mean 'n_ctx'"
)


@pytest.fixture
def folder(tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the configurations name."""
    monkeypatch.delenv("ERLLAMA_API_KEY", raising=False)
    content = tiny_gguf.read_bytes()
    shutil.copy(tiny_gguf, tmp_path / "good.gguf")
    shutil.copy(tiny_gguf, tmp_path / "some-00001-of-00002.gguf")
    (tmp_path / "cut.gguf").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "folder").mkdir()
    for name, text, mode in (
        ("good-keys", "one\n", 0o600),
        ("open-keys", "two\n", 0o644),
        ("no-keys", "#\n", 0o600),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
    return tmp_path


@pytest.fixture
def command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(folder / "of-command", monkeypatch, capsys)


def write(folder: Path, text: str) -> Path:
    path = folder / "erllama.toml"
    path.write_text(text)
    path.chmod(0o600)
    return path


def marked(text: str) -> list[tuple[int, str]]:
    """Return the lines of a file with a mark, and the texts of the marks."""
    found = ((number, line.partition("#! ")[2]) for number, line in enumerate(text.split("\n"), 1))
    return [(number, mark.strip()) for number, mark in found if mark]


@pytest.mark.parametrize("name", BROKEN)
def test_check_names_the_line_of_each_mistake(folder: Path, command: Command, name: str) -> None:
    path = write(folder, BROKEN[name])
    expected = marked(BROKEN[name])
    result = command("serve", "--check", "--config", path)
    assert result.status == 1
    lines = result.out.splitlines()
    assert [int(re.findall(r", line (\d+): ", line)[0]) for line in lines] == [line for line, _ in expected], lines
    for line, (_, text) in zip(lines, expected, strict=True):
        assert line.startswith(f"{path}, line ")
        assert text in line


@pytest.mark.parametrize("name", BROKEN)
def test_serve_refuses_what_check_reports(folder: Path, command: Command, name: str) -> None:
    path = write(folder, BROKEN[name])
    expected = marked(BROKEN[name])
    result = command("serve", "--config", path)
    assert (result.status, result.out) == (1, "")
    assert f"{path}, line {expected[0][0]}: " in result.err
    assert expected[0][1] in result.err
    assert ("`erllama serve --check`" in result.err) == (len(expected) > 1)


def test_a_valid_configuration_is_summarized(folder: Path, command: Command) -> None:
    path = write(
        folder,
        """
        [server]
        host = "::"
        port = 9000
        [[models]]
        path = "good.gguf"
        name = "chat"
        [[keys]]
        key_file = "good-keys"
        models = ["chat"]
        """,
    )
    result = command("serve", folder / "good.gguf", "--check", "--config", path)
    assert (result.status, result.err) == (0, "")
    assert result.out == "The configuration is valid: good, chat on ::, port 9000, with 1 key.\n"
    assert not (folder / "of-command").exists()


def test_check_reports_mistakes_of_the_command_and_the_file(folder: Path, command: Command) -> None:
    path = write(folder, "[server]\nprot = 1\n")
    result = command(
        "serve", folder / "missing.gguf", "--check", "--host", "0.0.0.0", "--config", path,
        "--api-key-file", folder / "open-keys", "--load", "n_batch=0",
    )  # fmt: skip
    assert result.status == 1
    for text in ("line 2: [server] has no option 'prot'", "missing.gguf does not exist", "chmod o-rw", "no key"):
        assert text in result.out
    assert "n_batch=0" in command("serve", folder / "good.gguf", "--check", "--load", "n_batch=0").out


def test_a_file_that_is_not_text_is_refused(folder: Path) -> None:
    path = write(folder, "")
    path.write_bytes(b"[server]\nhost = '\xff'\n")
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        read_settings(CommandOptions(config=path))


def test_settings_name_what_a_reload_cannot_change(folder: Path) -> None:
    before = read_settings(CommandOptions(config=write(folder, "[server]\nport = 1\n[cache]\nram = '1GiB'\n")))
    text = "[server]\nport = 2\nslots = false\naccess_log = 'none'\n[cache]\ndisk = 'd'\n[[keys]]\nkey = 'k'\n"
    after = read_settings(CommandOptions(config=write(folder, text)))
    assert before.needing_restart(before) == []
    assert set(before.needing_restart(after)) == {"port", "slots", "access_log", "cache.ram", "cache.disk"}


def test_lines_are_found_for_every_way_to_write_an_option() -> None:
    text = (
        "a.b = 1\r\n\r\n[c.'d e']\r\n# [x]\r\nf = [\r\n  1,\r\n]\r\n"
        "[[g]]\r\nh = { i = 1 }\r\n[g.j]\r\nk = 1\r\n[[g]]\r\nh = 2\r\n"
    )
    lines = toml_lines(text)
    expected = {
        ("a", "b"): 1, ("c", "d e"): 3, ("c", "d e", "f"): 5, ("g", 0): 8, ("g", 0, "h", "i"): 9,
        ("g", 0, "j", "k"): 11, ("g", 1): 12, ("g", 1, "h"): 13,
    }  # fmt: skip
    assert expected.items() <= lines.items()
    assert not [place for place in lines if "x" in place]
