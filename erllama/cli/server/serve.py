"""`erllama serve`: serves models over HTTP."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from io import TextIOWrapper
from logging.handlers import WatchedFileHandler
from pathlib import Path

import click

import erllama
from erllama._runtime.printing import echo, one_line, printable
from erllama.cli.console import format_count
from erllama.cli.loading import ModelOptions
from erllama.cli.options import FILE, model_and_cache_options, parse_size
from erllama.cli.server.memory_cache import memory_cache
from erllama.cli.server.served_models import open_pool, parse_model
from erllama.server.application import make_server
from erllama.server.conduct.key_files import VARIABLE
from erllama.server.reload import Reloader
from erllama.server.settings.listening import ListenOptions, url_of
from erllama.server.settings.mistakes import ConfigurationError
from erllama.server.settings.settings import CommandOptions, Settings, read_settings


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--host", metavar="ADDRESS", help=f"Address to listen on. Default: {ListenOptions().host}.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="N",
    help=f"Port to listen on; 0 for any free one. Default: {ListenOptions().port}.",
)
@click.option(
    "--config", "config", type=FILE, metavar="FILE", help="Configuration file in TOML, such as erllama.toml."
)
@click.option(
    "--api-key-file",
    type=FILE,
    metavar="FILE",
    help=f"File with the keys of clients, one on each line. The variable {VARIABLE} may hold a key, too.",
)
@click.option("--insecure", is_flag=True, help="Listen on other addresses than loopback without a key.")
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="Name of this machine that requests may use; * for any. Can be repeated.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Origin whose web pages may use the server; * for any. Can be repeated.",
)
@click.option(
    "--access-log",
    metavar="FILE",
    help='File for the access log, one line of JSON for each request; "none" for no log. Default: stderr.',
)
@click.option(
    "--check",
    is_flag=True,
    help="Check the configuration and the other options without starting a server. Exit status 1 if one is wrong.",
)
@click.option("--no-page", is_flag=True, help="Serve no chat page at /.")
@click.option("--in-process", is_flag=True, help="Run the models in this process instead of one process each.")
@click.option("--on-request", is_flag=True, help="Load each MODEL when a request needs it, not at the start.")
@click.option(
    "--keep-alive",
    metavar="TIME",
    help="Time after its last request until a model is unloaded, such as 5m or forever, which is the default.",
)
@click.option(
    "--memory-limit",
    type=parse_size,
    metavar="SIZE",
    help="Memory for all models. Idle ones are unloaded for others. Default: nine tenths of what is available.",
)
@click.option(
    "--kv-events",
    metavar="ADDRESS",
    help="Publish which blocks are cached at this address, such as tcp://127.0.0.1:5557, for routers in front of "
    "several replicas. Replays are at the next port.",
)
@model_and_cache_options
def serve(
    models: tuple[str, ...],
    host: str | None,
    port: int | None,
    config: Path | None,
    api_key_file: Path | None,
    insecure: bool,
    allowed_hosts: tuple[str, ...],
    cors_origins: tuple[str, ...],
    access_log: str | None,
    check: bool,
    no_page: bool,
    in_process: bool,
    on_request: bool,
    keep_alive: str | None,
    memory_limit: int | None,
    kv_events: str | None,
    loading: ModelOptions,
) -> int:
    """Serve models over HTTP, with the APIs of OpenAI, Anthropic, llama-server and Ollama.

    MODEL is a GGUF file, or the name of a model on this machine (see `erllama models`). The name, or that of the
    file without .gguf, is the one that clients use. NAME=MODEL gives it another name, and NAME,ALIAS=MODEL further
    ones; the alias * is for all names that no model has. Without any MODEL, here or in the configuration file, the
    command serves erllama's demo model. Options of the command override those of the configuration file, except
    that an option of a model in the file is the model's own.

    \b
      erllama serve model.gguf
      erllama serve chat.gguf embeddings.gguf --port 9000 --n-ctx 32768
      erllama serve 'small,*=small.gguf' large=large.gguf --on-request --keep-alive 10m
      erllama serve --config erllama.toml
    """
    command = CommandOptions(
        config=config,
        models=[parse_model(text, on_request=on_request) for text in models],
        api_key_file=api_key_file,
        listen=_given(host=host, port=port, insecure=insecure or None),
        server=_given(
            allowed_hosts=allowed_hosts or None,
            cors_origins=cors_origins or None,
            model_keep_alive=keep_alive,
            memory_limit=memory_limit,
            page=False if no_page else None,
        ),
        cache=_given(
            disk=loading.cache_dir,
            disk_quota=loading.quota,
            key_file=loading.key_file,
            remote=loading.remote,
            remote_key_file=loading.remote_key_file,
        ),
        load={**loading.options, **_given(kv_events=kv_events)},
        in_process=in_process,
        access_log=access_log,
    )
    if check:
        return _check(command)
    settings = read_settings(command)
    with ExitStack() as stack:
        stack.enter_context(_no_early_hangups())
        bound = stack.enter_context(settings.listen.bind())  # before the models, whose loading takes long
        stack.enter_context(_log_access(settings.access_log))
        cache = stack.enter_context(_open_cache(loading, settings.cache, in_process))
        pool = stack.enter_context(open_pool(settings.models, cache, settings.options))
        server = make_server(pool, settings.options)
        server.configured_pins.set(settings.pins, pool, has_keys=bool(settings.options.keys))
        from erllama.server.run import run  # uvicorn is imported only if all else is right

        logging.getLogger("erllama.server.reload").setLevel(logging.INFO)  # an administrator waits for its report
        reloader = Reloader(server, settings, lambda: read_settings(command))
        run(server, settings.listen, bound, lambda: _print_address(url_of(bound), settings), reloader.request)
    return 0


def _given(**options: object) -> dict[str, object]:
    """Return the options that the command line sets."""
    return {name: value for name, value in options.items() if value is not None}


def _check(command: CommandOptions) -> int:
    """Print what is wrong with the configuration, or what it serves. Return the exit status."""
    try:
        settings = read_settings(command)
    except ConfigurationError as error:
        for mistake in error.mistakes:
            echo(printable(one_line(str(mistake))))
        return 1
    names = ", ".join(entry.id for entry in settings.models)
    n_keys = format_count(len(settings.options.keys), "key")
    address = f"{settings.listen.host}, port {settings.listen.port}"
    echo(printable(one_line(f"The configuration is valid: {names} on {address}, with {n_keys}.")))
    return 0


def _open_cache(
    loading: ModelOptions, configured: Mapping[str, object], in_process: bool
) -> AbstractContextManager[erllama.Cache]:
    if loading.no_cache:
        return erllama.Cache() if in_process else memory_cache(configured)
    return erllama.Cache(**configured)  # type: ignore[arg-type]


@contextmanager
def _no_early_hangups() -> Iterator[None]:
    """Ignore SIGHUP while models are loaded and saved: it would end the process. Without effect in a terminal."""
    if sys.stderr.isatty():
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@contextmanager
def _log_access(where: str) -> Iterator[None]:
    """Write the access log to stderr or to a file, which another program may rotate."""
    log = logging.getLogger("erllama.server.access")
    handler: logging.Handler = logging.NullHandler()
    if where == "stderr":
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Printable("%(message)s"))
    elif where != "none":
        handler = _PrivateFile(where, encoding="utf-8")
    log.setLevel(logging.WARNING if where == "none" else logging.INFO)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
        log.propagate = True
        log.setLevel(logging.NOTSET)


class _PrivateFile(WatchedFileHandler):
    """A file that only its owner can read, if it is new: with `log_prompts` it has prompts."""

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return open(descriptor, self.mode, encoding=self.encoding, errors=self.errors)  # type: ignore[return-value]


class _Printable(logging.Formatter):
    """Escapes what a terminal would not print: names and paths come from clients."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _announce(url: str, settings: Settings) -> None:
    """Print the address and a request to try."""
    names = [entry.id for entry in settings.models]
    body = json.dumps({"model": names[0], "messages": [{"role": "user", "content": "Hello"}]})
    key = " -H 'authorization: Bearer KEY'" if settings.options.keys else ""
    try_it = f"Open {url}/ in a browser, or try it:" if settings.options.page else "Try it:"
    echo(f"erllama serves {', '.join(names)} on {url}. Ctrl-C stops it. {try_it}")
    echo(f"  curl {url}/v1/chat/completions -H 'content-type: application/json'{key} -d {_quoted(body)}")
    sys.stdout.flush()


def _print_address(url: str, settings: Settings) -> None:
    """Print the address, if somebody reads it: the server goes on without its terminal or pipe."""
    try:
        _announce(url, settings)
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the end, which flushes it


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
