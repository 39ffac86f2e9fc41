"""The definition of the extension module `erllama.llama_ffi._binding` for cffi.

setuptools runs it (see setup.py) and adds the directories of the libllama that it links. The declarations come from
shim.h, so there is only one copy of them.
"""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent


def declarations(header: str) -> str:
    """Return the part of shim.h between its markers, without comments, for cffi's cdef."""
    inside = header.split("/* cffi: begin */", 1)[1].split("/* cffi: end */", 1)[0]
    return re.sub(r"/\*.*?\*/", "", inside, flags=re.DOTALL)


ffibuilder = FFI()
ffibuilder.cdef(declarations((HERE / "shim.h").read_text()))
ffibuilder.set_source(
    "erllama.llama_ffi._binding",
    '#include "shim.h"',
    # Relative to the root of the project, where setuptools runs.
    sources=["llama_ffi/shim.cpp", "llama_ffi/graph_check.cpp", "llama_ffi/state_join.cpp", "llama_ffi/top_k.cpp"],
    depends=["llama_ffi/shim.h", "llama_ffi/graph_check.h", "llama_ffi/state_join.h", "llama_ffi/top_k.h"],
    py_limited_api=True,
)
