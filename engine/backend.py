"""The protocol of a backend: tokens in, logits out, and KV that can be packed and restored.

A backend has no policy: the engine decides which tokens to run, what to sample and what to keep. Vocabularies may
be used from any thread. One thread, the model's, calls everything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from erllama.cache.blocks.keys import NamespaceValue as NamespaceValue


@dataclass(frozen=True, slots=True)
class Limits:
    """The sizes and capabilities of a backend.

    Attributes:
        n_ctx: the number of cells, shared by all sequences; one sequence has at most as many tokens.
        n_batch: maximum number of tokens of one decode.
        n_ubatch: tokens that the backend computes at once; prefill is cut at its multiples.
        n_vocab: width of a row of logits.
        can_trim: whether the memory can be cut at any position. False for sliding-window and recurrent memory: it
            resumes only where state was packed.
        whole_state: whether one payload is enough to resume at its end, without the payloads before it: purely
            recurrent memory.
        attention_window: tokens that a sliding window keeps; 0 without one.
        n_sequences: sequences that can be in the context at once, numbered from 0.
        cell_bytes: about how many bytes a token's KV takes; 0 if unknown.
        can_generate: False for a model that only encodes: it embeds (see `erllama.engine.embedding`), and its
            `decode` is not called.
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
    """A token with a purpose, and its text in the vocabulary."""

    id: int
    text: str


class Buffer(NamedTuple):
    """A memory buffer of a model.

    Attributes:
        place: where it lies, such as "CPU", "CPU_Mapped" (a mapped file) or "CUDA0".
        holds: "weights", "kv", "state" (of recurrent layers), "compute" or "output".
        n_bytes: its size, as the backend reports it.
    """

    place: str
    holds: str
    n_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """The properties of a model, for people to read. A backend that knows them has an attribute `facts`.

    Texts are empty, and numbers 0, if they are unknown.

    Attributes:
        architecture: such as "llama".
        name: the name that the makers of the model chose.
        quantization: how most of its weights are stored, such as "Q4_K - Medium".
        n_params: the number of weights.
        file_bytes: size of its file; of a split one, of all parts together.
        n_ctx_train: tokens of the longest context that it was trained on.
        n_layer, n_embd, n_head, n_head_kv: layers, width of a token's embedding, heads, heads of K and V.
        kv_type_k, kv_type_v: types of the K and V cells; empty without cells.
        has_chat_template: whether its file has a chat template.
        special_tokens: by purpose: "bos", "eos", "eot", "nl", "pad", "sep", "mask", "fim_pre", "fim_suf" and
            "fim_mid"; only those that it has.
        n_threads, n_threads_batch: threads that decode, and threads that read prompts, at this moment.
        threads_reason: why it is this number of threads, such as "4 cores" or "n_threads=2".
        devices: names of the devices that compute.
        buffers: its memory buffers.
        weights_bytes, kv_bytes: bytes of weights, and of cells and recurrent state, on all devices.
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
    threads_reason: str = ""
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


class PackedBlock(NamedTuple):
    """Positions [start, end) of a sequence, as `Backend.pack` returned them."""

    start: int
    end: int
    payload: memoryview


class InfillTokens(NamedTuple):
    """The tokens that mark a gap in a text, for models that can fill one.

    Attributes:
        begin: the tokens before all others, such as a BOS; often empty.
        prefix, suffix, middle: the tokens before the text on either side of the gap, and before the text in it.
    """

    begin: tuple[int, ...]
    prefix: int
    suffix: int
    middle: int


class Vocabulary(Protocol):
    """Converts text to tokens and back. Thread-safe.

    Optional attributes: `infill_tokens`, an InfillTokens, of a vocabulary that can mark gaps; None otherwise.
    `longest_piece`, the maximum bytes of a text that one token represents: texts that are too long are then refused
    before they are tokenized. 0 if there is no limit.
    """

    @property
    def n_tokens(self) -> int:
        """The number of tokens; ids are below it."""

    @property
    def is_eog(self) -> NDArray[np.bool_]:
        """Shape (n_tokens,): tokens that end generation."""
        ...

    def tokenize(
        self, source: str | bytes, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        """Return the ids of a text, int32, shape (n,)."""
        ...

    def piece(self, token: int) -> bytes:
        """Return the bytes that one token adds to a text; empty for control tokens."""
        ...

    def detokenize(self, tokens: Sequence[int] | NDArray[np.integer], *, special: bool = False) -> bytes:
        """Return the bytes of a text."""
        ...


class Threads(Protocol):
    """The optional attribute `threads` of a backend that changes its number of threads between decodes.

    Attributes:
        fixed: set by the scheduler. While it is True, decodes use the number of threads of the backend's `recipe`.
    """

    fixed: bool

    @property
    def as_in_recipe(self) -> bool:
        """Whether the last decode has the bits that a decode with the number of threads of the `recipe` has."""


class Backend(Protocol):
    """A model that decodes. One that also embeds is an `EmbeddingBackend`, too."""

    @property
    def limits(self) -> Limits:
        """Its sizes and capabilities. They never change."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Its vocabulary. Any thread may call it, several at once."""

    @property
    def namespace(self) -> Mapping[str, NamespaceValue]:
        """Everything that changes the content of a token's KV, or its layout in the bytes of `pack`."""
        ...

    @property
    def recipe(self) -> bytes:
        """16 bytes over everything that changes the bits of a computation: batch sizes, threads, build."""
        ...

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        """Compute a batch, extending its sequences.

        Rows of several sequences may be mixed. The rows of one sequence are in order, and continue its tokens.

        Returns:
            the logits, shape (rows with output, n_vocab), in the batch's order, valid until the next call.

        Raises:
            CellsExhausted: there are not enough free cells; the sequences are unchanged.
            BackendError: the state of the batch's sequences is then unknown.
        """
        ...

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        """Return the state of positions [start, end) as bytes, shape (n,), which the caller may keep.

        If the memory cannot be cut, `end` is the sequence's end, and after a failed decode `pack` raises
        BackendError until `clear`.
        """
        ...

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        """Append positions [start, end), packed earlier, to a sequence that ends at `start`.

        With `limits.whole_state`, the sequence may be empty instead.

        Raises:
            StateError: the payload does not fit; the sequence is unchanged.
        """
        ...

    def share(self, source: int, target: int, end: int) -> None:
        """Add positions [0, end) of `source` to `target`, which is empty; only if `limits.can_trim`.

        No data is copied, and no cell is taken. A cell is free again when no sequence has it.
        """
        ...

    def cut(self, sequence: int, end: int) -> None:
        """Drop positions from `end` on; only if `limits.can_trim`."""
        ...

    def drop(self, sequence: int) -> None:
        """Empty one sequence."""
        ...

    def clear(self) -> None:
        """Empty every sequence, and repair the state after a failed decode."""
        ...

    def abort(self, on: bool) -> None:
        """Make a running decode end early with BackendError. Called from any thread."""
        ...

    def close(self) -> None:
        """Release everything. Idempotent."""
        ...


