"""Models in the cache of huggingface_hub, which llama.cpp uses, too.

A repository lies at `models--ORG--NAME`, with `refs/REVISION` (a commit), `snapshots/COMMIT/FILE` (a link to a
blob) and `blobs/DIGEST`. A blob of a download in progress ends in ".incomplete". Links may lead out of the
repository: huggingface_hub keeps blobs that several repositories share elsewhere. The cache is the directory of the
variable HF_HUB_CACHE, or `hub` in that of HF_HOME, or `~/.cache/huggingface/hub`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from erllama.models.local_model import LocalModel, ModelFile, check_gguf, model_files, quantization_in
from erllama.models.stores.environment import directory_of, system_cache
from erllama.models.stores.walk import directories, entries, read_small, walk

STORE = "hugging face"
_FOLDER = re.compile(r"models--([A-Za-z0-9_.-]+?)--([A-Za-z0-9_.-]+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def cache_directory() -> Path:
    """Return the directory of the cache; it may not exist."""
    for variable, inner in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if chosen := directory_of(variable):
            return chosen / inner
    return system_cache() / "huggingface" / "hub"


def models(root: Path, store: str = STORE) -> Iterator[LocalModel]:
    """Yield the models of a cache, and the downloads of models that have not ended."""
    for folder in directories(root):
        found = _FOLDER.fullmatch(folder.name)
        if found:
            yield from _repository_models(folder, f"{found[1]}/{found[2]}", store)


def _repository_models(folder: Path, repository: str, store: str) -> Iterator[LocalModel]:
    files: dict[str, ModelFile] = {}  # by the place in the repository
    for snapshot in _snapshots(folder):
        for file in model_files(walk(snapshot)):
            inner = (file.path.parent.relative_to(snapshot) / file.stem).as_posix()
            earlier = files.get(inner)
            if earlier is None or (earlier.problem and not file.problem):
                files[inner] = file
    quantizations = [quantization_in(file.stem) for file in files.values()]
    for inner, file in files.items():
        quantization = quantization_in(file.stem)
        tags = [inner] if not quantization or quantizations.count(quantization) > 1 else [quantization, inner]
        names = [f"{repository}:{tag}" for tag in tags]
        if len(files) == 1:
            names.append(repository)
        aliases = (*(f"hf:{name}" for name in names[1:]), *names, file.stem)
        yield LocalModel(f"hf:{names[0]}", file.path, store, file.n_bytes, aliases, file.problem)
    yield from _unfinished(folder / "blobs", repository, store)


def _snapshots(folder: Path) -> list[Path]:
    """Return the snapshots of a repository: that of "main" first, then the newest ones."""
    main = (read_small(folder / "refs" / "main") or b"").decode("ascii", "replace").strip()
    found = [each for each in directories(folder / "snapshots") if _COMMIT.fullmatch(each.name)]
    return sorted(found, key=lambda each: (each.name == main, each.stat().st_mtime), reverse=True)


def _unfinished(blobs: Path, repository: str, store: str) -> Iterator[LocalModel]:
    for entry in entries(blobs):
        if not entry.name.endswith(".incomplete") or (blobs / entry.name.split(".")[0]).exists():
            continue
        size, problem = check_gguf(Path(entry.path))
        if not problem:  # it begins as a GGUF file: other files of a repository are of no interest
            yield LocalModel(
                f"hf:{repository}",
                Path(entry.path),
                store,
                size,
                problem=f"its download has not ended; run `erllama pull hf:{repository}` with the same tag or file",
            )
