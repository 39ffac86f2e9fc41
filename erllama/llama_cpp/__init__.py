"""A drop-in for llama-cpp-python: its high-level interface, on erllama and its cache.

    from erllama.llama_cpp import Llama

    llama = Llama("model.gguf", n_ctx=4096)
    print(llama("The capital of France is", max_tokens=8)["choices"][0]["text"])

The names are those of llama-cpp-python 0.3.36. Its bindings of libllama's functions are not part of this module.
`install()` makes this module importable as `llama_cpp`, for libraries that import that.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Final

from erllama.errors import Error
from erllama.llama_cpp.constants import *  # noqa: F403
from erllama.llama_cpp.generation import LlamaState
from erllama.llama_cpp.llama import Llama
from erllama.llama_cpp.llama_cache import BaseLlamaCache, LlamaCache, LlamaDiskCache, LlamaRAMCache
from erllama.llama_cpp.llama_grammar import LlamaGrammar
from erllama.llama_cpp.llama_tokenizer import LlamaTokenizer
from erllama.llama_cpp.llama_types import *  # noqa: F403
from erllama.llama_cpp.sampling import (
    LogitsProcessor,
    LogitsProcessorList,
    MinTokensLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

__all__ = [
    "BaseLlamaCache",
    "Llama",
    "LlamaCache",
    "LlamaDiskCache",
    "LlamaGrammar",
    "LlamaRAMCache",
    "LlamaState",
    "LlamaTokenizer",
    "LogitsProcessor",
    "LogitsProcessorList",
    "MinTokensLogitsProcessor",
    "StoppingCriteria",
    "StoppingCriteriaList",
    "install",
]
__version__ = "0.3.36"  # the version of llama-cpp-python whose interface this is

# The modules of llama-cpp-python that exist here under the same names.
_MODULES: Final = (
    "llama",
    "llama_cache",
    "llama_chat_format",
    "llama_grammar",
    "llama_speculative",
    "llama_tokenizer",
    "llama_types",
)


def install() -> None:
    """Make `import llama_cpp` import this module, in this process. Call it before anything imports `llama_cpp`.

    Raises:
        Error: llama-cpp-python is already imported.
    """
    present = sys.modules.get("llama_cpp")
    module = sys.modules[__name__]
    if present is not None and present is not module and not _is_shim(present):
        raise Error("llama_cpp is already imported; call erllama.llama_cpp.install() before anything imports it")
    sys.modules["llama_cpp"] = module
    for name in _MODULES:
        sys.modules[f"llama_cpp.{name}"] = import_module(f"{__name__}.{name}")


def _is_shim(module: object) -> bool:
    return getattr(module, "__erllama__", False) is True


def __getattr__(name: str) -> object:
    if name.startswith(("llama_", "ggml_", "mtmd_")):
        raise AttributeError(f"erllama.llama_cpp has no {name}: it has no bindings of libllama's functions")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
