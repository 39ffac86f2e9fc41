"""Escape sequences in names, metadata, templates and replies never reach a terminal."""

from __future__ import annotations

import ast
import io
import json
import logging
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from gguf import GGUFWriter

import erllama
from erllama._runtime.printing import json_text, one_line, printable
from erllama.cli.main import _log_to_stderr
from erllama.testing import scripted
from erllama.testing._file import new_gguf
from support.cli import TEMPLATE, Command, write_replying_model
from support.pseudo_terminal import PseudoTerminal
from support.subprocesses import run_python

PACKAGE = Path(erllama.__file__).parent
ONE = ("--threads", "1")

# A title, colours in two forms, an incomplete sequence, cursor movement, and reversal of text direction.
EVIL = "\x1b]0;EVIL\x07\x1b[7m\x9b7m\x8d\x7f\u202e\u2066\x08\x1bcEVIL"
FORBIDDEN = ("\x1b]", "\x07", "\x1b[7m", "\x9b", "\x8d", "\x7f", "\u202e", "\u2066", "\x08", "\x1bc")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory of hostile files, with a hostile name."""
    directory = tmp_path_factory.mktemp("models") / EVIL
    directory.mkdir()
    hostile_model(directory / f"{EVIL}.gguf", name=EVIL)
    hostile_model(directory / "template.gguf", template="{{ raise_exception(" + json.dumps(EVIL) + ") }}")
    hostile_model(directory / "architecture.gguf", architecture=EVIL)
    hostile_model(directory / "pre.gguf", pre=EVIL)
    hostile_model(directory / "cut.gguf")
    whole = (directory / "cut.gguf").read_bytes()
    (directory / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (directory / f"{EVIL}.json").write_text('{"type": "' + EVIL + '"')
    (directory / f"{EVIL}.gbnf").write_text("root ::= " + EVIL)
    (directory / "talk.json").write_text(json.dumps([{"role": EVIL, "content": EVIL}]))
    with tarfile.open(directory / f"{EVIL}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo(EVIL)
        member.size = 4
        tar.addfile(member, io.BytesIO(b"text"))
    return directory


def hostile_model(
    path: Path, *, name: str = "", architecture: str = "", pre: str = "", template: str = TEMPLATE
) -> None:
    """Return a model that replies with an escape sequence and has more of them in its metadata."""

    @contextmanager
    def changed(file: Path, kind: str) -> Iterator[GGUFWriter]:
        with new_gguf(file, kind) as writer:
            writer.add_string(f"general.{EVIL}", f"{EVIL}\nname: {EVIL}")
            yield writer
            (fields,) = writer.kv_data
            for key, value in {
                "general.name": name,
                "general.architecture": architecture,
                "tokenizer.ggml.pre": pre,
            }.items():
                if value:
                    fields.pop(key, None)
                    writer.add_string(key, value)
            if pre:
                fields.pop("tokenizer.ggml.model")
                writer.add_tokenizer_model("gpt2")
                writer.add_token_merges(["a b"])
            fields.pop("tokenizer.chat_template")
            writer.add_chat_template(template)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripted, "new_gguf", changed)
        write_replying_model(path, "\x1b]0;EVIL\x07\x7f")


# --- every command ------------------------------------------------------------------------------------

# Runs all commands in one process, each after a line that names it.
_RUN_ALL = """
import io, json, sys
from erllama.__main__ import main

for number, (arguments, typed) in enumerate(json.load(open(sys.argv[1]))):
    print(f"--- {number}", flush=True)
    sys.stdin = io.StringIO(typed)
    print(f"--- status {main(arguments)}", flush=True)
