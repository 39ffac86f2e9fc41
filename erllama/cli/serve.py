"""`erllama serve`: serves models over HTTP."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from io import TextIOWrapper
from logging.handlers import WatchedFileHandler
from pathlib import Path

import click

import erllama
from erllama._runtime.printing import echo, printable
from erllama.cli.loading import ModelOptions, existing_path
from erllama.cli.memory_cache import memory_cache
from erllama.cli.options import FILE, model_and_cache_options
from erllama.server.application import make_server
from erllama.server.conduct.key_files import VARIABLE, read_key_file, read_key_variable
from erllama.server.conduct.keys import ApiKey
from erllama.server.configuration import Configuration, ModelEntry, read_configuration
from erllama.server.listening import ListenOptions, url_of
from erllama.server.models import ServedModel
from erllama.server.options import ServerOptions
from erllama.server.pins import PinEntry, begin_pinning


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...", type=click.Path(path_type=Path))
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
@click.option("--in-process", is_flag=True, help="Run the models in this process instead of one process each.")
@model_and_cache_options
def serve(
    models: tuple[Path, ...],
    host: str | None,
    port: int | None,
    config: Path | None,
    api_key_file: Path | None,
    insecure: bool,
    allowed_hosts: tuple[str, ...],
    cors_origins: tuple[str, ...],
    access_log: str | None,
    in_process: bool,
    loading: ModelOptions,
) -> int:
    """Serve models over HTTP, with the APIs of OpenAI, Anthropic, llama-server and Ollama.

    MODEL is a GGUF file. Its name without .gguf is the name that clients use. Without any MODEL, here or in the
    configuration file, the command serves erllama's demo model. Options of the command override those of the
    configuration file, except that an option of a model in the file is the model's own.

    \b
      erllama serve model.gguf
      erllama serve chat.gguf embeddings.gguf --port 9000 --n-ctx 32768
      erllama serve --config erllama.toml
    """
    configuration = read_configuration(config) if config is not None else Configuration()
    listen = ListenOptions(**_chosen(configuration.listen, host=host, port=port, insecure=insecure or None))  # type: ignore[arg-type]
    keys = _keys(configuration, api_key_file)
    listen.check_keys(bool(keys))
    if not listen.is_loopback and listen.host[0].isalpha():
        allowed_hosts = (*allowed_hosts, listen.host)
    lists = {"allowed_hosts": allowed_hosts or None, "cors_origins": cors_origins or None}
    options = ServerOptions.of(_chosen(configuration.server, **lists) | {"keys": keys})
    entries = [ModelEntry(path=existing_path(path)) for path in models] + list(configuration.models)
    with ExitStack() as stack:
        bound = stack.enter_context(listen.bind())  # before the models, whose loading takes long
        stack.enter_context(_log_access(access_log or configuration.access_log or "stderr"))
        cache = stack.enter_context(_open_cache(loading, configuration.cache, in_process))
        served = [
            stack.enter_context(_load(entry, loading, cache, in_process))
            for entry in entries or [ModelEntry(path=erllama.demo_model())]
        ]
        server = make_server(served, options)
        for each, pins in _pins_of(configuration.pins, served):
            begin_pinning(each, pins, has_keys=bool(keys))
        from erllama.server.run import run  # uvicorn is imported only if all else is right

        run(server, listen, bound, lambda: _print_address(url_of(bound), served, bool(keys)))
    return 0


def _chosen(configured: Mapping[str, object], **given: object) -> dict[str, object]:
    """Return the options of the configuration, with those of the command in their place."""
    return {**configured, **{name: value for name, value in given.items() if value is not None}}


def _keys(configuration: Configuration, file: Path | None) -> tuple[ApiKey, ...]:
    keys = [*configuration.keys, *(read_key_file(file) if file is not None else [])]
    secrets = {key.secret for key in keys}
    return (*keys, *(key for key in read_key_variable() if key.secret not in secrets))


def _open_cache(
    loading: ModelOptions, configured: Mapping[str, object], in_process: bool
) -> AbstractContextManager[erllama.Cache]:
    if loading.no_cache:
        return erllama.Cache() if in_process else memory_cache(configured)
    options = _chosen({"disk": True, **configured}, disk=loading.cache_dir, disk_quota=loading.quota)
    return erllama.Cache(**options)  # type: ignore[arg-type]


@contextmanager
def _load(
    entry: ModelEntry, loading: ModelOptions, cache: erllama.Cache, in_process: bool
) -> Iterator[ServedModel]:
    """Yield a loaded model; save its prompts and unload it at the end of the `with`."""
    process = False if in_process else entry.options.get("process", loading.extra.get("process", True))
    extra = {**loading.extra, **entry.options, "process": process, "id": entry.name or entry.path.stem}
    with replace(loading, extra=extra).load(existing_path(entry.path), cache) as model:
        yield ServedModel(model, entry.aliases, entry.special_tokens_in_content, file=entry.path.name)


def _pins_of(
    pins: Sequence[PinEntry], served: Sequence[ServedModel]
) -> Iterator[tuple[ServedModel, list[PinEntry]]]:
    """Yield each model with its pins.

    Raises:
        OptionError: a pin names a model that the server does not have.
    """
    names = [(each.name, *each.aliases) for each in served]
    for pin in pins:
        if not any(pin.model in known for known in names):
            raise erllama.OptionError(
                f"a pin names the model {pin.model!r}; the server has {', '.join(each.name for each in served)}"
            )
    for each, known in zip(served, names, strict=True):
        yield each, [pin for pin in pins if pin.model in known]


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


def _print_address(url: str, served: Sequence[ServedModel], has_keys: bool) -> None:
    """Print the address and a request to try."""
    body = json.dumps({"model": served[0].name, "messages": [{"role": "user", "content": "Hello"}]})
    key = " -H 'authorization: Bearer KEY'" if has_keys else ""
    names = ", ".join(each.name for each in served)
    echo(f"erllama serves {names} on {url}. Ctrl-C stops it. Try it:")
    echo(f"  curl {url}/v1/chat/completions -H 'content-type: application/json'{key} -d {_quoted(body)}")
    sys.stdout.flush()


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
