"""The command as a whole: its subcommands, and what becomes of errors.

Exit statuses: 0; 1 for an error of ours, told in one line; 2 for wrong usage;
130 for Ctrl-C; 141 where the reader of our output went away.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence

import click

import erllama
from erllama._runtime.printing import one_line, printable, say
from erllama.cli.console import INTERRUPTED, NO_READER, note, told


class Later(click.Command):
    """A subcommand that is imported when it is run, so that `--help` and `--version` are quick.

    Its name and the first line of its help are here as they are there.
    """

    def __init__(self, name: str, module: str, text: str = "") -> None:
        super().__init__(name, help=text, hidden=not text)
        self._module = module

    def load(self) -> click.Command:
        """Import the subcommand."""
        found = getattr(importlib.import_module(self._module), (self.name or "").replace("-", "_"))
        assert isinstance(found, click.Command)
        return found


class _Commands(click.Group):
    """Imports the subcommand that is run; turns errors into lines and statuses."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command.load() if isinstance(command, Later) else command, rest

    def invoke(self, ctx: click.Context) -> int:
        debug = bool(ctx.params["debug"])
        try:
            with _logging(debug):
                status = super().invoke(ctx)
                sys.stdout.flush()
            return status if isinstance(status, int) else 0
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (KeyboardInterrupt, click.Abort):
            return INTERRUPTED
        except BrokenPipeError:
            # Keeps the interpreter from complaining of it at its exit.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return NO_READER
        except Exception as error:
            if debug:
                say(traceback.format_exc(), end="", stderr=True)
            import sqlite3

            foreseen = isinstance(error, erllama.Error | OSError | sqlite3.Error)
            defect = f"{type(error).__name__}: {error}. This is a defect; `erllama --debug …` tells where"
            note(told(error) if foreseen else defect)
            return 1


class _Lines(logging.Formatter):
    """Log records may quote what came from outside: a message is one line, and only a traceback has several."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is that of `logging`
        record.message = one_line(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextlib.contextmanager
def _logging(debug: bool) -> Iterator[None]:
    """What the library logs becomes lines on stderr, as the command's own are.

    What libllama says is for debugging: what matters of it is in errors.
    """
    log, handler, before = logging.getLogger("erllama"), logging.StreamHandler(), logging.getLogger("erllama").level
    handler.setFormatter(_Lines("erllama: %(message)s"))
    if not debug:
        handler.addFilter(lambda record: not record.name.startswith("erllama.llama"))
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if debug else logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)
        log.removeHandler(handler)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
    epilog="Models are GGUF files. Prompts are kept in the user's cache directory: see `erllama cache`.",
)
@click.version_option(erllama.__version__, message="erllama %(version)s")
@click.option(
    "--debug", is_flag=True, envvar="ERLLAMA_DEBUG", help="Tell all that is logged, and where errors are."
)
def root(debug: bool) -> None:
    """Run GGUF models and keep prompts warm: nobody's prompt is read twice."""


for command in (
    Later("run", "erllama.cli.run", "Write one reply."),
    Later("chat", "erllama.cli.chat.command", "Talk with a model."),
    Later("demo", "erllama.cli.demo", "Read a long prompt in one process, find it read in the next."),
    Later("demo-worker", "erllama.cli.demo"),
    Later("info", "erllama.cli.info", "What a model is, from its file's header alone."),
    Later(
        "doctor",
        "erllama.cli.doctor.command",
        "What is built, and what is wrong; exit status 1 where something is.",
    ),
    Later("doctor-worker", "erllama.cli.doctor.command"),
    Later("cache", "erllama.cli.cache.command", "Look after what is stored of prompts."),
    Later(
        "bench",
        "erllama.cli.bench",
        "Measure a model: prefill, decode, and the first token cold, from RAM, and from disk after a restart.",
    ),
    Later("completion", "erllama.cli.completion", "Print a completion script."),
):
    root.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status. A user's mistake gives one line, not a traceback."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # A reply may hold what the terminal's encoding lacks, and a pipe what is no text.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    given = None if arguments is None else list(arguments)
    try:
        status = root.main(given, prog_name="erllama", standalone_mode=False)
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        say(shown.getvalue(), end="", stderr=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    return status if isinstance(status, int) else 0
