"""Loads the model of a command, with a progress bar in a terminal, and opens its cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import erllama
from erllama.cli.console import is_terminal, progress_bar
from erllama.errors import ModelLoadError


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """The options with which a command loads its model and opens its cache.

    Attributes:
        n_ctx, threads, n_gpu_layers: as in `load_model`; None for its defaults.
        devices: names of devices; empty for all GPUs.
        extra: further options of `load_model`, by name.
        cache_dir: the cache directory; None for the user's.
        no_cache: keep prompts in RAM only.
        quota: size limit of the cache directory in bytes; None for the default of `Cache`.
        remote, remote_key_file: as in `Cache`.
        key_file: file of the keys that encrypt the cache directory; None for no encryption.
    """

    n_ctx: int | str | None = None
    threads: int | None = None
    n_gpu_layers: int | None = None
    devices: tuple[str, ...] = ()
    extra: Mapping[str, object] = field(default_factory=dict)
    cache_dir: Path | None = None
    no_cache: bool = False
    quota: int | None = None
    remote: str | None = None
    remote_key_file: Path | None = None
    key_file: Path | None = None

    def open_cache(self) -> erllama.Cache:
        """Open the cache. The caller closes it."""
        if self.no_cache:
            return erllama.Cache()
        options: dict[str, Any] = {} if self.quota is None else {"disk_quota": self.quota}
        if self.remote is not None or self.remote_key_file is not None:
            options |= {"remote": self.remote, "remote_key_file": self.remote_key_file}
        return erllama.Cache(disk=self.cache_dir or True, key_file=self.key_file, **options)

    @contextmanager
    def open_model(self, path: Path) -> Iterator[erllama.Model]:
        """Yield the loaded model; save its prompts and unload it at the end of the `with`."""
        with self.open_cache() as cache, self.load(path, cache) as model:
            yield model

    @property
    def options(self) -> dict[str, object]:
        """The options of `load_model` that were set, by name."""
        own = {
            "n_ctx": self.n_ctx,
            "n_threads": self.threads,
            "n_gpu_layers": self.n_gpu_layers,
            "devices": list(self.devices) or None,
        }
        return {name: value for name, value in own.items() if value is not None} | dict(self.extra)

    def load(self, path: Path, cache: erllama.Cache, *, show_progress: bool = True) -> erllama.Model:
        """Load the model with a cache of the caller, and show a bar if stderr is a terminal."""
        options: dict[str, Any] = self.options
        if not (show_progress and is_terminal(stderr=True)):
            return erllama.load_model(path, cache=cache, **options)
        with progress_bar(f"loading {path.name}") as report:
            return erllama.load_model(path, cache=cache, on_progress=report, **options)


def existing_path(path: Path) -> Path:
    """Return the path if it exists. `load_model` checks everything else.

    Raises:
        ModelLoadError: the path does not exist.
    """
    if not path.exists():
        raise ModelLoadError(f"{path} does not exist; pass the path of a GGUF file")
    return path
