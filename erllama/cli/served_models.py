"""The models of `erllama serve`: those of its arguments and of the configuration file, and how they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import erllama
from erllama.cache.sizes import parse_bytes
from erllama.cli.console import is_terminal, progress_bar
from erllama.cli.loading import ModelOptions, existing_path
from erllama.errors import OptionError
from erllama.server.conduct.durations import parse_duration
from erllama.server.models import ModelEntry, ModelPool
from erllama.server.models.pool import load_entry
from erllama.server.options import ServerOptions


def model_entries(
    arguments: Sequence[str],
    configured: Sequence[ModelEntry],
    loading: ModelOptions,
    *,
    in_process: bool,
    on_request: bool,
) -> list[ModelEntry]:
    """Return the models to serve, with all options of their loads; the demo model if there is none.

    Args:
        arguments: the command's MODELs.
        configured: those of the configuration file.
        loading: options of the command, for models that do not set them.
        in_process: run all models in this process.
        on_request: load the command's MODELs on their first request.

    Raises:
        ModelLoadError: a file does not exist.
        OptionError: an argument has no name before its "=".
    """
    entries = [_entry(text, on_request) for text in arguments] + list(configured)
    if not entries:
        entries = [ModelEntry(path=erllama.demo_model(), load="request" if on_request else "start")]
    return [_with_options(entry, loading, in_process) for entry in entries]


def _entry(text: str, on_request: bool) -> ModelEntry:
    """Return the model of an argument: a path, or "NAME,ALIAS,…=PATH"."""
    names, equals, place = text.rpartition("=")
    if not equals or Path(text).exists():
        return ModelEntry(path=Path(text), load="request" if on_request else "start")
    name, *aliases = (each.strip() for each in names.split(","))
    if not name or not all(aliases) or not place:
        raise OptionError(f"{text!r}: pass PATH, NAME=PATH, or NAME,ALIAS=PATH")
    load = "request" if on_request else "start"
    return ModelEntry(path=Path(place), name=name, aliases=tuple(aliases), load=load)  # type: ignore[arg-type]


def _with_options(entry: ModelEntry, loading: ModelOptions, in_process: bool) -> ModelEntry:
    process = False if in_process else entry.options.get("process", loading.extra.get("process", True))
    options = {**loading.options, **entry.options, "process": process}
    return replace(entry, path=existing_path(entry.path), options=options)


@contextmanager
def open_pool(entries: Sequence[ModelEntry], cache: erllama.Cache, options: ServerOptions) -> Iterator[ModelPool]:
    """Yield the models of a server, those that are loaded at the start already. Unload them at the end."""
    showing = is_terminal(stderr=True)

    def load(entry: ModelEntry, goes_on: Callable[[float], bool]) -> erllama.Model:
        if not showing:
            return load_entry(entry, cache, goes_on)
        with progress_bar(f"loading {entry.path.name}") as report:

            def show(fraction: float) -> bool:
                report(fraction)
                return goes_on(fraction)

            return load_entry(entry, cache, show)

    limit = options.memory_limit
    pool = ModelPool(
        entries,
        cache=cache,
        load=load,
        keep_alive=parse_duration("model_keep_alive", options.model_keep_alive),
        memory_limit=None if limit is None else parse_bytes("memory_limit", limit),
        memory_wait=options.memory_wait,
        memory_pressure=options.memory_pressure,
    )
    try:
        pool.load_at_start()
        showing = False
        yield pool
    finally:
        pool.close()
