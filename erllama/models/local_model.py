"""A model on this machine, as the stores report it: `LocalModel`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from erllama.engine.backends.gguf_parts import split_name

STORES = ("directory", "erllama", "hugging face", "lm studio", "ollama", "llama.cpp")
_QUANTIZATION = re.compile(
    r"(?<![A-Za-z0-9])((?:T?Q|IQ)[1-8](?:_[A-Z0-9]+)*|MXFP4(?:_MOE)?|BF16|F16|FP16|F32|FP32)(?![A-Za-z0-9])", re.I
)
_PROJECTOR = re.compile(r"(?<![A-Za-z0-9])mmproj(?![A-Za-z0-9])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model on this machine.

    Attributes:
        name: the name that `load_model` and the commands accept.
        path: the GGUF file, or the first part of a split model. Of a broken model, where the file should be.
        store: what holds it: "directory" (one of `ERLLAMA_MODELS`), "erllama" (`erllama pull`), "hugging face",
            "lm studio", "ollama" or "llama.cpp".
        n_bytes: size of its files.
        aliases: further names.
        problem: why it cannot be loaded; "" if nothing is known to be wrong.
    """

    name: str
    path: Path
    store: str
    n_bytes: int
    aliases: tuple[str, ...] = ()
    problem: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The name and the aliases."""
        return (self.name, *self.aliases)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model as it lies in a directory: one file, or the parts of a split model.

    Attributes:
        path: the file; the first part of a split model.
        stem: its name without the number of a part and without ".gguf".
        n_bytes: size of all files.
        problem: as in `LocalModel`.
    """

    path: Path
    stem: str
    n_bytes: int
    problem: str = ""


def model_files(paths: Iterable[Path]) -> list[ModelFile]:
    """Return the models among GGUF files of any directories, in the order of their names.

    The parts of a split model count as one model. Projectors of images ("mmproj") are left out: they are no models.
    """
    groups: dict[tuple[Path, str, int], dict[int, Path]] = {}
    for path in paths:
        stem, part, count = split_name(path.name)
        if not _PROJECTOR.search(stem):
            groups.setdefault((path.parent, stem, count), {})[part] = path
    return [_model_file(*key, files) for key, files in sorted(groups.items())]


def _model_file(directory: Path, stem: str, count: int, files: dict[int, Path]) -> ModelFile:
    first = files.get(1) or directory / f"{stem}-00001-of-{count:05d}.gguf"
    n_bytes, problems = 0, []
    if missing := [part for part in range(1, min(count, 1000) + 1) if part not in files]:
        shown = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        problems.append(f"it is split into {count} parts, and of these are missing: {shown}")
    for part in sorted(files):
        size, problem = check_gguf(files[part])
        n_bytes += size
        problems += [problem] if problem else []
    return ModelFile(first, stem, n_bytes, problems[0] if problems else "")


def check_gguf(path: Path) -> tuple[int, str]:
    """Return the size of a file, and what is wrong with it: it is missing, no regular file, empty, or not GGUF."""
    try:
        if not path.is_file():
            target = f", a link to {path.readlink()}" if path.is_symlink() else ""
            return 0, f"{path.name}{target}, {'is not a file' if path.exists() else 'is missing'}"
        size = path.stat().st_size
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        return 0, f"{path.name} cannot be read: {error.strerror or error}"
    if magic != b"GGUF":
        return size, f"{path.name} is not a GGUF file" if magic else f"{path.name} is empty"
    return size, ""


def with_unique_names(models: Sequence[LocalModel]) -> list[LocalModel]:
    """Return models without the aliases that several of them have, or that are another's name."""
    counts: dict[str, int] = {}
    for model in models:
        for name in {each.casefold() for each in model.names}:
            counts[name] = counts.get(name, 0) + 1
    return [
        replace(model, aliases=tuple(each for each in model.aliases if counts[each.casefold()] == 1))
        for model in models
    ]


def quantization_in(file_name: str) -> str:
    """Return the quantization that a file name states, such as "Q4_K_M", in upper case; "" without one."""
    found = _QUANTIZATION.findall(file_name)
    return str(found[-1]).upper() if found else ""
