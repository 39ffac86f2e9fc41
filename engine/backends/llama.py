"""The backend over libllama: one model, one context, and a scratch sequence that moves blocks.

A block leaves the context through the scratch sequence: its cells are tagged with the scratch sequence, without a
copy, and the state of the scratch sequence is exactly the KV of the block's positions. A block enters the context
the same way. Errors of the binding become errors of this library.
"""

from __future__ import annotations

import hashlib
import json
import platform
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from erllama.cache.blocks.keys import NamespaceValue
from erllama.engine.backend import Batch, LargestLogits, Limits, ModelFacts, PackedBlock
from erllama.engine.backends.file_identity import MappedFiles, identity
from erllama.engine.backends.llama_adapters import LlamaAdapters, check_adapter_file
from erllama.engine.backends.llama_file import LlamaVocabulary, buffers_in, chat_templates, facts_of, load_file
from erllama.engine.backends.llama_library import llama_ffi, translate_errors
from erllama.engine.backends.llama_options import LlamaOptions
from erllama.engine.backends.llama_weights import LlamaWeights, load_remote
from erllama.engine.backends.thread_choice import ThreadChoice
from erllama.engine.embedding import Embedder
from erllama.engine.processors import default_threads
from erllama.errors import AdapterLoadError, BackendError, CellsExhausted, ModelLoadError, ServerLost, StateError

_DEFAULT_N_CTX = 4096
_N_CTX_STEP = 256
_MAX_EMBEDDED_TEXTS = 64  # texts per computation; more texts take more memory, and n_ubatch limits them anyway
# Small blocks are joined, because libllama looks at every cell of the context for each state that it restores. With
# 32,000 cells that costs 0.08 ms, in which a processor copies half a megabyte: a larger block is restored alone.
# Beyond 4 MiB, longer joined states were found to be hardly faster.
_SMALL_BLOCK_BYTES = 512 << 10
_JOINED_BYTES = 4 << 20
# The head of libllama's state of one sequence: magic, sequence, streams, cells. Then, for each cell: its position,
# the number of its sequences, and the sequence.
_STATE_HEAD = struct.Struct("<IiII")
_STATE_MAGIC = 0xAF143CD8
_MAX_THREADS = 512  # as GGML_MAX_N_THREADS
_SAME_BITS = ("x86_64", "AMD64")
_ROPE_ONE_POSITION = (-1, 0, 2)  # none, norm, neox: one position per cell


