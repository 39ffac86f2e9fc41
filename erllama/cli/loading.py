"""Loads a command's model, with a bar while it takes, and opens the cache that its prompts are kept in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import erllama
from erllama.cli.console import is_terminal, progress
from erllama.errors import ModelLoadError


@dataclass(frozen=True, slots=True)
class Setup:
    """How a command loads its model.

    Attributes:
        n_ctx, threads, n_gpu_layers: as of `load_model`; None for its defaults.
        devices: names; none for all GPUs.
        others: further options of `load_model`, by name.
        cache_dir: where prompts are kept; None for the user's cache directory.
        no_cache: keep them in RAM alone.
        quota: most bytes of the directory.
    """

    n_ctx: int | None = None
    threads: int | None = None
    n_gpu_layers: int | None = None
    devices: tuple[str, ...] = ()
    others: Mapping[str, object] = field(default_factory=dict)
    cache_dir: Path | None = None
    no_cache: bool = False
    quota: int = 50 << 30

    def cache(self) -> erllama.Cache:
        """The cache, to be closed; one that keeps nothing where that was asked for."""
        if self.no_cache:
            return erllama.Cache()
        return erllama.Cache(disk=self.cache_dir or True, disk_quota=self.quota)

    @contextmanager
    def model(self, path: Path) -> Iterator[erllama.Model]:
        """The model, loaded; unloaded, and what it computed stored, at the end of a `with`."""
        with self.cache() as cache, self.loaded(path, cache) as model:
            yield model

    def loaded(self, path: Path, cache: erllama.Cache, *, bar: bool = True) -> erllama.Model:
        """The model, loaded with a cache of the caller's; with a bar where somebody watches."""
        options: dict[str, object] = {
            name: value
            for name, value in (
                ("n_ctx", self.n_ctx),
                ("n_threads", self.threads),
                ("n_gpu_layers", self.n_gpu_layers),
                ("devices", list(self.devices) or None),
            )
            if value is not None
        }
        options |= self.others
        if not (bar and is_terminal(stderr=True)):
            return erllama.load_model(path, cache=cache, **options)  # type: ignore[arg-type]
        with progress(f"loading {path.name}") as tell:
            return erllama.load_model(path, cache=cache, on_progress=tell, **options)  # type: ignore[arg-type]


def plain_file(path: Path) -> Path:
    """The path, if there is such a file; what else is wrong with it, loading tells.

    Raises:
        ModelLoadError: there is none.
    """
    if not path.exists():
        raise ModelLoadError(f"{path} does not exist; give the path of a GGUF file")
    return path
