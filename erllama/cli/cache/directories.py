"""The cache directories and namespaces that a command of `erllama cache` works on."""

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
from erllama.cache.tiers.key_state import is_encrypted
from erllama.cli.console import print_note
from erllama.cli.options import DIRECTORY

MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs"}

directories_option = click.option(
    "--dir",
    "-d",
    "directories",
    type=DIRECTORY,
    multiple=True,
    envvar="ERLLAMA_CACHE_DIR",
    help="Cache directory. Can be repeated. Default: the user's, on disk and in memory.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class CacheLocation(NamedTuple):
    """A cache directory, and whether its file system is in memory."""

    path: Path
    in_memory: bool


def resolve_directories(paths: Sequence[Path]) -> list[CacheLocation]:
    """Return the directories that the user named, or the user's own that exist."""
    found = [path.expanduser().absolute() for path in paths] or [
        path for path in default_directories() if is_cache(path)
    ]
    if not found:
        print_note(f"the cache directory {default_directories()[0]} does not exist yet; --dir chooses another one")
    return [CacheLocation(path, file_system(path) in MEMORY_FILE_SYSTEMS) for path in dict.fromkeys(found)]


@contextmanager
def open_directories(paths: Sequence[Path], key_file: Path | None) -> Iterator[list[CacheFiles]]:
    """Open the directories of `resolve_directories`; close them at the end of the `with`.

    Args:
        key_file: file of the keys of those that are encrypted.
    """
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                CacheFiles(location.path, in_memory=location.in_memory, key_file=key_of(location.path, key_file))
            )
            for location in resolve_directories(paths)
        ]


def key_of(root: Path, key_file: Path | None) -> Path | None:
    """Return the key file of a directory: none if the directory is a cache that is not encrypted."""
    return key_file if key_file is None or not is_cache(root) or is_encrypted(root) else None


def single_directory(paths: Sequence[Path], *, create: bool = False) -> Path:
    """Return the one directory that the user named, or the user's own on disk.

    Args:
        create: create the directory if it does not exist.

    Raises:
        CacheError: the user named several directories, or the directory cannot be created.
    """
    if len(paths) > 1:
        raise erllama.CacheError(f"{len(paths)} directories; pass --dir once")
    root = paths[0].expanduser().absolute() if paths else default_directories()[0]
    if create and not is_cache(root):
        try:
            CacheDirectory(root).leave()
        except OSError as error:
            raise erllama.CacheError(f"{root} cannot be created: {error.strerror}") from None
    return root


def default_directories() -> list[Path]:
    """Return the directories of `disk=True` and `ram_file=True` on this system; the first is on disk."""
    found = [default_directory("disk")]
    try:
        found.append(default_directory("ram_file"))
    except erllama.OptionError:
        pass  # this system has no file system in memory
    return found


def matching_namespaces(opened: Sequence[CacheFiles], prefixes: Sequence[str]) -> set[bytes] | None:
    """Return the namespaces whose keys start with the prefixes; None, for all, if there are no prefixes.

    Raises:
        CacheError: a prefix matches no namespace, or several.
    """
    if not prefixes:
        return None
    known = {namespace.key for files in opened for namespace in files.namespaces()}
    found = set()
    for prefix in prefixes:
        matching = [key for key in known if prefix and key.hex().startswith(prefix.lower())]
        if len(matching) != 1:
            what = "no namespace starts" if not matching else f"{len(matching)} namespaces start"
            raise erllama.CacheError(f"{what} with {prefix!r}; `erllama cache stats` lists the namespaces")
        found.add(matching[0])
    return found