class LlamaBackend:
    """A GGUF model on libllama.

    Args:
        path: the GGUF file.
        options: the options of the load.
        fingerprint: identifies the file's content in the cache.
        on_progress: called with the loaded fraction; returning False cancels the load.
        identity: the `identity` of the files before `fingerprint` was computed; None for files that never change.

    Raises:
        ModelLoadError: the file cannot be loaded, or the context cannot be created.
        ServerLost: an RPC server cannot be used.
        LibraryNotBuilt: the binding is missing.
    """

    def __init__(
        self,
        path: Path,
        options: LlamaOptions,
        fingerprint: str,
        on_progress: Callable[[float], object] | None = None,
        identity: str | None = None,
    ) -> None:
        self.path = path
        # A file that is read into memory instead of mapped may change after the load.
        self._mapped = MappedFiles(path, identity) if identity is not None and options.mmap else None
        self._identity = identity
        servers = sorted({device.server for device in options.computing_devices() if device.server})
        file = load_remote(servers, lambda: load_file(path, options, on_progress))
        model, self.metadata, n_positions = file
        # What needs no weights. Any thread may read it, and it stays valid when the weights are loaded again.
        self._words = _load_vocabulary(path, options) if servers else model
        self._weights = LlamaWeights(model, servers, self._load_again)
        try:
            self._weights.check()
            self.vocabulary = LlamaVocabulary(self._words.vocabulary)
            shape = model.shape
            if shape.has_encoder or not shape.has_decoder or shape.diffusion:
                raise ModelLoadError(f"{path}: the model does not generate text one token at a time")
            # Only full attention can be cut anywhere. For other memory, the result of seq_rm is not reliable.
            can_trim = not (shape.recurrent or shape.hybrid or shape.n_swa > 0)
            n_sequences = options.n_sequences + (options.n_spare_sequences if can_trim else 0)
            self._scratch = n_sequences
            self._options = options
            gpus = options.computing_devices()
            self._n_threads, self._n_threads_batch, self._threads_reason = _threads(options)
            self._adapts = (options.n_threads, options.n_threads_batch) == (None, None) and not gpus
            self.threads = self._new_threads(self._n_threads)
            self._make_context = self._context_factory(n_sequences)
            with self._translate_errors(ModelLoadError, f"{path}: the context cannot be created"):
                self._context = self._make_context(model)
            self._context_model = model  # whose weights the context uses
            self.chat_templates = chat_templates(self.metadata)
            facts = facts_of(path, file, self.vocabulary.special_tokens)
        except BaseException:
            self._weights.close()
            self._words.close()
            raise
        if not self._context.has_memory:
            self._context.close()  # such a model never decodes; an embedder creates its own context
        self.limits = self._limits_of(can_trim, n_sequences, n_positions)
        self._state_known = True  # False after a failed decode, for memory that cannot be cut
        self._broken = False  # True after a decode failed unexpectedly: the context may be in any state
        self._aborting = False
        self._adapters = LlamaAdapters()
        self._used_adapters: Sequence[tuple[object, float]] = ()
        self._n_threads_set = 0  # of the context; 0 for the numbers that it was created with
        self._checks_positions = can_trim and shape.rope_type in _ROPE_ONE_POSITION
        self._facts = self._with_context_facts(facts, gpus)
        self.namespace: Mapping[str, NamespaceValue] = self._namespace_of(fingerprint, gpus)
        self.recipe = _recipe(
            options,
            self._context.n_ubatch,
            self._n_threads,
            self._n_threads_batch,
            # These determine the layout of the cells of a sliding window.
            (self._context.n_ctx, n_sequences) if shape.n_swa > 0 else None,
        )

    def _load_again(self) -> llama_ffi.LlamaModel:
        """Load the weights again, after an RPC server was lost."""
        if self._identity is not None and identity(self.path) != self._identity:
            raise ModelLoadError(
                f"{self.path} was changed since it was loaded; unload the model, and load it again"
            )
        return load_file(self.path, self._options).model

    def _new_threads(self, n_threads: int) -> ThreadChoice:
        return ThreadChoice(
            n_threads,
            self._n_threads_batch,
            self._threads_reason,
            adapts=self._adapts,
            # True for the source as build_llama.sh changes it. Some kernels of other processors compute two rows at
            # once, depending on how threads divide the rows.
            same_bits=platform.machine() in _SAME_BITS and not llama_ffi.build_info()["source"].startswith("dir-"),
        )

    def _context_factory(self, n_sequences: int) -> Callable[[llama_ffi.LlamaModel], llama_ffi.LlamaContext]:
        options = self._options
        n_ctx = options.n_ctx or min(self._weights.model.shape.n_ctx_train or _DEFAULT_N_CTX, _DEFAULT_N_CTX)
        return partial(
            llama_ffi.LlamaContext,
            n_ctx=_round_up(n_ctx),
            n_batch=options.n_batch,
            n_ubatch=min(options.n_ubatch, options.n_batch),
            n_seq_max=n_sequences + 1,
            n_threads=self._n_threads,
            n_threads_batch=self._n_threads_batch,
            flash_attn=options.flash_attn if isinstance(options.flash_attn, bool) else None,
            type_k=llama_ffi.ggml_type(options.kv_type_k),
            type_v=llama_ffi.ggml_type(options.kv_type_v),
            swa_full=options.swa_full,
            **_rope(options),
        )

    def _limits_of(self, can_trim: bool, n_sequences: int, n_positions: int | None) -> Limits:
        context, shape = self._context, self._context_model.shape
        encodes = not context.has_memory
        return Limits(
            # With a table of learned positions, no text can be longer than the table.
            min(context.n_ctx, shape.n_ctx_train if encodes else n_positions or context.n_ctx),
            context.n_batch,
            context.n_ubatch,
            context.n_vocab,
            can_trim,
            shape.recurrent and not shape.hybrid,
            max(shape.n_swa, 0),
            n_sequences,
            0 if encodes else llama_ffi.cell_bytes(self._context_model, context.type_k, context.type_v),
            can_generate=not encodes,
        )

    def _with_context_facts(self, facts: ModelFacts, gpus: Sequence[llama_ffi.Device]) -> ModelFacts:
        buffers = buffers_in(self._context.log)
        return replace(
            facts,
            kv_type_k=self._options.kv_type_k,
            kv_type_v=self._options.kv_type_v,
            devices=(*(gpu.name for gpu in gpus), "CPU"),
            buffers=facts.buffers + buffers,
            kv_bytes=sum(buffer.n_bytes for buffer in buffers if buffer.holds in ("kv", "state")),
        )

    def _namespace_of(self, fingerprint: str, gpus: Sequence[llama_ffi.Device]) -> dict[str, NamespaceValue]:
        options, facts = self._options, self._facts
        return {
            "backend": "llama",
            "model": fingerprint,
            # Read from the file, so that a custom fingerprint never joins two layouts.
            "weights": f"{facts.architecture} {facts.n_params} {facts.quantization}",
            "shape": f"{facts.n_layer} {facts.n_embd} {facts.n_head} {facts.n_head_kv}",
            "overrides": json.dumps(dict(options.overrides)) if options.overrides else None,
            "libllama": llama_ffi.build_info()["source"],
            "state": llama_ffi.state_version(),
            "kv_type_k": options.kv_type_k,
            "kv_type_v": options.kv_type_v,
            # The meaning of "auto" depends on the devices.
            "flash_attn": options.flash_attn,
            "devices": "; ".join(f"{gpu.name} {gpu.description}" for gpu in gpus),
            "rope_scaling": options.rope_scaling,
            "rope_freq_base": options.rope_freq_base,
            "rope_freq_scale": options.rope_freq_scale,
            "yarn_ext_factor": options.yarn_ext_factor,
            "yarn_attn_factor": options.yarn_attn_factor,
            "yarn_beta_fast": options.yarn_beta_fast,
            "yarn_beta_slow": options.yarn_beta_slow,
            "yarn_orig_ctx": options.yarn_orig_ctx,
            "swa_full": options.swa_full,
            # Some RoPE scalings choose their factors by the size of the context.
            "rope_n_ctx": self._context.n_ctx if any(".rope.scaling." in key for key in self.metadata) else None,
        }

    @property
    def facts(self) -> ModelFacts:
        """The properties of the model, with the number of threads now."""
        threads = self.threads
        return replace(
            self._facts,
            n_threads=threads.n_threads,
            n_threads_batch=threads.n_threads_batch,
            threads_reason=threads.reason,
        )

    @property
    def description(self) -> str:
        """libllama's description of the model, such as "llama 1B Q4_0"."""
        return self._weights.model.description

    @property
    def model(self) -> llama_ffi.LlamaModel:
        """The loaded model, for its metadata."""
        return self._weights.model

    def weights_problem(self) -> str:
        """Return the reason why the weights may have changed since the load; empty if they have not."""
        return self._mapped.problem() if self._mapped is not None else ""

    def embedder(self) -> Embedder:
        """Return an embedder with separate contexts on the same weights, which it holds."""
        from erllama.engine.backends.llama_embedding import LlamaEmbedder

        options, limits = self._options, self.limits

        def make_context(pooling: str, n_tokens: int) -> llama_ffi.EmbeddingContext:
            return llama_ffi.EmbeddingContext(
                self._weights.model,
                pooling=pooling,
                n_tokens=n_tokens,
                n_sequences=n_sequences,
                n_threads=self._n_threads_batch,
                flash_attn=options.flash_attn if isinstance(options.flash_attn, bool) else None,
                type_k=llama_ffi.ggml_type(options.kv_type_k),
                type_v=llama_ffi.ggml_type(options.kv_type_v),
                **_rope(options),
            )

        # Windows and recurrent states take memory for each sequence. A text has at least one token, and a context
        # cannot have more sequences than tokens.
        limit = _MAX_EMBEDDED_TEXTS if limits.can_trim or not limits.can_generate else 1
        n_sequences = min(limit, limits.n_ubatch, llama_ffi.max_sequences())
        with translate_errors(BackendError):
            return LlamaEmbedder(
                self._weights,
                self._words,
                make_context,
                n_tokens=limits.n_ctx,
                n_batch=limits.n_ubatch,
                n_sequences=n_sequences,
                threads=self._new_threads(self._n_threads_batch),
            )

    def check_adapter(self, path: Path) -> None:
        check_adapter_file(path, self.path, self.facts.architecture)

    def load_adapter(self, path: Path) -> object:
        with self._translate_errors(AdapterLoadError, f"{path} cannot be loaded"):
            return self._adapters.load(self._context_model, path)

    def use_adapters(self, adapters: Sequence[tuple[object, float]]) -> None:
        used = self._adapters.loaded(adapters)
        with self._translate_errors(BackendError, "setting adapters"):
            self._context.set_adapters(used)
        self._used_adapters = adapters

    def free_adapter(self, adapter: object) -> None:
        self._adapters.free(adapter)

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        state_known, self._state_known = self._state_known, self.limits.can_trim
        tokens, positions, sequences, output = batch
        n_threads = self.threads.begin(len(tokens))
        try:
            if n_threads != self._n_threads_set:
                self._context.set_threads(n_threads)
                self._n_threads_set = n_threads
            logits = self._context.decode(tokens, positions, sequences, output)
        except llama_ffi.NoCellsError as error:
            self._state_known = state_known
            raise CellsExhausted(str(error)) from error
        except llama_ffi.LlamaError as error:
            self._broken = isinstance(error, llama_ffi.DecodeError)
            self._check_connection()
            if positions.max(initial=0) >= self.limits.n_ctx:
                raise CellsExhausted(str(error)) from error
            raise BackendError(str(error)) from error
        finally:
            self.threads.end()
        if self._adapts:
            self.threads.record(*self._context.times())
        self._state_known = state_known
        return logits

    def argmax(self, logits: NDArray[np.float32]) -> list[int]:
        return self._context.argmax(logits)

    def top_k(self, logits: NDArray[np.float32], out: LargestLogits) -> None:
        self._context.top_k(logits, out)

    @property
    def memory_lost(self) -> bool:
        """Whether the KV was lost with an RPC server."""
        weights = self._weights
        return weights.remote and (weights.model is not self._context_model or bool(weights.lost_server))

    def _check_connection(self) -> None:
        """Raise ServerLost if the KV was lost with an RPC server."""
        if self._weights.remote:
            self._weights.check()
            if self._weights.model is not self._context_model:  # another thread has loaded the model again
                raise ServerLost("the KV of the model was lost with an RPC server; send the request again")

    @contextmanager
    def _translate_errors(
        self, kind: type[AdapterLoadError | BackendError | ModelLoadError], context: str = ""
    ) -> Iterator[None]:
        """Raise `kind` for the binding's errors, or ServerLost if an RPC server was lost."""
        try:
            with translate_errors(kind, context):
                yield
        except kind:
            if self._weights.remote:
                self._weights.check()
                if kind is StateError:
                    self._check_connection()  # nothing is wrong with a block that a lost context refuses
            raise

    def _length(self, sequence: int) -> int:
        return self._context.last_position(sequence) + 1

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        if not self._state_known:
            raise BackendError("a decode failed, so the state of this memory is unknown; drop the sequence")
        with self._translate_errors(BackendError):
            length = self._length(sequence)
            if not 0 <= start < end <= length:
                raise BackendError(f"positions {start} to {end} of a sequence that holds {length}")
            try:
                self._context.copy(sequence, self._scratch, start, end)
                return self._context.state(self._scratch)
            finally:
                self._context.cut(self._scratch, 0)

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        self.restore_blocks(sequence, [PackedBlock(start, end, payload)])

    def restore_blocks(self, sequence: int, blocks: Sequence[PackedBlock]) -> None:
        start, end = blocks[0].start, blocks[0].start
        for block in blocks:
            if block.start != end:
                raise StateError(f"positions from {block.start} on do not follow position {end - 1}")
            if self._checks_positions:
                _check_state(block.payload, block.start, block.end)
            end = block.end
        with self._translate_errors(StateError):
            length = self._length(sequence)
            if length != start and not (self.limits.whole_state and length == 0):
                raise StateError(f"positions from {start} on, in a sequence that holds {length}")
            try:
                for group in _groups(blocks) if self._checks_positions else zip(blocks):
                    self._append(sequence, group)
            except BaseException:
                if len(blocks) > 1:
                    self._context.cut(sequence, start)
                raise

    def _append(self, sequence: int, blocks: Sequence[PackedBlock]) -> None:
        """Append blocks to a sequence that ends where they start. On an error, the sequence is unchanged."""
        # An empty sequence needs no scratch sequence: one that is refused is empty again.
        target = sequence if self._checks_positions and blocks[0].start == 0 else self._scratch
        complete = False
        try:
            if len(blocks) == 1:
                self._context.set_state(target, blocks[0].payload)
            else:
                self._context.set_states(target, [block.payload for block in blocks])
            if self._context.last_position(target) != blocks[-1].end - 1:
                raise StateError(f"the state does not end at position {blocks[-1].end - 1}")
            if target != sequence:
                self._context.copy(target, sequence)
            complete = True
        finally:
            if target != sequence or not complete:
                self._context.cut(target, 0)

    def share(self, source: int, target: int, end: int) -> None:
        if not self.limits.can_trim:
            raise BackendError("sequences can share this model's memory only as a whole")
        with translate_errors(BackendError):
            if not 0 <= end <= self._length(source) or self._length(target):
                raise BackendError(
                    f"positions 0 to {end} of a sequence that holds {self._length(source)}, "
                    f"for one that holds {self._length(target)}"
                )
            self._context.copy(source, target, 0, end)

    def cut(self, sequence: int, end: int) -> None:
        with translate_errors(BackendError):
            if not self.limits.can_trim or not self._context.cut(sequence, end):
                raise BackendError("this model's memory cannot be cut")

    def drop(self, sequence: int) -> None:
        with translate_errors(BackendError):
            self._context.cut(sequence, 0)

    def clear(self) -> None:
        with translate_errors(BackendError):
            if self._broken and not self.memory_lost:
                self._context.close()
                self._use_new_context()
            self._context.clear()
        self._state_known = True

    def recover(self) -> None:
        self._weights.reload()
        with self._translate_errors(BackendError):
            model = self._weights.model
            self._adapters.load_again(model)
            lost = self._context
            self._use_new_context()
            self._context_model = model
            lost.close()

    def _use_new_context(self) -> None:
        context = self._make_context(self._weights.model)
        context.set_adapters(self._adapters.loaded(self._used_adapters))
        context.abort(self._aborting)
        self._context = context
        self._n_threads_set = 0
        self._broken = False

    def abort(self, on: bool) -> None:
        self._aborting = on
        self._context.abort(on)

    def close(self) -> None:
        self.threads.close()
        self._context.close()
        self._adapters.close()
        self._weights.close()
        self._words.close()


