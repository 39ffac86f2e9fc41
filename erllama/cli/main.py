"""The command `erllama`: its subcommands, logging, error messages and exit statuses.

Exit statuses: 0 for success, 1 for an error, 2 for invalid arguments, 130 for Ctrl-C, 141
if the reader of the output closed it. An error is one line on stderr.
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
from erllama._runtime.printing import echo, one_line, printable
from erllama.cli.console import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, error_message, print_note


class LazyCommand(click.Command):
    """A subcommand that is imported when it runs, so that `--help` and `--version` are fast.

    Its name and the first line of its help are repeated here; a test compares them.
    """

    def __init__(self, name: str, module: str, text: str = "") -> None:
        super().__init__(name, help=text, hidden=not text)
        self._module = module

    def load(self) -> click.Command:
        """Import the subcommand and return it."""
        command = getattr(importlib.import_module(self._module), (self.name or "").replace("-", "_"))
        assert isinstance(command, click.Command)
        return command


class _LazyGroup(click.Group):
    """Imports the subcommand that runs; turns errors into messages and exit statuses."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command.load() if isinstance(command, LazyCommand) else command, rest

    def invoke(self, ctx: click.Context) -> int:
        debug = bool(ctx.params["debug"])
        try:
            with _log_to_stderr(debug):
                status = super().invoke(ctx)
                sys.stdout.flush()
            return status if isinstance(status, int) else 0
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (KeyboardInterrupt, click.Abort):
            return EXIT_INTERRUPTED
        except BrokenPipeError:
            # Otherwise the interpreter would report the same error when it flushes stdout at exit.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_BROKEN_PIPE
        except Exception as error:
            if debug:
                echo(traceback.format_exc(), end="", stderr=True)
            import sqlite3

            expected = isinstance(error, erllama.Error | OSError | sqlite3.Error)
            bug = f"{type(error).__name__}: {error}. This is a bug in erllama; `erllama --debug …` shows where"
            print_note(error_message(error) if expected else bug)
            return 1


class _OneLineFormatter(logging.Formatter):
    """Formats a message as one line, since it may quote text from outside. Only a traceback has several lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is that of `logging`
        record.message = one_line(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextlib.contextmanager
def _log_to_stderr(debug: bool) -> Iterator[None]:
    """Print the log messages of the library on stderr, in the form of the command's own messages.

    Messages of libllama appear only with `debug`. Errors contain the relevant ones.
    """
    log, handler, before = logging.getLogger("erllama"), logging.StreamHandler(), logging.getLogger("erllama").level
    handler.setFormatter(_OneLineFormatter("erllama: %(message)s"))
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
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
    epilog="A model is a GGUF file, or a name that `erllama models` lists. Prompts are cached in the user's cache "
    "directory; `erllama cache` manages it.",
)
@click.version_option(erllama.__version__, message="erllama %(version)s")
@click.option(
    "--debug", is_flag=True, envvar="ERLLAMA_DEBUG", help="Print all log messages, and tracebacks of errors."
)
def root(debug: bool) -> None:
    """Run GGUF models with a persistent prompt cache: the same prompt is computed once."""


for command in (
    LazyCommand("run", "erllama.cli.run", "Write one reply to a prompt."),
    LazyCommand("chat", "erllama.cli.chat.command", "Chat with a model."),
    LazyCommand(
        "serve",
        "erllama.cli.server.serve",
        "Serve models over HTTP, with the APIs of OpenAI, Anthropic, llama-server and Ollama.",
    ),
    LazyCommand(
        "ps",
        "erllama.cli.server.ps",
        "Show the models of a running server: their state, memory, requests and cached prompt tokens.",
    ),
    LazyCommand(
        "stop",
        "erllama.cli.server.stop",
        "Unload a model of a running server. Its prompts stay in the cache, and the next request loads it again.",
    ),
    LazyCommand("demo", "erllama.cli.demo", "Compute a long prompt, and restore it in a new process."),
    LazyCommand("demo-worker", "erllama.cli.demo"),
    LazyCommand("models", "erllama.cli.models.list", "List the models on this machine."),
    LazyCommand("pull", "erllama.cli.models.pull", "Download a model."),
    LazyCommand("fit", "erllama.cli.models.fit", "Show whether a model fits the free memory."),
    LazyCommand("info", "erllama.cli.info", "Describe a model file. Reads its header only."),
    LazyCommand(
        "doctor",
        "erllama.cli.doctor.command",
        "Check the installation and the cache directories. Exit status 1 if there is an error.",
    ),
    LazyCommand("doctor-worker", "erllama.cli.doctor.command"),
    LazyCommand("cache", "erllama.cli.cache.command", "Inspect and manage the prompt cache."),
    LazyCommand("bench", "erllama.cli.bench", "Measure the speed of a model, with and without the cache."),
    LazyCommand("rpc-server", "erllama.cli.rpc_server", "Offer the devices of this machine to other machines."),
    LazyCommand("completion", "erllama.cli.completion", "Print a completion script for a shell."),
):
    root.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status. An error prints one line, not a traceback."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # A reply may have characters that the terminal's encoding lacks, and a pipe bytes that are not text.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        status = root.main(
            None if arguments is None else list(arguments), prog_name="erllama", standalone_mode=False
        )
    except click.ClickException as error:
        message = io.StringIO()
        error.show(message)
        echo(message.getvalue(), end="", stderr=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    return status if isinstance(status, int) else 0
