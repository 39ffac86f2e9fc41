"""Models in Ollama's store.

A manifest lies at `manifests/HOST/NAMESPACE/MODEL/TAG`. It is JSON with the layers of the model, each with its
media type, its size and its digest. The layer of type `application/vnd.ollama.image.model` is the GGUF file. The
content of a digest `sha256:HEX` lies at `blobs/sha256-HEX`, and a download in progress at
`blobs/sha256-HEX-partial`. The store is the directory of the variable OLLAMA_MODELS, or `~/.ollama/models`, or that
of the service on Linux. Manifests are not trusted: a digest that is not one is never made into a path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from erllama.models.local_model import LocalModel, check_gguf
from erllama.models.stores.environment import directory_of
from erllama.models.stores.walk import directories, entries, read_small

STORE = "ollama"
_SERVICE = Path("/usr/share/ollama/.ollama/models")
_DEFAULT_HOST, _DEFAULT_NAMESPACE, _DEFAULT_TAG = "registry.ollama.ai", "library", "latest"
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,255}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_PARTIAL = re.compile(r"(sha256-[0-9a-f]{64})-partial(-\d+)?")
_IMAGE = "application/vnd.ollama.image."


def roots() -> list[Path]:
    """Return the directories where a store may be."""
    if chosen := directory_of("OLLAMA_MODELS"):
        return [chosen]
    return [Path.home() / ".ollama" / "models", _SERVICE]


def models(root: Path) -> Iterator[LocalModel]:
    """Yield the models of a store, and the downloads that have not ended."""
    blobs = root / "blobs"
    for host in directories(root / "manifests"):
        for namespace in directories(host):
            for model in directories(namespace):
                for tag in entries(model):
                    parts = (host.name, namespace.name, model.name, tag.name)
                    if all(_PART.fullmatch(part) for part in parts):
                        yield _model(Path(tag.path), *parts, blobs)
    partial: dict[str, int] = {}
    for entry in entries(blobs):
        found = _PARTIAL.fullmatch(entry.name)
        if found and not (blobs / found[1]).exists():
            size = 0 if found[2] else _size(Path(entry.path))  # the others record the progress of a part
            partial[found[1]] = max(partial.get(found[1], 0), size)
    for name, size in partial.items():
        yield LocalModel(name, blobs / name, STORE, size, problem="its download has not ended; run `ollama pull`")


def _model(manifest: Path, host: str, namespace: str, model: str, tag: str, blobs: Path) -> LocalModel:
    place = [host, namespace, model]
    if host == _DEFAULT_HOST:
        place = [model] if namespace == _DEFAULT_NAMESPACE else [namespace, model]
    base = "/".join(place)
    name = f"{base}:{tag}"
    path, n_bytes, problem = _gguf_layer(manifest, name, blobs)
    aliases = (f"ollama:{name}", base) if tag == _DEFAULT_TAG else (f"ollama:{name}",)
    return LocalModel(name, path, STORE, n_bytes, aliases, problem)


def _gguf_layer(manifest: Path, name: str, blobs: Path) -> tuple[Path, int, str]:
    """Return the file of a manifest's model, its size, and what is wrong with it."""
    kinds: dict[str, list[dict[str, object]]] = {}
    try:
        for layer in json.loads(read_small(manifest) or b"")["layers"] or ():
            kinds.setdefault(str(layer["mediaType"]).removeprefix(_IMAGE), []).append(layer)
    except (ValueError, TypeError, KeyError, RecursionError):
        return manifest, 0, "its manifest cannot be read"
    layers = kinds.get("model", [])
    if not layers:
        reason = "safetensors" if any(kind.startswith("tensor") for kind in kinds) else "no file of a model"
        return manifest, 0, f"it is not a GGUF model: its manifest lists {reason}"
    if len(layers) > 1:
        return manifest, 0, f"its manifest lists {len(layers)} files of models"
    digest, size = _DIGEST.fullmatch(str(layers[0].get("digest"))), layers[0].get("size")
    if not digest:
        return manifest, 0, "its manifest has an invalid digest"
    path = blobs / f"sha256-{digest[1]}"
    if not path.exists():
        return path, 0, f"{path.name} is missing; run `ollama pull {name}`"
    n_bytes, problem = check_gguf(path)
    if not problem and n_bytes != size:
        problem = f"{path.name} has {n_bytes} bytes, and its manifest says {size}; run `ollama pull {name}`"
    if not problem and "adapter" in kinds:
        problem = "it is a model with an adapter, which is not applied; load both with their paths"
    return path, n_bytes, problem


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