def _load_vocabulary(path: Path, options: LlamaOptions) -> llama_ffi.LlamaModel:
    """Load a file's vocabulary and metadata, on this machine."""
    overrides = {key: value for key, value in (options.overrides or {}).items() if key.startswith("tokenizer.")}
    with translate_errors(ModelLoadError, f"{path} cannot be loaded"):
        return llama_ffi.LlamaModel(path, devices=[], overrides=overrides, mmap=options.mmap, vocab_only=True)


def _recipe(options: LlamaOptions, *sizes: object) -> bytes:
    """Return a 16-byte digest of what affects the bits of a result: `sizes`, placement of layers, and build."""
    placement = [options.n_gpu_layers, options.split_mode, options.main_gpu, options.tensor_split]
    build = [llama_ffi.build_info()["key"], llama_ffi.system_info()]
    return hashlib.sha256(json.dumps([sizes, placement, build]).encode()).digest()[:16]


def _threads(options: LlamaOptions) -> tuple[int, int, str]:
    """Return the numbers of threads for decoding and for prefill, and the reason for the first."""
    if options.n_threads is not None:
        n, reason = options.n_threads, f"n_threads={options.n_threads}"
    else:
        n, reason = default_threads()
        n = min(n, _MAX_THREADS)
    return n, options.n_threads_batch or n, reason


