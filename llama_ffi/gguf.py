"""The header of a GGUF file, read without loading the model.

libllama's own reader does the parsing, so what passes here is what it will
see. What it does not check, and later trusts, is checked here, where it is a
tensor beyond the end of the file, or by `model_check`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from erllama.llama_ffi.library import LlamaError, check, drain_log, ffi, last_error, lib, start, text

Value = int | float | bool | str | list[str] | NDArray[np.generic]

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
    """Where one tensor lies in the file; offset in bytes from the start of the data."""

    name: str
    offset: int
    n_bytes: int
    ggml_type: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """A GGUF file's metadata and the table of its tensors.

    Attributes:
        metadata: every key; arrays of numbers as numpy arrays, arrays of strings as lists.
        tensors: in the order of the file.
        data_offset: where tensor data begins, in bytes from the start of the file.
    """

    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    data_offset: int


def read_header(path: str | Path) -> GGUFHeader:
    """Read the header of a GGUF file.

    Raises:
        LlamaError: the file is not a GGUF file that libllama can read.
    """
    gguf = _opened(path)
    metadata = {text(lib.erl_gguf_key(gguf, i)): _value(gguf, i) for i in range(lib.erl_gguf_n_keys(gguf))}
    return GGUFHeader(MappingProxyType(metadata), _tensors(gguf), int(lib.erl_gguf_data_offset(gguf)))


def read_tensor_table(path: str | Path) -> tuple[int, tuple[Tensor, ...]]:
    """`data_offset` and `tensors` of a file's header, without its metadata, which takes longer to read.

    Raises:
        LlamaError: as of `read_header`.
    """
    gguf = _opened(path)
    return int(lib.erl_gguf_data_offset(gguf)), _tensors(gguf)


def _opened(path: str | Path) -> object:
    start()
    opened = lib.erl_gguf_open(str(path).encode("utf-8", "surrogateescape"))
    reason = last_error()
    problems = drain_log()
    if not opened:
        raise LlamaError(reason or "; ".join(problems[-2:]) or "not a GGUF file")
    return ffi.gc(opened, lib.erl_gguf_free)


def _tensors(gguf: object) -> tuple[Tensor, ...]:
    return tuple(_tensor(gguf, i) for i in range(lib.erl_gguf_n_tensors(gguf)))


def _value(gguf: object, i: int) -> Value:
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
    """Read a file's header, and refuse one that would lead libllama beyond the file.

    Reads the header alone. What libllama itself refuses with an error is left to it; see `model_check`, too.

    Args:
        overrides: metadata that takes the place of the file's.

    Returns:
        the header, with the overrides in it.

    Raises:
        LlamaError: the file is no GGUF file, or is cut short.
    """
    header = read_header(path)
    metadata = MappingProxyType({**header.metadata, **(overrides or {})})
    check_length(path, header)
    return GGUFHeader(metadata, header.tensors, header.data_offset)


def check_length(path: str | Path, header: GGUFHeader) -> None:
    """Refuse a file that ends before its tensors do.

    Raises:
        LlamaError: it does.
    """
    size = Path(path).stat().st_size
    for tensor in header.tensors:
        end = header.data_offset + tensor.offset + tensor.n_bytes
        if end > size:
            raise LlamaError(
                f"tensor {tensor.name!r} ends at byte {end} of a file of {size}: the file is cut short"
            )
