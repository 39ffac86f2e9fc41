"""Models of the Hugging Face hub, downloaded into the cache of huggingface_hub.

huggingface_hub supplies the endpoint (`HF_ENDPOINT`), the token, the offline mode (`HF_HUB_OFFLINE`) and the
session. `transfer` gets the files, because huggingface_hub neither continues a download of an earlier process nor
checks digests. A file has its place in the cache only when its digest is right.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
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
from erllama.models.download.transfer import TransferError, file_digest, get_file
from erllama.models.local_model import model_files, quantization_in
from erllama.models.stores.hugging_face import cache_directory
from erllama.models.stores.walk import read_small, walk

# Preferred where the name of a model has no quantization: the usual compromise, as in llama.cpp and Ollama.
_DEFAULT_QUANTIZATION = "Q4_K_M"
_REPOSITORY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TIMEOUT = 30.0  # seconds without a byte
# The hub serves larger files only through its own protocol.
_LARGEST_HTTP_FILE = 50 * 10**9

ProgressCallback = Callable[[float], object]


@dataclass(frozen=True, slots=True)
class _HubFile:
    """A file of a repository: its place, its size in bytes and its SHA-256."""

    name: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class _HubModel:
    """A model in a repository: one file, or all parts of a split one. `stem` is its place without ".gguf"."""

    stem: str
    files: tuple[_HubFile, ...]


def pull_from_hub(
    repository: str,
    choice: str | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    on_progress: ProgressCallback | None = None,
) -> Path:
    """Download a model of the hub, or continue a download. A model that is there already is only checked.

    Args:
        repository: "ORG/NAME".
        choice: a file name, a pattern such as "*Q4_K_M.gguf", or a quantization. None for Q4_K_M, or for the only
            model of the repository.
        revision: a branch, a tag or a commit; None for "main".
        cache_dir: directory of the cache; None for that of huggingface_hub.
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
    if hub.constants.HF_HUB_OFFLINE:
        return _downloaded(folder, repository, choice, revision, "HF_HUB_OFFLINE is set")
    try:
        with _explained(hub, repository):
            info = hub.HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=_TIMEOUT)
    except TransferError as error:
        return _downloaded(folder, repository, choice, revision, str(error))
    commit = str(info.sha)
    if not _COMMIT.fullmatch(commit):
        raise DownloadError(f"the hub names the commit {shown(commit)} of {repository}, which is not one")
    model = _chosen(_models(info.siblings or ()), repository, choice)
    download = _RepositoryDownload(hub, repository, folder, commit, model, on_progress)
    path = download.run()
    if revision is None or not _COMMIT.fullmatch(revision):
        _write_reference(folder, revision or "main", commit)
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
    """The download of one model of a repository into the cache."""

    def __init__(
        self,
        hub: ModuleType,
        repository: str,
        folder: Path,
        commit: str,
        model: _HubModel,
        on_progress: ProgressCallback | None,
    ) -> None:
        self._hub, self._repository, self._folder, self._commit = hub, repository, folder, commit
        self._model, self._on_progress = model, on_progress
        self._n_bytes = sum(file.n_bytes for file in model.files)
        self._done = 0  # bytes of the files before the current one

    def run(self) -> Path:
        """Get the files that are missing, and return the first one."""
        paths = [self._get(file) for file in self._model.files]
        return paths[0]

    def _get(self, file: _HubFile) -> Path:
        blob = self._folder / "blobs" / file.sha256
        pointer = self._folder / "snapshots" / self._commit / PurePosixPath(file.name)
        if pointer.is_file() and not pointer.is_symlink():  # a cache without links
            if _is_complete(pointer, file):
                self._done += file.n_bytes
                return pointer
            pointer.unlink()  # damaged
        if blob.exists() and not _is_complete(blob, file):
            blob.unlink()  # damaged
        if not blob.exists():
            if file.n_bytes > _LARGEST_HTTP_FILE:
                raise DownloadError(
                    f"{file.name} has {format_size(file.n_bytes)}, and the hub serves files of more than 50 GB "
                    f"only through its own protocol; run `hf download {self._repository} {file.name}`"
                )
            partial = blob.with_name(f"{file.sha256}.incomplete")
            source = _HubSource(self._hub, self._repository, self._commit, file.name)
            get_file(source, blob, partial, file.n_bytes, file.sha256, self._report)
        _link(pointer, blob)
        self._done += file.n_bytes
        return pointer

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


def _models(siblings: Sequence[Any]) -> list[_HubModel]:
    """Return the GGUF models of a repository. Names that would leave its directory are left out."""
    groups: dict[tuple[str, int], dict[int, _HubFile]] = {}
    for sibling in siblings:
        name, lfs = str(sibling.rfilename), sibling.lfs
        place = PurePosixPath(name)
        if not name.endswith(".gguf") or "mmproj" in place.name.lower() or not _is_inside(name):
            continue
        if lfs is None or not _SHA256.fullmatch(str(lfs.sha256)) or not isinstance(lfs.size, int) or lfs.size < 0:
            continue  # without a digest, nothing could be checked
        stem, part, count = split_name(place.name)
        groups.setdefault((str(place.parent / stem), count), {})[part] = _HubFile(name, lfs.size, lfs.sha256)
    return [
        _HubModel(stem, tuple(files[part] for part in sorted(files)))
        for (stem, count), files in sorted(groups.items())
        if len(files) == count
    ]


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    return not any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts)


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


def _downloaded(folder: Path, repository: str, choice: str | None, revision: str | None, reason: str) -> Path:
    """Return a model that was downloaded before, while the hub cannot be reached.

    Raises:
        DownloadError: it is not in the cache.
    """
    commit = revision if revision and _COMMIT.fullmatch(revision) else _read_reference(folder, revision or "main")
    snapshot = folder / "snapshots" / commit
    files = [file for file in model_files(walk(snapshot)) if not file.problem] if commit else []
    by_stem = {(file.path.parent.relative_to(snapshot) / file.stem).as_posix(): file for file in files}
    models = [_HubModel(stem, (_HubFile(f"{stem}.gguf", file.n_bytes, ""),)) for stem, file in by_stem.items()]
    if not models:
        raise DownloadError(f"{repository} is not downloaded yet, and the hub cannot be reached: {reason}")
    return by_stem[_chosen(models, repository, choice).stem].path


def _is_complete(path: Path, file: _HubFile) -> bool:
    return path.is_file() and path.stat().st_size == file.n_bytes and file_digest(path) == file.sha256


def _link(pointer: Path, blob: Path) -> None:
    """Make a file of a snapshot: a relative link to its blob, or the blob itself where there are no links."""
    if pointer.exists():
        return
    pointer.parent.mkdir(parents=True, exist_ok=True)
    try:
        pointer.unlink(missing_ok=True)  # a link whose blob was missing
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:
        blob.replace(pointer)


def _read_reference(folder: Path, revision: str) -> str:
    if not _is_inside(revision):
        return ""
    commit = (read_small(folder / "refs" / revision) or b"").decode("ascii", "replace").strip()
    return commit if _COMMIT.fullmatch(commit) else ""


def _write_reference(folder: Path, revision: str, commit: str) -> None:
    if _is_inside(revision) and _read_reference(folder, revision) != commit:
        path = folder / "refs" / revision
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit, encoding="ascii")
