"""Models in the cache of llama.cpp's own commands.

Earlier releases store `ORG_REPOSITORY_FILE.gguf` in one directory, with a manifest of each download, which has the
repository, at `manifest=ORG=REPOSITORY=TAG.json`. A download in progress ends in ".downloadInProgress". Later
releases use the cache of huggingface_hub, also in the directory of the variable LLAMA_CACHE.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from erllama.engine.backends.gguf_parts import split_name
from erllama.models.local_model import LocalModel, model_files
from erllama.models.stores import hugging_face
from erllama.models.stores.environment import directory_of, system_cache
from erllama.models.stores.walk import entries, read_small

STORE = "llama.cpp"
_MANIFEST = re.compile(r"manifest=([A-Za-z0-9_.-]+)=([A-Za-z0-9_.-]+)=([A-Za-z0-9_.-]+)\.json")
_IN_PROGRESS = ".gguf.downloadInProgress"


def roots() -> list[Path]:
    """Return the directories where models may be."""
    if chosen := directory_of("LLAMA_CACHE"):
        return [chosen]
    if sys.platform == "darwin":
        return [Path.home() / "Library" / "Caches" / "llama.cpp"]
    return [system_cache() / "llama.cpp"]


def models(root: Path) -> Iterator[LocalModel]:
    """Yield the models of a cache, and the downloads that have not ended."""
    found = entries(root)
    by_file = dict(_manifest_names(Path(entry.path)) for entry in found if entry.name.startswith("manifest="))
    for file in model_files(Path(entry.path) for entry in found if entry.name.endswith(".gguf")):
        name = by_file.get(file.stem, file.stem)
        aliases = (name.removeprefix("hf:"), file.stem) if name != file.stem else ()
        yield LocalModel(name, file.path, STORE, file.n_bytes, aliases, file.problem)
    for entry in found:
        if entry.name.endswith(_IN_PROGRESS):
            path = Path(entry.path)
            stem, size = entry.name.removesuffix(_IN_PROGRESS), path.stat().st_size if path.is_file() else 0
            yield LocalModel(
                stem, path, STORE, size, problem="its download has not ended; resume it with llama.cpp"
            )
    yield from hugging_face.models(root, STORE)


def _manifest_names(manifest: Path) -> tuple[str, str]:
    """Return the stem of the file that a manifest is about, and the name of its model; empty without them."""
    found = _MANIFEST.fullmatch(manifest.name)
    try:
        file = str(json.loads(read_small(manifest) or b"")["ggufFile"]["rfilename"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return "", ""
    if not found:
        return "", ""
    organization, repository, tag = found.groups()
    stem, _, _ = split_name(f"{organization}_{repository}_{file.replace('/', '_')}")
    return stem, f"hf:{organization}/{repository}:{tag}"
