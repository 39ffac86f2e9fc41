"""The models of `erllama serve`: those of its arguments, and how all of them are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import erllama
from erllama.cache.sizes import parse_bytes
from erllama.cli.console import is_terminal, progress_bar
from erllama.errors import OptionError
from erllama.models.names import model_path
from erllama.server.conduct.durations import parse_duration
from erllama.server.models import ModelEntry, ModelPool
from erllama.server.models.pool import load_entry
from erllama.server.settings.options import ServerOptions


def parse_model(text: str, *, on_request: bool) -> ModelEntry:
    """Return the model of an argument: a model, or "NAME,ALIAS,…=MODEL". A model is a path, or the name of one.

    A model that is given by its name has that name for clients, too.

    Args:
        on_request: load it on its first request.

    Raises:
        ModelNameError: no model on this machine has the name.
        OptionError: there is no name before the "=", or no model after it.
    """
    names, equals, place = text.rpartition("=")
    if not equals or Path(text).exists():
        path = model_path(text)
        own_name = None if str(path) == str(Path(text).expanduser()) else text
        return ModelEntry(path=path, name=own_name, load="request" if on_request else "start")
    name, *aliases = (each.strip() for each in names.split(","))
    if not name or not all(aliases) or not place:
        raise OptionError(f"{text!r}: pass MODEL, NAME=MODEL, or NAME,ALIAS=MODEL")
    load = "request" if on_request else "start"
    return ModelEntry(path=model_path(place), name=name, aliases=tuple(aliases), load=load)  # type: ignore[arg-type]


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
