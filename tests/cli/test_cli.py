"""The command `erllama`: replies in terminals and scripts, its output, and its handling of errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import erllama
from erllama import llama_ffi
from erllama.cache.sizes import format_size
from erllama.llama_ffi import library
from support.cli import Command, write_replying_model
from support.pseudo_terminal import PseudoTerminal

ONE = ("--threads", "1")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replying_model(tmp_path_factory.mktemp("models") / "says.gguf", "Yes.", thinking="hm")


# --- run ----------------------------------------------------------------------------------------


def test_replies_go_to_stdout_and_statistics_to_stderr(run: Command, model: Path) -> None:
    first = run("run", model, "Is it?", "--stats", *ONE)
    assert (first.status, first.out) == (0, "Yes.\n")
    assert "none cached" in first.err
    again = run("run", model, "Is it?", "--stats", *ONE)
    assert " prompt tokens from disk" in again.err
    assert "tokens" in again.err
    assert "s to first token" in again.err


def test_json_output_holds_the_whole_reply(run: Command, model: Path) -> None:
    run("run", model, "Is it?", *ONE)
    reply = run("run", model, "Is it?", "--json", "--seed", "7", *ONE).json
    assert (reply["text"], reply["thinking"], reply["finish_reason"]) == ("Yes.", "hm", "stop")
    assert reply["seed"] == 7
    assert reply["usage"]["cached_tokens"] == reply["usage"]["prompt_tokens"] - 1 == reply["cache"]["tokens"]
    assert reply["cache"]["tier"] == "disk"
    assert reply["timings"]["prefill_seconds"] > 0
    assert reply["message"]["content"] == "Yes."


def test_a_prompt_is_read_from_arguments_stdin_or_both(run: Command, model: Path) -> None:
    lengths = [
        run("run", model, *words, "--json", *ONE, stdin=stdin).json["usage"]["prompt_tokens"]
        for words, stdin in [
            (["ab", "cd"], ""),
            (["ab cd"], ""),
            ([], "ab cd"),
            (["-"], "ab cd"),
            (["ab", "-"], "cd"),
        ]
    ]
    assert len(set(lengths)) == 1


def test_invalid_utf8_on_stdin_is_replaced(run: Command, model: Path) -> None:
    finished = run.in_subprocess("run", model, *ONE, stdin=b"Is\xff it?")
    assert (finished.returncode, finished.stdout) == (0, b"Yes.\n"), finished.stderr


def test_raw_continues_a_text_without_a_template(run: Command, model: Path, tiny_gguf: Path) -> None:
    reply = run("run", "-m", model, "e", "--raw", "--json", *ONE).json
    assert (reply["text"], reply["usage"]["prompt_tokens"]) == ("s.", 1)
    assert "message" not in reply
    # So does a model without a template.
    assert "message" not in run("run", tiny_gguf, "hello", "-n", 4, "--json", *ONE).json


def test_a_reply_follows_a_schema_a_grammar_or_an_expression(run: Command, tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"enum": ["red", "green"]}')
    (tmp_path / "grammar.gbnf").write_text('root ::= "yes" | "no"')
    kept = [
        ["--json-schema", tmp_path / "schema.json"],
        ["--grammar", tmp_path / "grammar.gbnf"],
        ["--regex", "[0-9]{3}"],
    ]
    texts = [run("run", tiny_gguf, "hello", *options, *ONE).out.strip() for options in kept]
    assert json.loads(texts[0]) in ("red", "green")
    assert texts[1] in ("yes", "no")
    assert texts[2].isdecimal()
    assert len(texts[2]) == 3


def test_every_library_option_can_be_set(run: Command, model: Path) -> None:
    given = run(
        "run", model, "Q", "-o", "stop=.", "-o", 'logit_bias={"5": 1.5}', "--load", "n_ctx=512", "--json", *ONE
    )
    assert given.json["stop_sequence"] == "."
    assert given.json["text"] == "Yes"


def test_no_cache_stores_nothing(run: Command, model: Path) -> None:
    assert run("run", model, "Q", "--no-cache", "--cache-dir", run.directory).status == 2
    os.environ.pop("ERLLAMA_CACHE_DIR")
    assert run("run", model, "Q", "--no-cache", *ONE).status == 0
    assert not run.directory.exists()


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["run", "nowhere.gguf", "Q"], 1, "nowhere.gguf does not exist"),
        (["run", "MODEL", "Q", "-o", "temprature=1"], 1, "did you mean 'temperature'?"),
        (["run", "MODEL", "Q", "--top-p", "7"], 1, "top_p=7.0; it must be at most 1"),
        (["run", "MODEL", "Q", "--load", "n_ctxx=7"], 1, "did you mean 'n_ctx'?"),
        (["run", "MODEL", "Q", "--load", "cache=7"], 2, "the command sets this option itself"),
        (["run", "MODEL", "Q", "--temprature", "1"], 2, "--temperature"),
        (["run", "MODEL", "Q", "-o", "stop"], 2, "pass NAME=VALUE"),
        (["run", "MODEL", "Q", "--max-tokens", "many"], 2, "'many' is not a valid integer"),
        (["run", "MODEL", "Q", "--raw", "--system", "S"], 2, "no system message"),
        (["run", "MODEL", "Q", "--json-schema", "nowhere.json"], 2, "does not exist"),
        (["run", "MODEL", "Q", "--quota", "much"], 2, "use a size such as '2GiB'"),
        (["run", "MODEL", "Q", "--n-ctx", "256", "--regex", "("], 1, "--regex: "),
        (["run", "MODEL", "x" * 600, "--n-ctx", "256"], 1, "the context holds 256"),
        (["run", "NOTGGUF", "Q"], 1, "is not a GGUF file"),
        (["run", "MODEL", "Q", "--grammar", "BYTES"], 1, "is not UTF-8 text"),
        (["run", "MODEL", "Q", "--json-schema", "NOTGGUF"], 1, "no.gguf: line 1, column 1: "),
        (["chat", "MODEL", "-o", "thinking_budget_message=Enough."], 1, "thinking_budget_message without"),
        (["chat", "nowhere.gguf"], 1, "does not exist"),
        (["info", "nowhere.gguf"], 1, "does not exist"),
        (["bench", "MODEL", "--n-ctx", "256"], 1, "pass --n-ctx 576"),
        (["frobnicate"], 2, "No such command 'frobnicate'"),
        (["completion", "tcsh"], 2, "'tcsh' is not one of"),
    ],
)
def test_a_user_error_prints_one_line_and_sets_the_exit_status(
    run: Command, model: Path, tmp_path: Path, arguments: list[str], status: int, words: str
) -> None:
    (tmp_path / "no.gguf").write_text("a text")
    (tmp_path / "bytes").write_bytes(b"root ::= \xff")
    names = {"MODEL": str(model), "NOTGGUF": str(tmp_path / "no.gguf"), "BYTES": str(tmp_path / "bytes")}
    found = run(*[names.get(word, word) for word in arguments])
    assert found.status == status
    assert found.out == ""
    assert words in found.err
    assert "Traceback" not in found.err
    assert found.err.startswith("erllama: ") == (status == 1)
    assert status == 2 or len(found.err.splitlines()) == 1


def test_an_internal_error_prints_one_line_and_a_traceback_with_debug(
    run: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by us")

    monkeypatch.setattr(erllama, "load_model", fail)
    short, long = run("run", model, "Q"), run("--debug", "run", model, "Q")
    assert short.status == long.status == 1
    assert "ZeroDivisionError: by us. This is a bug" in short.err
    assert "Traceback" not in short.err
    assert "Traceback" in long.err


def test_the_bundled_model_is_the_default(run: Command, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(erllama, "demo_model", lambda: model)
    assert run("run", "Is it?", *ONE).out == "Yes.\n"
    assert run("info", "--json").json["file"] == str(model)


# --- in child processes -----------------------------------------------------------------------------


def test_a_missing_prompt_is_reported(run: Command, model: Path) -> None:
    for stdin in ("", " \n"):
        found = run("run", model, *ONE, stdin=stdin)
        assert (found.status, found.out) == (2, "")
        assert "stdin is empty" in found.err
    found = run("run", model.parent, "Is it?", *ONE)
    assert found.status == 1
    assert "is a directory" in found.err


def test_piped_output_has_no_escapes_and_ctrl_c_keeps_it(run: Command, tmp_path: Path) -> None:
    endless = write_replying_model(tmp_path / "endless.gguf", "abc ", for_ever=True)
    command = [sys.executable, "-m", "erllama", "run", str(endless), "Q", "--n-ctx", "65536", *ONE]
    environment = {**os.environ, **run.environment, "FORCE_COLOR": "", "TERM": "xterm"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, env=environment
    ) as process:
        assert process.stdout is not None
        begun = process.stdout.read(8)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    output = (begun + rest).removesuffix(b"\n")
    assert output
    assert (b"abc " * len(output)).startswith(output)
    assert b"\x1b" not in begun + rest + err
    assert b"Traceback" not in err


def test_a_closed_pipe_ends_the_command_quietly(run: Command, tmp_path: Path) -> None:
    endless = write_replying_model(tmp_path / "endless.gguf", "abc ", for_ever=True)
    command = [sys.executable, "-m", "erllama", "run", str(endless), "Q", "--n-ctx", "65536", *ONE]
    environment = {**os.environ, **run.environment}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, env=environment
    ) as process:
        assert process.stdout is not None
        process.stdout.read(8)
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()
        assert process.wait(60) == 141
    assert err == b""


def test_both_ways_to_run_the_command_are_equal(run: Command, model: Path) -> None:
    script = shutil.which("erllama", path=Path(sys.executable).parent)
    assert script is not None
    finished = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert finished.stdout == f"erllama {erllama.__version__}\n"
    assert run.in_subprocess("--version").stdout.decode() == finished.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(run: Command, shell: str) -> None:
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("no bash here")
    found = run("completion", shell)
    assert found.status == 0
    assert "_ERLLAMA_COMPLETE" in found.out


def test_shell_completion_completes_commands_and_options(run: Command) -> None:
    def completed(words: str, at: int) -> str:
        asked = {"_ERLLAMA_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(at)}
        return run.in_subprocess(**asked).stdout.decode()

    assert "plain,verify" in completed("erllama cache v", 2)
    assert "plain,--temperature" in completed("erllama run --temp", 2)


# --- info, doctor, bench, demo -----------------------------------------------------------------------


def test_info_describes_a_file_by_its_header(run: Command, model: Path, tiny_gguf: Path) -> None:
    plain = run("info", tiny_gguf).out
    assert "architecture:    llama" in plain
    assert "weights:         f32" in plain
    assert "chat template:   no" in plain
    found = run("info", model, "--json", "--metadata", "--fingerprint").json
    assert (found["layers"], found["context"], found["chat_template"]) == (1, 65536, True)
    assert found["bytes"] == model.stat().st_size
    assert found["metadata"]["general.architecture"] == "llama"
    assert found["fingerprint"].startswith("sha256:")
    assert "llama.block_count" in run("info", model, "--metadata").out


def test_doctor_reports_a_working_installation(run: Command) -> None:
    found = run("doctor")
    assert found.status == 0, found.out
    assert "self-check: demo.gguf: the same reply" in found.out
    assert "does not exist yet" in found.out
    assert found.out.splitlines()[-1] == "no errors"
    assert re.search(r"machine: .*, [0-9]+ threads? per model \([0-9a-zA-Z., ]+\)", found.out)
    assert {finding["state"] for finding in run("doctor", "--json").json} <= {"ok", "warning"}


def test_doctor_reports_problems_and_how_to_fix_them(run: Command, model: Path) -> None:
    run("run", model, "Q", *ONE)
    (run.directory / "notes.txt").write_text("somebody else's")
    run.directory.chmod(0o755)
    found = run("doctor")
    assert found.status == 1
    assert "error    directory" in found.out
    assert f"chmod 700 {run.directory}" in found.out
    assert "1 error" in found.out


def test_doctor_says_that_a_build_for_gpus_finds_none(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "build_info", lambda: {"source": "b1", "backend": "cuda", "key": "k"})
    if any(device.kind in ("gpu", "igpu") for device in erllama.devices()):
        pytest.skip("there is a GPU here")
    found = run("doctor")
    assert found.status == 0, found.out
    assert "libllama was built for cuda, but finds no GPU; the CPU computes" in found.out


def test_rpc_server_becomes_the_program_with_the_options(
    run: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.append([program, *command[1:]]))
    program = tmp_path / "rpc-server"
    monkeypatch.setattr(llama_ffi, "rpc_server_program", lambda: program)
    run("rpc-server")
    run("rpc-server", "--host", "10.0.0.2", "--port", 5, "--threads", 3, "--device", "CUDA0", "--device", "CPU")
    assert started == [
        [str(program), "--host", "127.0.0.1", "--port", "50052"],
        [str(program), "--host", "10.0.0.2", "--port", "5", "--threads", "3", "--device", "CUDA0,CPU"],
    ]
    monkeypatch.setattr(llama_ffi, "rpc_server_program", lambda: None)
    found = run("rpc-server")
    assert (found.status, "make setup RPC=1" in found.err) == (1, True)


def test_bench_measures_and_removes_its_files(run: Command, tiny_gguf: Path, tmp_path: Path) -> None:
    asked = ["bench", tiny_gguf, "-p", 64, "-n", 4, "-r", 2, "--dir", tmp_path / "disk", *ONE]
    (tmp_path / "disk").mkdir()
    plain = run(*asked)
    assert plain.status == 0, plain.err
    assert "first token, from disk" in plain.out
    found = run(*asked, "--json").json
    assert all(len(values) == 2 and min(values) > 0 for values in found["runs"].values())
    assert list((tmp_path / "disk").iterdir()) == []
    assert not run.directory.exists()


def test_the_demo_finds_its_prompt_in_the_next_process(run: Command, tiny_gguf: Path) -> None:
    found = run("demo", "--model", tiny_gguf, "--tokens", 100, "--max-tokens", 4)
    assert found.status == 0
    assert "exact hit from disk" in found.out
    assert "the same reply" in found.out


def test_a_terminal_shows_the_progress_of_a_long_prompt(run: Command, tiny_gguf: Path) -> None:
    command = [sys.executable, "-m", "erllama", "run", str(tiny_gguf), "x" * 2000, "-n", "2", *ONE]
    with PseudoTerminal(command, run.environment) as screen:
        screen.wait_for("loading tiny.gguf")
        screen.wait_for("reading the prompt")
        assert screen.wait_for_end() == 0


# --- what is written ---------------------------------------------------------------------------------


def test_sizes_are_printed_in_readable_units() -> None:
    assert [format_size(n) for n in (0, 1023, 1536, 5 << 30, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]
