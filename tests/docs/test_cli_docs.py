"""`docs/cli.md` shows the real output of its commands: each runs in the order of the page and is compared.

Run as a program, this writes what they print into the page.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from erllama.cli.main import LazyCommand, main, root
from erllama.testing.scripted import write_scripted
from support.paths import ROOT

PAGE = ROOT / "docs" / "cli.md"
HOME = "/home/ada"
SAYS = ["Because", " air", " scatters", " blue", " light", " most"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class ShownCommand(NamedTuple):
    """A command of the page, and the output that the page shows."""

    line: int
    command: str
    output: str


def shown() -> list[ShownCommand]:
    found: list[ShownCommand] = []
    text = PAGE.read_text()
    for block in re.finditer(r"^```console\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        for part in re.finditer(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block[1], re.MULTILINE):
            at = text.count("\n", 0, block.start(1) + part.start()) + 1
            found.append(ShownCommand(at, part[1], part[2]))
    return found


def home_directory(home: Path) -> dict[str, str]:
    """Create the files that the page assumes in a home directory. Returns the environment of its commands."""
    follows = dict(zip(["<|assistant|>", *SAYS], [*SAYS, "."], strict=True))
    special = ["<|system|>", "<|user|>", "<|assistant|>"]
    write_scripted(home / "model.gguf", follows, words=SAYS, special=special, chat_template=TEMPLATE)
    (home / "notes.txt").write_text("The lamp is lit at dusk.\n")
    (home / "colour.json").write_text('{"enum": ["red", "green"]}')
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(home),
        "ERLLAMA_CACHE_DIR": str(home / ".cache" / "erllama"),
        "XDG_CACHE_HOME": str(home / ".cache"),
        "XDG_STATE_HOME": str(home / ".local" / "state"),
        "OMP_WAIT_POLICY": "passive",
    }


def output_of(command: str, home: Path, environment: dict[str, str]) -> str:
    """Return the output of a command. A command that needs no shell runs in this process, which is faster."""
    program, *arguments = shlex.split(command)
    if program == "erllama" and not {"|", "<", ">"} & set(arguments):
        printed = io.StringIO()
        with (
            chdir(home),
            patch.dict(os.environ, environment),
            patch.object(sys, "stdin", io.StringIO()),
            redirect_stdout(printed),
            redirect_stderr(printed),
        ):
            main(arguments)
        return printed.getvalue().replace(str(home), HOME)
    finished = subprocess.run(
        ["bash", "-c", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        cwd=home,
        env=environment,
        text=True,
        timeout=120,
        check=False,
    )
    return finished.stdout.replace(str(home), HOME)


def comparable_lines(output: str) -> list[str]:
    """Return the constant parts of an output as a set of lines, because lines of stderr may come in between."""
    output = re.sub(r"\b[0-9a-f]{16,}\b", "KEY", output)
    output = re.sub(r"\b(s|min|h|d) ago\b", "ago", output)
    output = re.sub(r"\d[\d,.]*(e-\d+)?( (B|KiB|MiB|GiB|TiB)\b)?", "N", output)
    return sorted(" ".join(line.split()) for line in output.splitlines() if line.strip())


def test_the_page_shows_what_its_commands_print(tmp_path: Path) -> None:
    environment = home_directory(tmp_path)
    commands = shown()
    assert len(commands) > 20
    for each in commands:
        assert comparable_lines(output_of(each.command, tmp_path, environment)) == comparable_lines(each.output), (
            f"line {each.line}"
        )


def test_the_page_names_every_command_and_option() -> None:
    text = PAGE.read_text()
    for name, later in root.commands.items():
        assert isinstance(later, LazyCommand)
        command = later.load()
        if command.hidden:
            continue
        assert f"`{name}`" in text
        group = getattr(command, "commands", {name: command})
        for below, each in group.items():
            assert re.search(rf"`{below}[ `]", text), below
            if name in ("run", "cache"):
                for option in (
                    option for parameter in each.params for option in parameter.opts if option[:2] == "--"
                ):
                    assert option in text, f"{name} {below} {option}"


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        surroundings = home_directory(Path(directory))
        page = PAGE.read_text()
        for each in shown():
            printed = output_of(each.command, Path(directory), surroundings)
            page = page.replace(f"$ {each.command}\n{each.output}", f"$ {each.command}\n{printed}", 1)
        PAGE.write_text(page)
