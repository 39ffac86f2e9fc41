"""Estimates the memory of weights on the CPU, with the copies that libllama makes of them in another order.

libllama stores a weight matrix again in the order that the processor's instructions read, if it has a kernel for
the matrix's type and shape. The mapped original is then not read any more. `memory_estimate` calls this module. The
rules are those of ggml's CPU backend of the pinned release (`ggml-cpu/amx` and `ggml-cpu/repack.cpp`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from erllama.engine.backends.llama_library import llama_ffi

_AMX_FEATURES = ("AMX_INT8", "AVX512_VNNI")
# By type of weights: the length of a row is a multiple of the first number, and a block of so many values takes
# so many bytes more than in the file. The third number is the bytes of a block in the file.
_AMX_TYPES = {
    "q4_0": (32, 0, 18),
    "q4_1": (32, 0, 20),
    "q8_0": (32, 4, 34),
    "q4_K": (256, 4, 144),
    "q5_K": (256, 4, 176),
    "q6_K": (256, 0, 210),
    "iq4_xs": (256, 2, 136),
    "f16": (16, 0, 2),
}
_AMX_ROWS = 32  # the number of rows is a multiple of it
# By type of weights: the features with which it is repacked, and what the number of rows is a multiple of.
_REPACKED = {
    "q4_0": (("AVX2", 8), ("DOTPROD", 4), ("MATMUL_INT8", 4)),
    "q4_K": (("AVX2", 8), ("DOTPROD", 8), ("MATMUL_INT8", 8)),
    "q2_K": (("AVX512", 8),),
    "q5_K": (("DOTPROD", 8), ("MATMUL_INT8", 8)),
    "q6_K": (("DOTPROD", 8), ("MATMUL_INT8", 8)),
    "iq4_nl": (("AVX2", 8), ("NEON", 4)),
    "mxfp4": (("AVX2", 8), ("DOTPROD", 4)),
    "q8_0": (("DOTPROD", 4), ("MATMUL_INT8", 4)),
}
_TABLES = ("token_embd.", "position_embd.", "token_types.", "per_layer_token_embd.")  # read by rows, not multiplied
_CONVOLUTION = re.compile(r"conv1d?\.weight")
_FEATURE = re.compile(r"(\w+) = 1")


class WeightSizes(NamedTuple):
    """The memory of a model's weights, in bytes.

    Attributes:
        needed: of the weights that are read: copies, and those that have none.
        mapped: of the rest of the mapped file, which is not read after loading. The kernel reclaims this memory.
        copies: of `needed`, the copies.
    """

    needed: int
    mapped: int
    copies: int


def weight_sizes(
    files: Sequence[Sequence[llama_ffi.Tensor]],
    *,
    mmap: bool,
    is_tied: bool,
    features: frozenset[str] | None = None,
) -> WeightSizes:
    """Return the memory of weights that the CPU computes with.

    Args:
        files: the tensors of each file of the model.
        mmap: as of `load_model`.
        is_tied: whether the table of the tokens' embeddings is the output matrix, too.
        features: of the processor, in libllama's words. None for those of this machine.
    """
    features = processor_features() if features is None else features
    types = {llama_ffi.ggml_type(name): name for name in {*_AMX_TYPES, *_REPACKED}}
    copies = used = mapped = 0
    for tensors in files:
        begin, end = 2**63, 0
        for tensor in tensors:
            kind = types.get(tensor.ggml_type, "")
            is_table = tensor.name.startswith(_TABLES)
            copy = 0
            if not is_table or (is_tied and tensor.name == "token_embd.weight"):
                copy = _copied_bytes(tensor, kind, features)
            copies += copy
            if is_table or not copy:
                used += tensor.n_bytes
                begin, end = min(begin, tensor.offset), max(end, tensor.offset + tensor.n_bytes)
        mapped += max(end - begin, 0)
    return WeightSizes(copies + used, max(mapped - used, 0) if mmap else 0, copies)


def processor_features() -> frozenset[str]:
    """Return the features of the processor that libllama uses, such as "AVX2" and "REPACK"."""
    return frozenset(_FEATURE.findall(llama_ffi.system_info()))


def _copied_bytes(tensor: llama_ffi.Tensor, kind: str, features: frozenset[str]) -> int:
    """Return the bytes of a matrix's copy; 0 if libllama makes none."""
    columns, rows, n_matrices = tensor.shape[0], tensor.shape[1], tensor.shape[2]
    if rows == 1 or _CONVOLUTION.search(tensor.name):
        return 0
    # AMX has no kernel for the matrices of experts.
    if kind in _AMX_TYPES and n_matrices == 1 and features.issuperset(_AMX_FEATURES):
        multiple, added, block = _AMX_TYPES[kind]
        if columns % multiple == 0 and rows % _AMX_ROWS == 0:
            return tensor.n_bytes + tensor.n_bytes // block * added
    if "REPACK" in features and any(
        feature in features and rows % multiple == 0 for feature, multiple in _REPACKED.get(kind, ())
    ):
        return tensor.n_bytes
    return 0