def _rope(options: LlamaOptions) -> llama_ffi.RopeOptions:
    return {
        "rope_freq_base": options.rope_freq_base or 0.0,
        "rope_freq_scale": options.rope_freq_scale or 0.0,
        "rope_scaling": options.rope_scaling,
        "yarn_ext_factor": _or_default(options.yarn_ext_factor),
        "yarn_attn_factor": _or_default(options.yarn_attn_factor),
        "yarn_beta_fast": _or_default(options.yarn_beta_fast),
        "yarn_beta_slow": _or_default(options.yarn_beta_slow),
        "yarn_orig_ctx": options.yarn_orig_ctx or 0,
    }


def _or_default(value: float | None) -> float:
    """Return a YaRN option for libllama, where a negative value selects the model's own value."""
    return -1.0 if value is None else value


def _round_up(n_ctx: int) -> int:
    """Round a size up as libllama does, but before it derives other sizes."""
    return -(-n_ctx // _N_CTX_STEP) * _N_CTX_STEP


def _groups(blocks: Sequence[PackedBlock]) -> Iterator[Sequence[PackedBlock]]:
    """Yield the blocks in the groups that are joined: small ones up to a limit, and each large one alone."""
    group: list[PackedBlock] = []
    n_bytes = 0
    for block in blocks:
        size = block.payload.nbytes
        if group and (max(size, group[-1].payload.nbytes) > _SMALL_BLOCK_BYTES or n_bytes + size > _JOINED_BYTES):
            yield group
            group, n_bytes = [], 0
        group.append(block)
        n_bytes += size
    yield group


def _check_state(payload: memoryview, start: int, end: int) -> None:
    """Raise StateError for a state of other positions than [start, end), before libllama trusts its sizes."""
    n = end - start
    if payload.nbytes < _STATE_HEAD.size + 12 * n:
        raise StateError(f"{payload.nbytes} bytes are too few for the state of {n} tokens")
    magic, _, n_streams, n_cells = _STATE_HEAD.unpack_from(payload)
    cells = np.frombuffer(payload, "<i4", 3 * n, _STATE_HEAD.size).reshape(n, 3)
    if (magic, n_streams, n_cells) != (_STATE_MAGIC, 1, n):
        raise StateError(f"not the state of {n} tokens of one sequence")
    positions, expected = cells[:, 0], np.arange(start, end)
    # The cells may be in another order than the positions.
    in_order = (positions == expected).all() or (np.sort(positions) == expected).all()
    if not in_order or not (cells[:, 1] == 1).all():
        raise StateError(f"the state is not of positions {start} to {end - 1}")
