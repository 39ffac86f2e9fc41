"""What the engine asks of a backend: tokens in, logits out, and KV that can be moved.

A backend has no policy: which tokens to run, what to sample and what to keep
is the engine's. Vocabularies may be used from any thread; everything else is
called by one thread, the model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from erllama.cache.blocks.keys import NamespaceValue as NamespaceValue


@dataclass(frozen=True, slots=True)
class Limits:
    """What a backend can hold and compute.

    Attributes:
        n_ctx: cells, which all sequences have together; so most tokens that one can hold.
        n_batch: most tokens of one decode.
        n_ubatch: tokens the backend computes at once; prefill is cut at its multiples.
        n_vocab: width of a row of logits.
        can_trim: whether the memory can be cut at any position. False for
            sliding-window and recurrent memory: it resumes only where state was packed.
        whole_state: whether a payload has all that resuming at its end takes, those
            before it not needed: purely recurrent memory.
        attention_window: tokens that a sliding window keeps; 0 where there is none.
        n_sequences: sequences that can be held at once, numbered from 0.
        cell_bytes: about how many bytes a token's KV takes; 0 where that cannot be said.
        can_generate: False for a model that only encodes: it embeds (see `erllama.engine.embedding`), and is
            asked for no decode.
    """

    n_ctx: int
    n_batch: int
    n_ubatch: int
    n_vocab: int
    can_trim: bool
    whole_state: bool = False
    attention_window: int = 0
    n_sequences: int = 1
    cell_bytes: int = 0
    can_generate: bool = True


class SpecialToken(NamedTuple):
    """A token with a purpose, as the vocabulary spells it."""

    id: int
    text: str


class Buffer(NamedTuple):
    """A piece of memory that a model takes.

    Attributes:
        place: where it lies, as "CPU", "CPU_Mapped" (a mapped file) or "CUDA0".
        holds: "weights", "kv", "state" (of recurrent layers), "compute" or "output".
        n_bytes: its size, as far as the backend tells.
    """

    place: str
    holds: str
    n_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a model is, for people to read; a backend that has it offers it as `facts`.

    Attributes:
        architecture: as "llama"; empty where it is not known, as are the other texts.
        name: as its makers named it.
        quantization: how most of its weights are stored, as "Q4_K - Medium".
        n_params: weights; 0 where that is not known, as are the other numbers.
        file_bytes: size of its file, all parts of a split one together.
        n_ctx_train: tokens of the longest context that it was trained on.
        n_layer, n_embd, n_head, n_head_kv: layers, width of a token's embedding, heads, heads of K and V.
        kv_type_k, kv_type_v: types of the K and V cells; empty where there are none.
        has_chat_template: whether it brings one of its own.
        special_tokens: by purpose: "bos", "eos", "eot", "nl", "pad", "sep", "mask", "fim_pre", "fim_suf" and
            "fim_mid", as far as there are such.
        n_threads, n_threads_batch: threads that decode, and that read prompts.
        devices: names of the devices that compute.
        buffers: the memory it takes.
        weights_bytes, kv_bytes: of weights, and of cells and recurrent state, over all devices.
    """

    architecture: str = ""
    name: str = ""
    quantization: str = ""
    n_params: int = 0
    file_bytes: int = 0
    n_ctx_train: int = 0
    n_layer: int = 0
    n_embd: int = 0
    n_head: int = 0
    n_head_kv: int = 0
    kv_type_k: str = ""
    kv_type_v: str = ""
    has_chat_template: bool = False
    special_tokens: Mapping[str, SpecialToken] = field(default_factory=dict)
    n_threads: int = 0
    n_threads_batch: int = 0
    devices: tuple[str, ...] = ()
    buffers: tuple[Buffer, ...] = ()
    weights_bytes: int = 0
    kv_bytes: int = 0


class Batch(NamedTuple):
    """Rows for one decode, each shape (n,): int32 ids, positions and sequences, int8 output flags."""

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    sequences: NDArray[np.int32]
    output: NDArray[np.int8]


class InfillTokens(NamedTuple):
    """The tokens that mark a gap in a text, for models that can fill one.

    Attributes:
        begin: what comes first of all, as a BOS; often nothing.
        prefix, suffix, middle: what comes before the text on either side of the gap, and before what fills it.
    """

    begin: tuple[int, ...]
    prefix: int
    suffix: int
    middle: int


class Vocabulary(Protocol):
    """Text to tokens and back; thread-safe.

    One that can mark gaps has `infill_tokens`, too, an InfillTokens; None, or no such attribute, for none.
    One whose tokens each stand for a limited number of a text's bytes has `longest_piece`, the most of them; texts
    that are too long are then refused before they are tokenized. 0, or no such attribute, where there is no limit.
    """

    @property
    def n_tokens(self) -> int:
        """Ids are below this."""

    @property
    def is_eog(self) -> NDArray[np.bool_]:
        """Shape (n_tokens,): tokens that end generation."""
        ...

    def tokenize(
        self, source: str | bytes, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        """Ids of a text, int32, shape (n,)."""
        ...

    def piece(self, token: int) -> bytes:
        """The bytes that one token adds to a text; empty for control tokens."""
        ...

    def detokenize(self, tokens: Sequence[int] | NDArray[np.integer], *, special: bool = False) -> bytes:
        """The bytes of a text."""
        ...


class Backend(Protocol):
    """A model that decodes. One that embeds, too, is an `EmbeddingBackend` besides."""

    @property
    def limits(self) -> Limits:
        """Its sizes, and what its memory can do. They never change."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Turns text into tokens and back. Any thread may call it, several at once."""

    @property
    def namespace(self) -> Mapping[str, NamespaceValue]:
        """Everything that changes what a token's KV holds or how `pack` lays it out."""
        ...

    @property
    def recipe(self) -> bytes:
        """16 bytes over everything that changes the bits of a computation: batch sizes, threads, build."""
        ...

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        """Compute a batch, extending its sequences.

        Rows of several sequences may be mixed; those of one are in order, and
        go on from what it holds.

        Returns:
            shape (rows with output, n_vocab), in the batch's order, valid until the next call.

        Raises:
            CellsExhausted: not enough free cells; nothing was computed.
            BackendError: the state of the batch's sequences is then unknown.
        """
        ...

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        """The state of positions [start, end) as bytes, shape (n,), the caller's to keep.

        Where the memory cannot be trimmed, `end` is the sequence's end, and after a
        decode that failed it raises BackendError until `clear`.
        """
        ...

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        """Append positions [start, end), packed earlier, to a sequence that ends at `start`.

        Where `limits.whole_state`, the sequence may be empty instead.

        Raises:
            StateError: the payload does not fit; the sequence is as it was.
        """
        ...

    def share(self, source: int, target: int, end: int) -> None:
        """Let `target`, which is empty, hold positions [0, end) of `source`, too; only where `limits.can_trim`.

        No data moves, and no cell is taken: one is free again when no sequence holds it any more.
        """
        ...

    def cut(self, sequence: int, end: int) -> None:
        """Drop positions from `end` on; only where `limits.can_trim`."""
        ...

    def drop(self, sequence: int) -> None:
        """Empty one sequence."""
        ...

    def clear(self) -> None:
        """Empty every sequence, and make good what a failed decode may have broken."""
        ...

    def abort(self, on: bool) -> None:
        """Make a running decode end early with BackendError; from any thread."""
        ...

    def close(self) -> None:
        """Release everything. Idempotent."""
        ...
