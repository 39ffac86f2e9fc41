"""What describes a model in another process: a `Backend` for all that does not compute.

The façade tokenizes, renders templates and checks limits with it. Embeddings are calls to the process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Never, Protocol

import numpy as np
from numpy.typing import NDArray

from erllama._process.protocol import messages as m
from erllama._process.protocol import wire_types as w
from erllama._process.protocol.wire_values import pack_ids, unpack_ids
from erllama.cache.blocks.keys import NamespaceValue
from erllama.engine import Limits, ModelFacts
from erllama.engine.backend import Batch, InfillTokens, Vocabulary
from erllama.engine.embedding import EmbeddingLimits
from erllama.errors import BackendError


class Caller(Protocol):
    """Calls the model in its process, or on another machine. The runners of such models implement it."""

    @property
    def state(self) -> w.ModelState | None:
        """What the process sent last about the model; None before that."""
        ...

    def call(self, make: Callable[[int], m.AnyCall]) -> m.Returned:
        """Call the model and wait for its answer. `make` makes the message from the call's number."""
        ...

    def send_soon(self, message: m.AnyCall) -> None:
        """Send a call whose answer nobody needs. Never waits."""
        ...

    def free_native(self, native: int) -> None:
        """Free an adapter of the model. Never waits."""
        ...


class ModelFile(NamedTuple):
    """What the parent reads from a model's file.

    Attributes:
        vocabulary, metadata, chat_templates: as of a backend.
        close: releases the file.
    """

    vocabulary: Vocabulary
    metadata: Mapping[str, object]
    chat_templates: Mapping[str, str]
    close: Callable[[], object]


class RemoteVocabulary:
    """The vocabulary of a custom backend in another process. Texts of tokens are known here; the rest are calls.

    Attributes:
        n_tokens: the number of tokens.
        is_eog: the tokens that end generation, shape (n_tokens,).
        longest_piece: the most bytes of a text that one token stands for; 0 if unknown.
        infill_tokens: the tokens that mark a gap; None without such tokens.
    """

    def __init__(self, runner: Caller, wire: w.WireVocabulary) -> None:
        self._runner, self._pieces = runner, wire.pieces
        self.n_tokens = len(wire.pieces)
        self.is_eog: NDArray[np.bool_] = np.zeros(self.n_tokens, np.bool_)
        self.is_eog[list(wire.eog)] = True
        self.longest_piece = wire.longest_piece
        self.infill_tokens = None if wire.infill is None else InfillTokens(*wire.infill)

    def tokenize(
        self, source: str | bytes, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        raw = source.encode("utf-8", "surrogatepass") if isinstance(source, str) else source
        found = self._runner.call(lambda number: m.Tokenize(number, raw, add_special, parse_special)).raw
        assert found is not None
        return unpack_ids(found)

    def piece(self, token: int) -> bytes:
        return self._pieces[token]

    def detokenize(self, tokens: Sequence[int] | NDArray[np.integer], *, special: bool = False) -> bytes:
        if not special:
            return b"".join(self._pieces[int(token)] for token in tokens)
        ids = pack_ids(np.asarray(tokens, np.int32))
        return self._runner.call(lambda number: m.Detokenize(number, ids, special)).raw or b""


class RemoteEmbedder:
    """The embedder of a model in another process."""

    def __init__(self, runner: Caller) -> None:
        self._runner = runner
        limits = runner.call(m.OpenEmbedder).limits
        assert limits is not None
        self.limits: EmbeddingLimits = limits

    def embed(self, texts: Sequence[NDArray[np.int32]], pooling: str) -> list[NDArray[np.float32]]:
        packed = tuple(map(pack_ids, texts))
        returned = self._runner.call(lambda number: m.Embed(number, packed, pooling))
        return [np.frombuffer(raw, "<f4").astype(np.float32).reshape(shape) for raw, shape in returned.arrays]

    def pair(self, query: str, document: str) -> NDArray[np.int32]:
        raw = self._runner.call(lambda number: m.Pair(number, query, document)).raw
        assert raw is not None
        return unpack_ids(raw)

    def abort(self) -> None:
        self._runner.send_soon(m.AbortEmbedder(-1))

    def close(self) -> None:
        self._runner.send_soon(m.CloseEmbedder(-1))


class RemoteBackend:
    """Describes a model in another process.

    Args:
        runner: of the model.
        started: what the first process said.
        file: what the parent read from the model's file; None for a custom backend.

    Attributes: those of a backend; and

        class_name: name of the class of the process's backend.
        n_seq_max: requests that run at once.
    """

    def __init__(self, runner: Caller, started: m.Started, file: ModelFile | None) -> None:
        self._runner, self._facts = runner, started.facts
        self._file = file
        self._identity = (started.namespace, started.recipe, started.limits)
        self.limits: Limits = started.limits
        self.namespace: Mapping[str, NamespaceValue] = json.loads(started.namespace)
        self.recipe = started.recipe
        self.class_name, self.description = started.backend, started.description
        self.n_seq_max = started.n_seq_max
        if file is not None:
            self.vocabulary: Vocabulary = file.vocabulary
            self.metadata, self.chat_templates = file.metadata, file.chat_templates
        else:
            assert started.vocabulary is not None
            self.vocabulary = RemoteVocabulary(runner, started.vocabulary)

    def equals(self, started: m.Started) -> bool:
        """Return whether another process has loaded the same model."""
        return self._identity == (started.namespace, started.recipe, started.limits)

    @property
    def facts(self) -> ModelFacts:
        """The facts of the model, with the present number of threads."""
        state = self._runner.state
        if state is None:
            return self._facts
        return replace(
            self._facts,
            n_threads=state.n_threads,
            n_threads_batch=state.n_threads_batch,
            threads_reason=state.threads_reason,
        )

    def embedder(self) -> RemoteEmbedder:
        """Return an embedder that computes in the process."""
        return RemoteEmbedder(self._runner)

    def check_adapter(self, path: Path) -> None:
        """Check an adapter's file in the process."""
        self._runner.call(lambda number: m.CheckAdapter(number, str(path.absolute())))

    def free_adapter(self, adapter: object) -> None:
        """Free an adapter in the process."""
        assert isinstance(adapter, int)
        self._runner.free_native(adapter)

    def close(self) -> None:
        """Release the file's vocabulary. The process is ended by its runner."""
        if self._file is not None:
            self._file.close()

    # --- what only the process does ------------------------------------------------------------------

    def _refuse(self) -> Never:
        raise BackendError("the model runs in a process of its own, and does not compute in this one")

    def load_adapter(self, path: Path) -> Never:
        self._refuse()

    def use_adapters(self, adapters: Sequence[tuple[object, float]]) -> None:
        """Do nothing: the process uses the set of each request."""

    def decode(self, batch: Batch) -> Never:
        self._refuse()

    def pack(self, sequence: int, start: int, end: int) -> Never:
        self._refuse()

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> Never:
        self._refuse()

    def share(self, source: int, target: int, end: int) -> Never:
        self._refuse()

    def cut(self, sequence: int, end: int) -> Never:
        self._refuse()

    def drop(self, sequence: int) -> Never:
        self._refuse()

    def clear(self) -> Never:
        self._refuse()

    def abort(self, on: bool) -> None:
        """Do nothing: the process ends its decodes itself."""
