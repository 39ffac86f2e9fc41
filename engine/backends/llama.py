"""The backend over libllama: one model, one context, a scratch sequence for moving blocks.

A block leaves the context by way of the scratch sequence: its cells are tagged
as the scratch's, without a copy, and the scratch's state is exactly the KV of
those positions. It comes back the same way. Errors of the binding become this
library's.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from erllama.cache.blocks.keys import NamespaceValue
from erllama.engine.backend import Batch, Limits
from erllama.engine.backends.file_identity import MappedFiles
from erllama.engine.backends.llama_adapters import check_adapter_file
from erllama.engine.backends.llama_file import LlamaVocabulary, buffers_in, chat_templates, facts_of, load_file
from erllama.engine.backends.llama_library import llama_ffi, translated
from erllama.engine.backends.llama_options import LlamaOptions
from erllama.engine.embedding import Embedder
from erllama.engine.processors import default_threads
from erllama.errors import AdapterLoadError, BackendError, CellsExhausted, ModelLoadError, StateError

_DEFAULT_N_CTX = 4096
_N_CTX_STEP = 256
_EMBEDDED_TOGETHER = 64  # texts: more take more memory in every computation, and n_ubatch is soon full
# How libllama's state of one sequence begins: magic, sequence, streams, cells;
# then, for each cell, its position, the number of its sequences, and the sequence.
_STATE_HEAD = struct.Struct("<IiII")
_STATE_MAGIC = 0xAF143CD8
_ROPE_ONE_POSITION = (-1, 0, 2)  # none, norm, neox: one position a cell


class LlamaBackend:
    """A GGUF model on libllama.

    Args:
        path: the GGUF file.
        options: how to load it.
        fingerprint: names the file's content, for the cache.
        on_progress: called with the fraction loaded; returning False cancels.
        identity: the `identity` of the files, taken before `fingerprint` was; None for files that nobody changes.

    Raises:
        ModelLoadError: the file cannot be loaded, or its context not made.
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
        # A file that is read and not mapped may be changed once it is loaded.
        self._mapped = MappedFiles(path, identity) if identity is not None and options.mmap else None
        file = load_file(path, options, on_progress)
        model, self.metadata, n_positions = file
        try:
            self._model = model
            self.vocabulary = LlamaVocabulary(model.vocabulary)
            shape = model.shape
            if shape.has_encoder or not shape.has_decoder or shape.diffusion:
                raise ModelLoadError(f"{path}: a model that does not generate text one token at a time")
            # Only full attention may be cut anywhere; seq_rm's own answer cannot be trusted for the rest.
            can_trim = not (shape.recurrent or shape.hybrid or shape.n_swa > 0)
            whole_state = shape.recurrent and not shape.hybrid
            n_sequences = options.n_sequences + (options.n_spare_sequences if can_trim else 0)
            threads = options.n_threads or default_threads()
            threads_batch = options.n_threads_batch or threads
            self._scratch = n_sequences
            self._options, self._n_threads_batch = options, threads_batch
            self._make_context = partial(
                llama_ffi.LlamaContext,
                model,
                n_ctx=_padded(options.n_ctx or min(shape.n_ctx_train or _DEFAULT_N_CTX, _DEFAULT_N_CTX)),
                n_batch=options.n_batch,
                n_ubatch=min(options.n_ubatch, options.n_batch),
                n_seq_max=n_sequences + 1,
                n_threads=threads,
                n_threads_batch=threads_batch,
                flash_attn=options.flash_attn if isinstance(options.flash_attn, bool) else None,
                type_k=llama_ffi.ggml_type(options.kv_type_k),
                type_v=llama_ffi.ggml_type(options.kv_type_v),
                swa_full=options.swa_full,
                **_rope(options),
            )
            with translated(ModelLoadError, f"{path}: no context can be made"):
                self._context = self._make_context()
            context = self._context
            self.chat_templates = chat_templates(self.metadata)
            facts = facts_of(path, file, self.vocabulary.noted)
        except BaseException:
            model.close()
            raise
        encodes = not context.has_memory
        if encodes:
            context.close()  # no decode will come: an embedder makes one of its own
        self.limits = Limits(
            # No text is longer than the table of learned positions, where there is one.
            min(context.n_ctx, shape.n_ctx_train if encodes else n_positions or context.n_ctx),
            context.n_batch,
            context.n_ubatch,
            context.n_vocab,
            can_trim,
            whole_state,
            max(shape.n_swa, 0),
            n_sequences,
            0 if encodes else llama_ffi.cell_bytes(model, context.type_k, context.type_v),
            can_generate=not encodes,
        )
        self._state_known = True  # False after a decode that failed, for memory that cannot be cut back
        self._broken = False  # a decode failed in a way that nobody planned: the context may be in any state
        self._aborting = False
        self._loaded_adapters: set[llama_ffi.LlamaAdapter] = set()
        self._used_adapters: list[tuple[llama_ffi.LlamaAdapter, float]] = []
        self._checks_positions = can_trim and shape.rope_type in _ROPE_ONE_POSITION
        gpus = options.computing_devices()
        buffers = buffers_in(context.said)
        self.facts = replace(
            facts,
            n_threads=threads,
            n_threads_batch=threads_batch,
            kv_type_k=options.kv_type_k,
            kv_type_v=options.kv_type_v,
            devices=(*(gpu.name for gpu in gpus), "CPU"),
            buffers=facts.buffers + buffers,
            kv_bytes=sum(buffer.n_bytes for buffer in buffers if buffer.holds in ("kv", "state")),
        )
        build = llama_ffi.build_info()
        self.namespace: Mapping[str, NamespaceValue] = {
            "backend": "llama",
            "model": fingerprint,
            # Read from the file, so that a fingerprint of the caller's own never joins two layouts.
            "weights": f"{facts.architecture} {facts.n_params} {facts.quantization}",
            "shape": f"{facts.n_layer} {facts.n_embd} {facts.n_head} {facts.n_head_kv}",
            "overrides": json.dumps(dict(options.overrides)) if options.overrides else None,
            "libllama": build["source"],
            "state": llama_ffi.state_version(),
            "kv_type_k": options.kv_type_k,
            "kv_type_v": options.kv_type_v,
            # What "auto" comes to depends on the devices.
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
            "rope_n_ctx": context.n_ctx if any(".rope.scaling." in key for key in self.metadata) else None,
        }
        self.recipe = _recipe(
            options,
            context.n_ubatch,
            threads,
            threads_batch,
            # The cells of a sliding window are laid out by these.
            (context.n_ctx, n_sequences) if shape.n_swa > 0 else None,
        )

    @property
    def description(self) -> str:
        """What it is, in libllama's words, as "llama 1B Q4_0"."""
        return self._model.description

    @property
    def model(self) -> llama_ffi.LlamaModel:
        """The loaded model, for its metadata."""
        return self._model

    def weights_problem(self) -> str:
        """Return why the weights may have changed since they were loaded; empty as long as they have not."""
        return self._mapped.problem() if self._mapped is not None else ""

    def embedder(self) -> Embedder:
        """For embeddings: contexts of its own on the same weights, which it holds."""
        from erllama.engine.backends.llama_embedding import LlamaEmbedder

        options, limits = self._options, self.limits

        def make_context(pooling: str, n_tokens: int) -> llama_ffi.EmbeddingContext:
            return llama_ffi.EmbeddingContext(
                self._model,
                pooling=pooling,
                n_tokens=n_tokens,
                n_sequences=n_sequences,
                n_threads=self._n_threads_batch,
                flash_attn=options.flash_attn if isinstance(options.flash_attn, bool) else None,
                type_k=llama_ffi.ggml_type(options.kv_type_k),
                type_v=llama_ffi.ggml_type(options.kv_type_v),
                **_rope(options),
            )

        # Windows and recurrent states take memory for each sequence. A text has a token at least, and a context
        # of more sequences than tokens cannot be made.
        most = _EMBEDDED_TOGETHER if limits.can_trim or not limits.can_generate else 1
        n_sequences = min(most, limits.n_ubatch, llama_ffi.max_sequences())
        with translated(BackendError):
            return LlamaEmbedder(
                self._model,
                make_context,
                n_tokens=limits.n_ctx,
                n_batch=limits.n_ubatch,
                n_sequences=n_sequences,
            )

    def check_adapter(self, path: Path) -> None:
        check_adapter_file(path, self.path, self.facts.architecture)

    def load_adapter(self, path: Path) -> llama_ffi.LlamaAdapter:
        with translated(AdapterLoadError, f"{path} cannot be loaded"):
            adapter = llama_ffi.LlamaAdapter(self._model, path)
        self._loaded_adapters.add(adapter)
        return adapter

    def use_adapters(self, adapters: Sequence[tuple[object, float]]) -> None:
        used = [(adapter, scale) for adapter, scale in adapters if isinstance(adapter, llama_ffi.LlamaAdapter)]
        if len(used) < len(adapters):
            raise BackendError("an adapter that is none of libllama's")
        with translated(BackendError, "setting adapters"):
            self._context.set_adapters(used)
        self._used_adapters = used

    def free_adapter(self, adapter: object) -> None:
        if isinstance(adapter, llama_ffi.LlamaAdapter):
            self._loaded_adapters.discard(adapter)
            adapter.close()

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        known, self._state_known = self._state_known, self.limits.can_trim
        try:
            logits = self._context.decode(batch.tokens, batch.positions, batch.sequences, batch.output)
        except llama_ffi.NoCellsError as error:
            self._state_known = known
            raise CellsExhausted(str(error)) from error
        except llama_ffi.LlamaError as error:
            self._broken = isinstance(error, llama_ffi.DecodeError)
            if batch.positions.max(initial=0) >= self.limits.n_ctx:
                raise CellsExhausted(str(error)) from error
            raise BackendError(str(error)) from error
        self._state_known = known
        return logits

    def _held(self, sequence: int) -> int:
        return self._context.last_position(sequence) + 1

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        if not self._state_known:
            raise BackendError("a decode failed, and nobody knows what this memory holds; drop the sequence")
        with translated(BackendError):
            held = self._held(sequence)
            if not 0 <= start < end <= held:
                raise BackendError(f"positions {start} to {end} of a sequence that holds {held}")
            try:
                self._context.copy(sequence, self._scratch, start, end)
                return self._context.state(self._scratch)
            finally:
                self._context.cut(self._scratch, 0)

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        if self._checks_positions:
            _check_state(payload, start, end)
        with translated(StateError):
            held = self._held(sequence)
            if held != start and not (self.limits.whole_state and held == 0):
                raise StateError(f"positions from {start} on, in a sequence that holds {held}")
            try:
                self._context.set_state(self._scratch, payload)
                if self._context.last_position(self._scratch) != end - 1:
                    raise StateError(f"the state does not end at position {end - 1}")
                self._context.copy(self._scratch, sequence)
            finally:
                self._context.cut(self._scratch, 0)

    def share(self, source: int, target: int, end: int) -> None:
        if not self.limits.can_trim:
            raise BackendError("this model's memory is shared by sequences whole or not at all")
        with translated(BackendError):
            if not 0 <= end <= self._held(source) or self._held(target):
                raise BackendError(
                    f"positions 0 to {end} of a sequence that holds {self._held(source)}, "
                    f"for one that holds {self._held(target)}"
                )
            self._context.copy(source, target, 0, end)

    def cut(self, sequence: int, end: int) -> None:
        with translated(BackendError):
            if not self.limits.can_trim or not self._context.cut(sequence, end):
                raise BackendError("this model's memory cannot be cut")

    def drop(self, sequence: int) -> None:
        with translated(BackendError):
            self._context.cut(sequence, 0)

    def clear(self) -> None:
        with translated(BackendError):
            if self._broken:
                self._context.close()
                self._context = self._make_context()
                self._context.set_adapters(self._used_adapters)
                self._context.abort(self._aborting)
                self._broken = False
            self._context.clear()
        self._state_known = True

    def abort(self, on: bool) -> None:
        self._aborting = on
        self._context.abort(on)

    def close(self) -> None:
        self._context.close()
        for adapter in self._loaded_adapters:
            adapter.close()
        self._model.close()


