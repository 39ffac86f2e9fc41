"""The model of an ingress: a vocabulary of this machine, and a runner that sends requests to replicas.

The ingress renders and tokenizes with its own copy of the model's file, of which it reads the vocabulary alone. So
it checks that the replicas have the same file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from erllama._model import registry
from erllama._model.load import check_load_options
from erllama._model.model import Model
from erllama._process.protocol import messages as m
from erllama._process.remote_backend import ModelFile, RemoteBackend
from erllama.cache import Cache, Policy
from erllama.checks import seconds
from erllama.engine.backends.fingerprint import Fingerprint, content_digest
from erllama.engine.backends.gguf_parts import parts
from erllama.errors import ModelMismatch
from erllama.fleet.config import FleetConfig
from erllama.fleet.prefix_router import PrefixRouter
from erllama.fleet.runner import FleetRunner
from erllama.fleet.transport import ReplicaCalls


def open_ingress(config: FleetConfig, calls: ReplicaCalls, router: PrefixRouter) -> Model:
    """Return the model that an ingress serves. Waits for the first replica.

    Raises:
        ModelMismatch: the replica has another file.
        ModelLoadError: the file of this machine cannot be read.
    """
    options = config.model_options()
    # Texts of replies with their tokens; no KV.
    cache = Cache(ram="64MiB")
    runner = FleetRunner(
        config.id,
        calls,
        router,
        max_pending=config.max_pending,
        drain_seconds=seconds("drain", config.drain),
        n_hot=config.hot_prefixes,
    )
    reservation = registry.IdReservation()
    try:
        backend = runner.connect(lambda own, _, started: _describe(own, config, options, started, cache))
        salt: Any = options.get("cache_salt")
        policy: Any = options.get("policy")
        id = registry.reserve(config.id, reservation)
        model = Model(backend, id, cache, Policy.of(policy), salt, runner, backend.n_seq_max, registry)
        registry.add(model, reservation)
        return model
    except BaseException:
        registry.release(reservation)
        runner.stop()
        cache.close()
        raise


def _describe(
    runner: FleetRunner, config: FleetConfig, options: Mapping[str, object], started: m.Started, cache: Cache
) -> RemoteBackend:
    """Return what describes the model, from the file of this machine and from what a replica says."""
    from erllama.engine.backends.llama_file import VocabularyFile, check_file

    file = Path(config.model).expanduser()
    check_file(file)
    vocabulary = VocabularyFile(file, check_load_options({"overrides": options.get("overrides")}))
    overrides: Any = options.get("overrides") or {}
    described = ModelFile(
        vocabulary.vocabulary,
        MappingProxyType({**vocabulary.metadata, **overrides}),
        vocabulary.chat_templates,
        vocabulary.close,
    )
    backend = RemoteBackend(runner, started, described)
    own = fingerprint(file, options, cache)
    theirs = backend.namespace.get("model")
    if own != theirs:
        backend.close()
        raise ModelMismatch(
            f"the replicas of model {config.id!r} have another file than this machine's {file}: their fingerprint "
            f"is {theirs!r}, not {own!r}. Give all machines the same file"
        )
    return backend


def fingerprint(file: Path, options: Mapping[str, object], cache: Cache) -> str:
    """Return the fingerprint that a replica with these options gives a file. "safe" reads the file."""
    kind: Any = options.get("fingerprint", "safe")
    own: Any = options.get("own_fingerprint")
    if kind == "safe":
        return "sha256:" + " ".join(content_digest(part, cache) for part in parts(file))
    return Fingerprint(kind, own).of(file, cache, lambda _: None)
