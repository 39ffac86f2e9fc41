"""Models of the Hugging Face hub, downloaded into the cache of huggingface_hub or into a directory.

huggingface_hub supplies the endpoint (`HF_ENDPOINT`), the token, the offline mode (`HF_HUB_OFFLINE`) and the
session. `transfer` gets the files, because huggingface_hub neither continues a download of an earlier process nor
checks digests. A file has its place in the cache only when its digest is right.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from erllama.cache.sizes import format_size
from erllama.checks import import_optional, shown
from erllama.engine.backends.gguf_parts import split_name
from erllama.errors import DownloadError, LoadCancelled, OptionError
from erllama.models.download.places import (
    COMMIT,
    CachePlace,
    DirectoryPlace,
    HubFile,
    is_inside,
    snapshot,
    write_reference,
)
from erllama.models.download.transfer import TransferError, get_file, has_digest
from erllama.models.local_model import model_files, quantization_in
from erllama.models.stores.hugging_face import cache_directory
from erllama.models.stores.walk import walk

# Preferred where the name of a model has no quantization: the usual compromise, as in llama.cpp and Ollama.
_DEFAULT_QUANTIZATION = "Q4_K_M"
_REPOSITORY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TIMEOUT = 30.0  # seconds without a byte
# The hub serves larger files only through its own protocol.
_LARGEST_HTTP_FILE = 50 * 10**9

ProgressCallback = Callable[[float], object]
StrPath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class _HubModel:
    """A model in a repository: one file, or all parts of a split one. `stem` is its place without ".gguf"."""

    stem: str
    files: tuple[HubFile, ...]


def pull_from_hub(
    repository: str,
    choice: str | None = None,
    *,
    revision: str | None = None,
    cache_dir: StrPath | None = None,
    local_dir: StrPath | None = None,
    additional_files: Sequence[str] = (),
    on_progress: ProgressCallback | None = None,
) -> Path:
    """Download a model of the hub, or continue a download. A model that is there already is only checked.

    Args:
        repository: "ORG/NAME".
        choice: a file name, a pattern such as "*Q4_K_M.gguf", or a quantization. None for Q4_K_M, or for the only
            model of the repository.
        revision: a branch, a tag or a commit; None for "main".
        cache_dir: directory of the cache; None for that of huggingface_hub.
        local_dir: directory for the files, under their names in the repository; None for the cache.
        additional_files: names of further files, or patterns that one file each matches.
        on_progress: called with the fraction done, 0.0 to 1.0. Returning False cancels, and what was downloaded is
            kept.

    Returns:
        The GGUF file; the first part of a split model.

    Raises:
        DownloadError: the hub cannot be reached, there is no such repository or file, the repository is gated, the
            disk is full, or a digest is wrong.
        LoadCancelled: `on_progress` returned False.
        MissingPackage: huggingface_hub is not installed.
        OptionError: the repository's name is not one.
    """
    if not isinstance(repository, str) or not _REPOSITORY.fullmatch(repository) or ".." in repository:
        raise OptionError(f"repo={shown(repository)}; pass ORG/NAME, such as bartowski/SmolLM2-135M-Instruct-GGUF")
    hub = _import_hub()
    root = Path(cache_dir).expanduser() if cache_dir is not None else cache_directory()
    folder = root / f"models--{repository.replace('/', '--')}"
    local = Path(local_dir).expanduser() if local_dir is not None else None
    if hub.constants.HF_HUB_OFFLINE:
        directory = local or snapshot(folder, revision)
        return _downloaded(directory, repository, choice, additional_files, "HF_HUB_OFFLINE is set")
    try:
        with _explained(hub, repository):
            info = hub.HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=_TIMEOUT)
    except TransferError as error:
        directory = local or snapshot(folder, revision)
        return _downloaded(directory, repository, choice, additional_files, str(error))
    commit = str(info.sha)
    if not COMMIT.fullmatch(commit):
        raise DownloadError(f"the hub names the commit {shown(commit)} of {repository}, which is not one")
    files = _files(info.siblings or ())
    chosen = {file.name: file for file in _chosen(_models(files), repository, choice).files}
    by_name = {file.name: file for file in files}
    for name in _additional(by_name, repository, additional_files):
        chosen[name] = by_name[name]
    place = DirectoryPlace(local) if local is not None else CachePlace(folder, commit)
    path = _RepositoryDownload(hub, repository, commit, tuple(chosen.values()), place, on_progress).run()
    if local is None and (revision is None or not COMMIT.fullmatch(revision)):
        write_reference(folder, revision or "main", commit)
    return path


def _import_hub() -> ModuleType:
    """Return huggingface_hub with the submodules in use."""
    for module in (
        "huggingface_hub",
        "huggingface_hub.constants",
        "huggingface_hub.errors",
        "huggingface_hub.utils",
    ):
        hub = import_optional(
            module,
            needed_by="a download from the Hugging Face hub",
            package="huggingface_hub",
            install="'erllama[hub]'",
        )
    return sys.modules[hub.__name__.partition(".")[0]]


class _RepositoryDownload:
    """The download of files of a repository to their place."""

    def __init__(
        self,
        hub: ModuleType,
        repository: str,
        commit: str,
        files: Sequence[HubFile],
        place: CachePlace | DirectoryPlace,
        on_progress: ProgressCallback | None,
    ) -> None:
        self._hub, self._repository, self._commit = hub, repository, commit
        self._files, self._place, self._on_progress = files, place, on_progress
        self._n_bytes = sum(file.n_bytes for file in files)
        self._done = 0  # bytes of the files before the current one

    def run(self) -> Path:
        """Get the files that are missing, and return the first one."""
        paths = [self._get(file) for file in self._files]
        return paths[0]

    def _get(self, file: HubFile) -> Path:
        target = self._place.target(file)
        if not has_digest(target, file.n_bytes, file.digest):
            self._place.remove_damaged(target)
            if file.n_bytes > _LARGEST_HTTP_FILE:
                raise DownloadError(
                    f"{file.name} has {format_size(file.n_bytes)}, and the hub serves files of more than 50 GB "
                    f"only through its own protocol; run `hf download {self._repository} {file.name}`"
                )
            partial = target.with_name(f"{file.digest}.incomplete")
            source = _HubSource(self._hub, self._repository, self._commit, file.name)
            get_file(source, target, partial, file.n_bytes, file.digest, self._report)
        self._done += file.n_bytes
        return self._place.link(file)

    def _report(self, n_bytes: int) -> None:
        if self._on_progress is not None:
            fraction = (self._done + n_bytes) / self._n_bytes if self._n_bytes else 1.0
            if self._on_progress(fraction) is False:
                raise LoadCancelled(f"{self._repository}: on_progress cancelled the download")


class _HubSource:
    """A file of the hub, as a `transfer.Source`."""

    def __init__(self, hub: ModuleType, repository: str, commit: str, file: str) -> None:
        self._hub, self._repository, self._file = hub, repository, file
        self._url = hub.hf_hub_url(repository, file, revision=commit)

    @contextmanager
    def open(self, offset: int) -> Iterator[tuple[int, Callable[[], bytes]]]:
        session = self._hub.utils.get_session()
        headers = self._hub.utils.build_hf_headers(library_name="erllama")
        headers |= {"Accept-Encoding": "identity", **({"Range": f"bytes={offset}-"} if offset else {})}
        with _explained(self._hub, self._repository):
            # The session drops the token when it follows a redirect to another host.
            with session.stream(
                "GET", self._url, headers=headers, timeout=_TIMEOUT, follow_redirects=True
            ) as response:
                if response.status_code != 416:
                    self._hub.utils.hf_raise_for_status(response)
                pieces = response.iter_raw()

                def next_piece() -> bytes:
                    with _explained(self._hub, self._repository):
                        return next(pieces, b"")

                yield response.status_code, next_piece


@contextmanager
def _explained(hub: ModuleType, repository: str) -> Iterator[None]:
    """Turn errors of huggingface_hub into errors of erllama: a `TransferError` if another attempt may succeed."""
    errors = hub.errors
    http_error = import_module(type(hub.utils.get_session()).__module__.partition(".")[0]).HTTPError
    try:
        yield
    except errors.GatedRepoError:
        raise DownloadError(
            f"{repository} is gated: its owner grants access on request. Ask for it at "
            f"{hub.constants.ENDPOINT}/{repository}, then run `hf auth login`, or set HF_TOKEN to your token"
        ) from None
    except errors.RepositoryNotFoundError:
        raise DownloadError(
            f"there is no repository {repository} at {hub.constants.ENDPOINT}, or it is private; check the name, "
            "or run `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise DownloadError(f"{repository} has no such revision; leave it out for main") from None
    except errors.EntryNotFoundError:
        raise DownloadError(f"a file of {repository} has disappeared from the hub; try again") from None
    except errors.OfflineModeIsEnabled as error:
        raise TransferError(str(error)) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        message = f"the hub answers {status} for {repository}"
        if status in (408, 429) or status >= 500:
            raise TransferError(message) from None
        raise DownloadError(f"{message}: {error.server_message or 'no reason'}") from None
    except (http_error, ConnectionError, TimeoutError) as error:
        raise TransferError(f"{type(error).__name__}: {error or 'the connection failed'}") from None


def _files(siblings: Sequence[Any]) -> list[HubFile]:
    """Return the files of a repository that have a digest. Names that would leave its directory are left out."""
    files = []
    for sibling in siblings:
        name, lfs = str(sibling.rfilename), sibling.lfs
        digest, size = (lfs.sha256, lfs.size) if lfs is not None else (sibling.blob_id, sibling.size)
        pattern = _SHA256 if lfs is not None else COMMIT
        if is_inside(name) and pattern.fullmatch(str(digest)) and isinstance(size, int) and size >= 0:
            files.append(HubFile(name, size, str(digest)))
    return files


def _models(files: Sequence[HubFile]) -> list[_HubModel]:
    """Return the GGUF models among the files of a repository. They have a SHA-256."""
    groups: dict[tuple[str, int], dict[int, HubFile]] = {}
    for file in files:
        place = PurePosixPath(file.name)
        if file.name.endswith(".gguf") and "mmproj" not in place.name.lower() and _SHA256.fullmatch(file.digest):
            stem, part, count = split_name(place.name)
            groups.setdefault((str(place.parent / stem), count), {})[part] = file
    return [
        _HubModel(stem, tuple(parts[part] for part in sorted(parts)))
        for (stem, count), parts in sorted(groups.items())
        if len(parts) == count
    ]


def _additional(names: Iterable[str], repository: str, wanted: Sequence[str]) -> list[str]:
    """Return the additional files: for each name or pattern, the one file that it matches.

    Raises:
        DownloadError: no file matches, or several do.
    """
    names = sorted(names)
    found = []
    for pattern in wanted:
        matching = [pattern] if pattern in names else [name for name in names if fnmatchcase(name, pattern)]
        if len(matching) != 1:
            problem = "no file" if not matching else f"{len(matching)} files"
            listed = ", ".join((matching or names)[:8])
            raise DownloadError(f"{problem} of {repository} match {shown(pattern)}; choose one of {listed}")
        found += matching
    return found


def _chosen(models: Sequence[_HubModel], repository: str, choice: str | None) -> _HubModel:
    """Return the model that was asked for.

    Raises:
        DownloadError: there is none, or several.
    """
    if choice is None:
        preferred = _matching(models, _DEFAULT_QUANTIZATION)
        found = models if len(models) == 1 else preferred
    else:
        found = _matching(models, choice)
    if len(found) == 1:
        return found[0]
    stems = sorted(model.stem for model in found or models)
    tags = [quantization_in(stem) or stem for stem in stems]
    listed = ", ".join(tags if len(set(tags)) == len(tags) else stems)
    if not models:
        raise DownloadError(f"{repository} has no GGUF model; look for a repository whose name ends in -GGUF")
    asked = "without a tag" if choice is None else f"with {shown(choice)}"
    reason = f"has several models {asked}" if found else f"has no model {asked}"
    raise DownloadError(f"{repository} {reason}; choose one of {listed}, as in `erllama pull hf:{repository}:TAG`")


def _matching(models: Sequence[_HubModel], choice: str) -> list[_HubModel]:
    """Return the models whose file has this name, matches this pattern, or has this quantization."""
    wanted = choice.removesuffix(".gguf")
    exact = [m for m in models if wanted in (m.stem, PurePosixPath(m.stem).name) or choice == m.files[0].name]
    if exact:
        return exact
    if any(mark in choice for mark in "*?["):
        return [m for m in models if any(fnmatchcase(file.name, choice) for file in m.files)]
    return [m for m in models if quantization_in(m.stem) == choice.upper()]


def _downloaded(
    directory: Path | None, repository: str, choice: str | None, additional: Sequence[str], reason: str
) -> Path:
    """Return a model that was downloaded before, while the hub cannot be reached.

    Raises:
        DownloadError: it is not in the directory.
    """
    files = [file for file in model_files(walk(directory)) if not file.problem] if directory is not None else []
    if directory is None or not files:
        raise DownloadError(f"{repository} is not downloaded yet, and the hub cannot be reached: {reason}")
    by_stem = {(file.path.parent.relative_to(directory) / file.stem).as_posix(): file for file in files}
    models = [_HubModel(stem, (HubFile(f"{stem}.gguf", file.n_bytes, ""),)) for stem, file in by_stem.items()]
    if additional:
        names = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
        _additional(names, repository, additional)
    return by_stem[_chosen(models, repository, choice).stem].path