@runtime_checkable
class RecoverableBackend(Protocol):
    """The additional methods of a backend that can lose all its KV, such as with a device on another machine."""

    @property
    def memory_lost(self) -> bool:
        """Whether the KV is lost. Read before an idle model admits a request, so it must be quick."""

    def recover(self) -> None:
        """Make the backend usable again. Called if `memory_lost`, before `clear`.

        Raises:
            BackendError: it is not possible now. All waiting requests end with this error.
        """
        ...


@runtime_checkable
class BlockRestorer(Protocol):
    """A backend that restores several blocks at once. Optional, for backends whose `restore` has a fixed cost."""

    def restore_blocks(self, sequence: int, blocks: Sequence[PackedBlock]) -> None:
        """Append blocks that follow each other, all or none; only if `limits.can_trim`.

        The result is that of `restore` for each block in order.

        Raises:
            StateError: a payload does not fit; the sequence is unchanged. The engine then restores the blocks one
                by one, up to that payload.
        """
        ...


class LargestLogits(NamedTuple):
    """The k largest logits of n rows, largest first, ties by rising id.

    Attributes:
        ids: intp, shape (n, k), C-contiguous.
        logits: float32, shape (n, k), C-contiguous.
    """

    ids: NDArray[np.intp]
    logits: NDArray[np.float32]


@runtime_checkable
class RowSelector(Protocol):
    """A backend that selects the largest logits of rows. Optional: without it, numpy selects them.

    The engine passes the logits of the last `decode`, some of their rows, or changed copies of them: float32, shape
    (n, n_vocab).
    """

    def argmax(self, logits: NDArray[np.float32]) -> list[int]:
        """Return the id of the largest logit of each row, the first of equal ones.

        Returns:
            n ids. -1 if the largest logit is not finite, or any logit is NaN.
        """
        ...

    def top_k(self, logits: NDArray[np.float32], out: LargestLogits) -> None:
        """Write the k largest logits of each row to `out`, which has arrays for n rows and a k of 1 to n_vocab.

        NaN counts as the largest. Of a row with NaN, only the first result is defined.
        """
        ...
