"""The header of a GGUF file, read without loading the model.

libllama's reader parses the header, so a load sees the same values. libllama trusts some values without a check.
This module checks that no tensor lies beyond the end of the file; `model_check` checks the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from erllama.llama_ffi.library import LlamaError, check, drain_log, ffi, last_error, lib, start, text

GGUFValue = int | float | bool | str | list[str] | NDArray[np.generic]

_NUMPY_TYPES: dict[int, type[np.generic]] = {
    0: np.uint8,
    1: np.int8,
    2: np.uint16,
    3: np.int16,
    4: np.uint32,
    5: np.int32,
    6: np.float32,
    7: np.bool_,
    10: np.uint64,
    11: np.int64,
    12: np.float64,
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor's place in the file. `offset` is in bytes from the start of the data."""

    name: str
    offset: int
    n_bytes: int
    ggml_type: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """A GGUF file's metadata and the table of its tensors.

    Attributes:
        metadata: all keys; arrays of numbers as numpy arrays, arrays of strings as lists.
        tensors: in the order of the file.
        data_offset: the start of the tensor data, in bytes from the start of the file.
    """

    metadata: Mapping[str, GGUFValue]
    tensors: tuple[Tensor, ...]
    data_offset: int


def read_header(path: str | Path, *, lists_of_texts: bool = True) -> GGUFHeader:
    """Read the header of a GGUF file.

    Args:
        lists_of_texts: read metadata that are lists of texts. Those of a vocabulary take longer than all else.

    Raises:
        LlamaError: the file is not a GGUF file that libllama can read.
    """
    gguf = _open(path)
    metadata = {
        text(lib.erl_gguf_key(gguf, i)): _value(gguf, i)
        for i in range(lib.erl_gguf_n_keys(gguf))
        if lists_of_texts or lib.erl_gguf_type(gguf, i) != _ARRAY or lib.erl_gguf_array_type(gguf, i) != _STRING
    }
    return GGUFHeader(MappingProxyType(metadata), _tensors(gguf), int(lib.erl_gguf_data_offset(gguf)))


def read_tensor_table(path: str | Path) -> tuple[int, tuple[Tensor, ...]]:
    """Read `data_offset` and `tensors` of a file's header. Skips the metadata, which takes longer to read.

    Raises:
        LlamaError: the file is not a GGUF file that libllama can read.
    """
    gguf = _open(path)
    return int(lib.erl_gguf_data_offset(gguf)), _tensors(gguf)


def _open(path: str | Path) -> object:
    start()
    gguf = lib.erl_gguf_open(str(path).encode("utf-8", "surrogateescape"))
    reason = last_error()
    problems = drain_log()
    if not gguf:
        raise LlamaError(reason or "; ".join(problems[-2:]) or "not a GGUF file")
    return ffi.gc(gguf, lib.erl_gguf_free)


def _tensors(gguf: object) -> tuple[Tensor, ...]:
    return tuple(_tensor(gguf, i) for i in range(lib.erl_gguf_n_tensors(gguf)))


def _value(gguf: object, i: int) -> GGUFValue:
    kind = check(lib.erl_gguf_type(gguf, i), "reading metadata")
    if kind == _STRING:
        return text(lib.erl_gguf_string(gguf, i))
    if kind != _ARRAY:
        dtype = np.dtype(_NUMPY_TYPES[kind])
        raw = bytes(ffi.buffer(ffi.cast("char *", lib.erl_gguf_value(gguf, i)), dtype.itemsize))
        found: int | float | bool = np.frombuffer(raw, dtype)[0].item()
        return found
    kind = check(lib.erl_gguf_array_type(gguf, i), "reading metadata")
    n = check(lib.erl_gguf_array_length(gguf, i), "reading metadata")
    if kind == _STRING:
        return [text(lib.erl_gguf_array_string(gguf, i, j)) for j in range(n)]
    dtype = np.dtype(_NUMPY_TYPES[kind])
    if n == 0:
        return np.empty(0, dtype)
    return np.frombuffer(
        bytes(ffi.buffer(ffi.cast("char *", lib.erl_gguf_value(gguf, i)), n * dtype.itemsize)), dtype
    )


def _tensor(gguf: object, i: int) -> Tensor:
    offset, size = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    kind, shape = ffi.new("int32_t *"), ffi.new("int64_t[4]")
    check(lib.erl_gguf_tensor(gguf, i, offset, size, kind, shape), "reading a tensor")
    name = text(lib.erl_gguf_tensor_name(gguf, i))
    return Tensor(name, int(offset[0]), int(size[0]), int(kind[0]), tuple(int(d) for d in shape))


def check_header(path: str | Path, overrides: Mapping[str, int | float | bool | str] | None = None) -> GGUFHeader:
    """Read a file's header, and check that libllama will not read beyond the end of the file.

    Reads only the header. libllama itself raises errors for other faults; see also `model_check`.

    Args:
        overrides: metadata that replaces the file's.

    Returns:
        the header with the overrides.

    Raises:
        LlamaError: the file is not a GGUF file, or is truncated.
    """
    header = read_header(path)
    metadata = MappingProxyType({**header.metadata, **(overrides or {})})
    check_length(path, header)
    return GGUFHeader(metadata, header.tensors, header.data_offset)


def check_length(path: str | Path, header: GGUFHeader) -> None:
    """Check that a file does not end before its tensors.

    Raises:
        LlamaError: the file is truncated.
    """
    size = Path(path).stat().st_size
    for tensor in header.tensors:
        end = header.data_offset + tensor.offset + tensor.n_bytes
        if end > size:
            raise LlamaError(
                f"tensor {tensor.name!r} ends at byte {end} of a file of {size}: the file is truncated"
            )
