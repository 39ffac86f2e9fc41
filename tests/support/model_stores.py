"""Builds stores of models as Ollama, LM Studio, huggingface_hub and llama.cpp write them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_VARIABLES = (
    "ERLLAMA_MODELS",
    "OLLAMA_MODELS",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "HF_HOME",
    "LLAMA_CACHE",
    "XDG_CACHE_HOME",
)


def empty_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a directory the home directory, so that no store of this machine is found."""
    home.mkdir(exist_ok=True)
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("ERLLAMA_MODEL_CACHE", str(home / "pulled"))
    monkeypatch.setattr("erllama.models.stores.ollama._SERVICE", home / "no service")


class OllamaStore:
    """Ollama's store in a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "blobs").mkdir(parents=True)

    def blob(self, content: bytes) -> str:
        """Store a blob, and return its digest."""
        digest = hashlib.sha256(content).hexdigest()
        (self.root / "blobs" / f"sha256-{digest}").write_bytes(content)
        return f"sha256:{digest}"

    def manifest(self, name: str, layers: list[Mapping[str, object]] | None, text: str | None = None) -> Path:
        """Write a manifest at a path such as "registry.ollama.ai/library/llama3.2/3b"."""
        path = self.root / "manifests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {"mediaType": "application/vnd.docker.container.image.v1+json", "size": 2},
            "layers": layers,
        }
        path.write_text(json.dumps(content) if text is None else text)
        return path

    def add(self, name: str, content: bytes, *kinds: str, size: int | None = None) -> str:
        """Add a model with further empty layers, and return its digest."""
        digest = self.blob(content)
        layers: list[Mapping[str, object]] = [
            {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": self.blob(b"{}"), "size": 2}
            for kind in ("template", *kinds)
        ]
        size = len(content) if size is None else size
        layers.append({"mediaType": "application/vnd.ollama.image.model", "digest": digest, "size": size})
        self.manifest(name, layers)
        return digest


def add_to_hub_cache(
    root: Path, repository: str, file: str, content: bytes, commit: str = COMMIT, *, main: bool = True
) -> Path:
    """Add a file to a cache of huggingface_hub, and return its place in the snapshot: a link to the blob."""
    folder = root / f"models--{repository.replace('/', '--')}"
    blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    pointer = folder / "snapshots" / commit / file
    pointer.parent.mkdir(parents=True, exist_ok=True)
    pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    if main:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
    return pointer
