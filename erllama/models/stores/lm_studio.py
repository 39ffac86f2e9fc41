"""Models in LM Studio's directory.

A file lies at `PUBLISHER/MODEL/FILE.gguf`. LM Studio's home is the directory that `~/.lmstudio-home-pointer`
names, or `~/.lmstudio`, or `~/.cache/lm-studio` of earlier releases. The models lie in `models` in it, or in the
`downloadsFolder` of its `settings.json`. A download in progress ends in ".part".
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from erllama.models.local_model import LocalModel, model_files, quantization_in
from erllama.models.stores.walk import read_small, walk

STORE = "lm studio"


def roots() -> list[Path]:
    """Return the directories where models may be."""
    home = Path.home()
    pointer = (read_small(home / ".lmstudio-home-pointer") or b"").decode("utf-8", "replace").strip()
    homes = [Path(pointer)] if pointer and "\0" not in pointer else []
    homes += [home / ".lmstudio", home / ".cache" / "lm-studio"]
    found = []
    for each in homes:
        try:
            chosen = json.loads(read_small(each / "settings.json") or b"{}")["downloadsFolder"]
            found.append(Path(chosen))
        except (ValueError, TypeError, KeyError, RecursionError):
            found.append(each / "models")
    return list(dict.fromkeys(found))


def models(root: Path) -> Iterator[LocalModel]:
    """Yield the models of a directory, and the downloads that have not ended."""
    files = model_files(walk(root))
    tags = {file.path: _name(root, file.path, file.stem) for file in files}
    in_folder = Counter(file.path.parent for file in files)
    counts = Counter(tags.values())
    for file in files:
        place = file.path.parent.relative_to(root).as_posix()
        by_file = file.stem if place == "." else f"{place}:{file.stem}"
        name = tags[file.path] if counts[tags[file.path]] == 1 else by_file
        names = [by_file, file.stem, *([place] if in_folder[file.path.parent] == 1 and place != "." else [])]
        aliases = tuple(each for each in dict.fromkeys(names) if each != name)
        yield LocalModel(name, file.path, STORE, file.n_bytes, aliases, file.problem)
    for path in walk(root, suffixes=(".gguf.part",)):
        name = path.name.removesuffix(".part").removeprefix("downloading_").removesuffix(".gguf")
        size = path.stat().st_size if path.is_file() else 0
        yield LocalModel(name, path, STORE, size, problem="its download has not ended; resume it in LM Studio")


def _name(root: Path, path: Path, stem: str) -> str:
    place = path.parent.relative_to(root).as_posix()
    return stem if place == "." else f"{place}:{quantization_in(stem) or stem}"
