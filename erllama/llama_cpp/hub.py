"""Files of the Hugging Face hub for `Llama.from_pretrained`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from erllama.checks import import_optional
from erllama.errors import OptionError

StrPath = str | os.PathLike[str]


def download(
    repo_id: str,
    filename: str,
    additional_files: Sequence[str] = (),
    *,
    local_dir: StrPath | None = None,
    cache_dir: StrPath | None = None,
) -> Path:
    """Download files of a repository that are not yet on this machine.

    Args:
        filename: path of the model file in the repository, or a pattern that one file matches.
        additional_files: further paths or patterns, such as those of the other parts of a split model.
        local_dir: directory for the files; None for the hub's cache.
        cache_dir: directory of the hub's cache; None for the default one.

    Returns:
        the path of the model file.

    Raises:
        OptionError: no file, or more than one, matches a pattern.
        MissingPackage: huggingface_hub is not installed.
    """
    hub = import_optional(
        "huggingface_hub",
        needed_by="Llama.from_pretrained",
        package="huggingface_hub",
        install="huggingface_hub",
    )
    names = hub.list_repo_files(repo_id)
    paths = []
    for pattern in (filename, *additional_files):
        found = [name for name in names if fnmatch(name, pattern)]
        if len(found) != 1:
            problem = "no file" if not found else f"{len(found)} files"
            raise OptionError(f"{problem} of {repo_id} match {pattern!r}; pass one of {', '.join(found or names)}")
        options = {"local_dir": local_dir, "cache_dir": cache_dir}
        paths.append(Path(hub.hf_hub_download(repo_id=repo_id, filename=found[0], **options)))
    return paths[0]