"""


def test_no_command_prints_an_escape_sequence_to_a_terminal(run: Command, download: Path, tmp_path: Path) -> None:
    model, kv = download / f"{EVIL}.gguf", tmp_path / EVIL
    small = [*ONE, "--n-ctx", "256"]
    cache = ["--dir", str(kv)]
    # Commands, and whether the hostile text must appear without its control characters.
    commands: list[tuple[list[object], bool]] = [
        (["run", model, "Q", "--stats", "--cache-dir", kv, *small], True),
        (["run", model, "Q", "--json", *small], True),
        (["run", "-m", model, "--raw", "\x1b", *small], True),
        (["run", download / "template.gguf", "Q", *small], True),
        (["run", download / "architecture.gguf", "Q", *small], True),
        (["--debug", "run", download / "architecture.gguf", "Q", *small], True),
        (["run", download / "pre.gguf", "Q", *small], True),
        (["--debug", "run", download / "pre.gguf", "Q", *small], True),
        (["run", download / "cut.gguf", "Q", *small], True),
        (["run", download / f"no{EVIL}.gguf", "Q", *small], True),
        (["run", model, "Q", "--json-schema", download / f"{EVIL}.json", *small], True),
        (["run", model, "Q", "--json-schema", download / f"no{EVIL}.json", *small], True),
        (["run", model, "Q", "--grammar", download / f"{EVIL}.gbnf", *small], True),
        (["run", model, "Q", "-o", f"{EVIL}=1", *small], True),
        (["run", model, "Q", "--load", f"{EVIL}=1", *small], True),
        (["run", model, "Q", "--quota", EVIL], True),
        (["run", model, "Q", f"--{EVIL}"], True),
        (["info", model], True),
        (["info", model, "--metadata"], True),
        (["info", model, "--metadata", "--json", "--fingerprint"], True),
        (["info", download / f"no{EVIL}.gguf"], True),
        (["bench", model, "-p", 64, "-n", 2, "-r", 1, *small], True),
        (["demo", "--model", model, "--tokens", 64, "--max-tokens", 8], True),
        (["demo", "--model", download / "template.gguf", "--tokens", 64, "--max-tokens", 8], True),
        (["doctor", "--dir", kv, "--dir", download], True),
        (["cache", "stats", *cache], True),
        (["cache", "ls", *cache], False),
        (["cache", "ls", "--json", *cache], True),
        (["cache", "export", download / f"{EVIL}-out.tar", *cache], True),
        (["cache", "import", download / f"{EVIL}-out.tar", "--dir", tmp_path / f"{EVIL}-there"], False),
        (["cache", "import", download / f"{EVIL}.tar", *cache], True),
        (["cache", "import", download / f"no{EVIL}.tar", *cache], True),
        (["cache", "verify", *cache], True),
        (["cache", "gc", *cache], True),
        (["cache", "evict", "--namespace", EVIL, *cache], True),
        (["cache", "evict", "--all", *cache], False),
        (["cache", "stats", "--dir", model], True),
        (["cache", EVIL], True),
        ([EVIL], True),
        (["completion", EVIL], True),
        (["chat", model, *small], True),
        (["chat", model, "--json", *small], True),
        (["chat", download / "template.gguf", *small], True),
    ]
    files = f"/load '{download}/talk.json'\n/load '{download}/none'\n/save '{download}/saved'\n"
    typed = f"Q\n{files}/{EVIL}\n/set {EVIL} 1\n"
    asked = [[list(map(str, arguments)), typed if arguments[0] == "chat" else ""] for arguments, _ in commands]
    (tmp_path / "commands.json").write_text(json.dumps(asked))
    with PseudoTerminal(
        [sys.executable, "-c", _RUN_ALL, str(tmp_path / "commands.json")],
        {**run.environment, "COLUMNS": "300"},  # wide enough for the names of any temporary directory
    ) as screen:
        assert screen.wait_for_end(300) == 0
    parts = screen.raw.split("--- status ")
    assert len(parts) == len(commands) + 1, screen.raw[-3000:]
    for (arguments, seen), part in zip(commands, parts, strict=False):
        assert [each for each in FORBIDDEN if each in part] == [], (arguments, part)
        assert ("EVIL" in part) == seen, (arguments, part)
        assert "bug in erllama" not in part, (arguments, part)


def test_a_chat_in_a_terminal_prints_no_escape_sequence_of_a_model(run: Command, download: Path) -> None:
    command = [sys.executable, "-m", "erllama", "chat", str(download / f"{EVIL}.gguf"), *ONE]
    with PseudoTerminal(command, run.environment) as screen:
        banner = screen.wait_for("/help lists the commands")
        screen.wait_for(">")
        screen.send("Q\r")
        reply = screen.wait_for("to first token")
        screen.wait_for(">")
        screen.send(f"/load '{download.parent}/none'\r")
        screen.wait_for("No such file")
        screen.wait_for(">")
        screen.send("\x04")
        assert screen.wait_for_end() == 0
    assert "EVIL" in banner
    assert "EVIL" in reply
    # The line editor itself moves the cursor with backspaces.
    assert [each for each in FORBIDDEN if each in screen.raw and each != "\x08"] == []


def test_piped_output_is_printable_and_replies_are_exact(run: Command, download: Path) -> None:
    """Piped output may reach a terminal, so names are escaped. A reply is data and stays exact."""
    found = run("info", download / f"{EVIL}.gguf")
    assert [each for each in FORBIDDEN if each in found.out] == []
    assert run("run", download / f"{EVIL}.gguf", "Q", *ONE).out == "\x1b]0;EVIL\x07\x7f\n"


def test_json_output_escapes_control_characters_without_loss(run: Command, download: Path) -> None:
    path = download / f"{EVIL}.gguf"
    found = run("info", path, "--json", "--metadata")
    assert [each for each in FORBIDDEN if each in found.out] == []
    assert found.json["file"] == str(path)
    assert found.json["name"] == EVIL
    assert found.json["metadata"][f"general.{EVIL}"] == f"{EVIL}\nname: {EVIL}"


def test_a_multi_line_value_cannot_imitate_other_rows(run: Command, download: Path) -> None:
    lines = run("info", download / f"{EVIL}.gguf", "--metadata").out.splitlines()
    assert sum(line.startswith("name:") for line in lines) == 1


def test_the_log_of_libllama_is_printable_for_every_handler(download: Path) -> None:
    finished = run_python(
        """
        import logging, sys
        logging.basicConfig(level=logging.DEBUG)
        import erllama
        try:
            erllama.load_model(sys.argv[1], n_threads=1)
        except erllama.ModelLoadError as error:
            assert "EVIL" in str(error)
        """,
        download / "architecture.gguf",
    )
    assert finished.returncode == 0
    assert "EVIL" in finished.stderr
    assert [each for each in FORBIDDEN if each in finished.stderr] == []


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\x0b", "\x1e", "\x85", "\u2028"])
def test_a_log_record_cannot_imitate_a_line_of_the_command(
    line_break: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with _log_to_stderr(debug=False):
        try:
            raise ValueError(f"quoted{line_break}\x1b")
        except ValueError:
            log = logging.getLogger("erllama.cache")
            log.warning("%s is broken", f"a{line_break}erllama: all is well")
            log.warning("not written", exc_info=True)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("erllama: ")] == [lines[0], "erllama: not written"]
    assert lines[0].endswith("all is well is broken")
    assert lines[2] == "Traceback (most recent call last):"
    assert any(line.startswith("ValueError: quoted") for line in lines)
    assert not any("\x1b" in line for line in lines)


# --- the one function -----------------------------------------------------------------------------------


def test_only_terminal_control_characters_are_escaped() -> None:
    kept = "lines\n\ttabs \u00a0é 日本 हिन्दी עברית 👩\u200d👩\u200d👧 می\u200cخواهم ❤\ufe0f"
    assert printable(kept) == kept
    for character in [
        *map(chr, range(0xA0)),
        *"\u061c\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069\ud800\ufeff",
    ]:
        shown = printable(f"a{character}b")
        if character in "\n\t" or " " <= character <= "~":
            assert shown == f"a{character}b"
        else:
            assert shown == "a\ufffdb", repr(character)
        assert json.loads(json_text({character: [character]}, indent=2)) == {character: [character]}
        assert printable(json_text(character)) == json_text(character)
    assert one_line("a\nb\x1b") == "a b\ufffd"
    for character in map(chr, range(sys.maxunicode + 1)):
        if len(f"a{character}b".splitlines()) > 1:
            assert len(one_line(f"a{character}b").splitlines()) == 1, repr(character)
            assert character == "\n" or len(printable(f"a{character}b").splitlines()) == 1, repr(character)
    assert json.loads(json_text("\U000e0041\udcff")) == "\U000e0041\udcff"


def test_the_command_prints_through_one_function_only() -> None:
    """Only the modules that own the standard streams use `print` or write to them."""
    found = []
    for path in [*PACKAGE.joinpath("cli").rglob("*.py"), *PACKAGE.joinpath("_demo").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in ("print", "click.echo", "click.secho", "traceback.print_exc") or (
                    called.startswith("sys.std") and called.endswith((".write", ".writelines"))
                ):
                    found.append(path.name)
    assert found == ["console.py", "console.py"]  # a reply, and the colours around its thinking
