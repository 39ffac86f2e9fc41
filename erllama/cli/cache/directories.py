"""Which cache directories a command means, and which namespaces in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import click

import erllama
from erllama.cache.admin.maintenance import CacheFiles
from erllama.cache.options import default_directory
from erllama.cache.tiers.directory import CacheDirectory, file_system, is_cache
from erllama.cli.console import note
from erllama.cli.options import DIRECTORY

IN_MEMORY = {"tmpfs", "ramfs"}

directories_option = click.option(
    "--dir",
    "-d",
    "directories",
    type=DIRECTORY,
    multiple=True,
    envvar="ERLLAMA_CACHE_DIR",
    help="A cache directory; the user's, on disk and in memory.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="As JSON.")


class Place(NamedTuple):
    """A cache directory, and whether it lies in memory."""

    path: Path
    in_memory: bool


def chosen_directories(given: Sequence[Path]) -> list[Place]:
    """The directories that were named, or those of the user's that there are, perhaps none."""
    found = [path.expanduser().absolute() for path in given] or [
        path for path in usual_directories() if is_cache(path)
    ]
    if not found:
        note(f"nothing is stored yet in {usual_directories()[0]}; --dir names another directory")
    return [Place(path, file_system(path) in IN_MEMORY) for path in dict.fromkeys(found)]


@contextmanager
def opened(given: Sequence[Path]) -> Iterator[list[CacheFiles]]:
    """The chosen directories, open for a `with`."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(CacheFiles(place.path, in_memory=place.in_memory))
            for place in chosen_directories(given)
        ]


def the_disk_directory(given: Sequence[Path], *, make: bool = False) -> Path:
    """The one directory that was named, or the user's on disk.

    Args:
        make: one that does not exist.

    Raises:
        CacheError: several were named, or it cannot be made.
    """
    if len(given) > 1:
        raise erllama.CacheError("several directories; give one --dir")
    root = given[0].expanduser().absolute() if given else usual_directories()[0]
    if make and not is_cache(root):
        try:
            CacheDirectory(root).leave()
        except OSError as error:
            raise erllama.CacheError(f"{root} cannot be made: {error.strerror}") from None
    return root


def usual_directories() -> list[Path]:
    """Those that `disk=True` and `ram_file=True` mean here; the first is on disk."""
    found = [default_directory("disk")]
    try:
        found.append(default_directory("ram_file"))
    except erllama.OptionError:
        pass  # a system without
    return found


def named_namespaces(found_in: Sequence[CacheFiles], prefixes: Sequence[str]) -> set[bytes] | None:
    """The namespaces that were named by their beginnings; None where none was.

    Raises:
        CacheError: a beginning is none's, or several'.
    """
    if not prefixes:
        return None
    known = {namespace.key for files in found_in for namespace in files.namespaces()}
    found = set()
    for prefix in prefixes:
        matching = [key for key in known if prefix and key.hex().startswith(prefix.lower())]
        if len(matching) != 1:
            what = "no namespace begins" if not matching else f"{len(matching)} namespaces begin"
            raise erllama.CacheError(f"{what} with {prefix!r}; `erllama cache stats` lists them")
        found.add(matching[0])
    return found
