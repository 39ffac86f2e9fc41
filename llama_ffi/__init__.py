"""libllama for Python: models, vocabularies, contexts and GGUF headers, without policy.

A thin, typed layer over a libllama that was built with this package. It raises `LlamaError` for failures, and for
arguments that would make libllama abort. It passes libllama's log to the logger `erllama.llama`, and frees native
objects correctly for any order of closing. The first use starts libllama's backends; the import does not. Imports
run from contexts and adapters to `model`, `vocabulary` and `gguf`, then to `handle` and `library`.
"""

from erllama.llama_ffi.adapter import LlamaAdapter, check_adapter
from erllama.llama_ffi.context import LlamaContext, cell_bytes
from erllama.llama_ffi.context_options import RopeOptions
from erllama.llama_ffi.embedding import POOLINGS, EmbeddingContext, own_pooling
from erllama.llama_ffi.gguf import GGUFHeader, Tensor, check_header, read_header, read_tensor_table
from erllama.llama_ffi.library import (
    AbortedError,
    DecodeError,
    Device,
    LlamaError,
    NoCellsError,
    ServerError,
    add_rpc_server,
    build_info,
    devices,
    ggml_block_size,
    ggml_type,
    max_sequences,
    missing_gpu,
    rpc_connection,
    rpc_server_program,
    state_version,
    system_info,
)
from erllama.llama_ffi.model import LlamaModel, LoadCancelledError, ModelShape, UnusedOverrideError
from erllama.llama_ffi.model_check import check_hyperparameters, check_tensors
from erllama.llama_ffi.vocabulary import Vocabulary

__all__ = [
    "POOLINGS",
    "AbortedError",
    "DecodeError",
    "Device",
    "EmbeddingContext",
    "GGUFHeader",
    "LlamaAdapter",
    "LlamaContext",
    "LlamaError",
    "LlamaModel",
    "LoadCancelledError",
    "ModelShape",
    "NoCellsError",
    "RopeOptions",
    "ServerError",
    "Tensor",
    "UnusedOverrideError",
    "Vocabulary",
    "add_rpc_server",
    "build_info",
    "cell_bytes",
    "check_adapter",
    "check_header",
    "check_hyperparameters",
    "check_tensors",
    "devices",
    "ggml_block_size",
    "ggml_type",
    "max_sequences",
    "missing_gpu",
    "own_pooling",
    "read_header",
    "read_tensor_table",
    "rpc_connection",
    "rpc_server_program",
    "state_version",
    "system_info",
]