def _recipe(options: LlamaOptions, *sizes: object) -> bytes:
    """16 bytes over what changes the bits of a computation: `sizes`, where the layers are, and the build."""
    where = [options.n_gpu_layers, options.split_mode, options.main_gpu, options.tensor_split]
    build = [llama_ffi.build_info()["key"], llama_ffi.system_info()]
    return hashlib.sha256(json.dumps([sizes, where, build]).encode()).digest()[:16]


def _rope(options: LlamaOptions) -> llama_ffi.RopeOptions:
    return {
        "rope_freq_base": options.rope_freq_base or 0.0,
        "rope_freq_scale": options.rope_freq_scale or 0.0,
        "rope_scaling": options.rope_scaling,
        "yarn_ext_factor": _or_own(options.yarn_ext_factor),
        "yarn_attn_factor": _or_own(options.yarn_attn_factor),
        "yarn_beta_fast": _or_own(options.yarn_beta_fast),
        "yarn_beta_slow": _or_own(options.yarn_beta_slow),
        "yarn_orig_ctx": options.yarn_orig_ctx or 0,
    }


def _or_own(value: float | None) -> float:
    """libllama takes the model's own for what is negative."""
    return -1.0 if value is None else value


def _padded(n_ctx: int) -> int:
    """As libllama rounds it, but before it derives other sizes from it."""
    return -(-n_ctx // _N_CTX_STEP) * _N_CTX_STEP


def _check_state(payload: memoryview, start: int, end: int) -> None:
    """Refuse a state that is not of positions [start, end), before libllama trusts its sizes."""
    n = end - start
    if payload.nbytes < _STATE_HEAD.size + 12 * n:
        raise StateError(f"{payload.nbytes} bytes are too few for the state of {n} tokens")
    magic, _, n_streams, n_cells = _STATE_HEAD.unpack_from(payload)
    cells = np.frombuffer(payload, "<i4", 3 * n, _STATE_HEAD.size).reshape(n, 3)
    if (magic, n_streams, n_cells) != (_STATE_MAGIC, 1, n):
        raise StateError(f"not the state of {n} tokens of one sequence")
    # In the order of the cells, which need not be that of the positions.
    if not np.array_equal(np.sort(cells[:, 0]), np.arange(start, end)) or not np.all(cells[:, 1] == 1):
        raise StateError(f"the state is not of positions {start} to {end - 1}")
