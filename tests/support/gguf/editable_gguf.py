"""GGUF files as values that tests edit: metadata, tensor shapes and types. Without checks."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_ALIGNMENT = 32
# Elements per block and bytes per block.
BLOCKS: Mapping[int, tuple[int, int]] = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
TYPE_NAMES = {int(kind): kind.name for kind in GGMLQuantizationType}


@dataclass
class TensorEntry:
    """A tensor: its shape as in GGUF (rows last), its type, its bytes (random if None)."""

    shape: list[int]
    kind: int = 0
    content: bytes | None = None


@dataclass
class EditableGGUF:
    """A file's metadata, as (type, value), and its tensors. An array's value is (type of its items, items)."""

    metadata: dict[str, tuple[int, object]] = field(default_factory=dict)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"][1])

    def copy(self) -> EditableGGUF:
        """Return a copy to edit. The bytes of tensors are shared."""
        return EditableGGUF(
            deepcopy(self.metadata),
            {name: TensorEntry(list(t.shape), t.kind, t.content) for name, t in self.tensors.items()},
        )

    def write(self, path: Path, seed: int = 0) -> None:
        dice = random.Random(seed)
        head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.metadata)))
        for key, (kind, value) in self.metadata.items():
            head += _text(key) + struct.pack("<I", kind) + _packed(kind, value)
        contents = bytearray()
        for name, tensor in self.tensors.items():
            head += _text(name) + struct.pack("<I", len(tensor.shape))
            head += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape)
            head += struct.pack("<IQ", tensor.kind, len(contents))
            content = tensor.content
            n = n_bytes(tensor.shape, tensor.kind)
            if content is None or len(content) != n:
                content = _drawn(dice, tensor.kind, n)
            contents += content + bytes(-len(content) % _ALIGNMENT)
        path.write_bytes(bytes(head) + bytes(-len(head) % _ALIGNMENT) + bytes(contents))


def n_bytes(shape: list[int], kind: int) -> int:
    """Return the bytes of a tensor, at most 1 MiB, however large its shape is."""
    n_block, n_block_bytes = BLOCKS.get(kind, (1, 4))
    n = 1
    for size in shape:
        n *= size
    return min(-(-n // n_block) * n_block_bytes, 1 << 20)


def read(path: Path) -> EditableGGUF:
    content = path.read_bytes()
    _, _, n_tensors, n_keys = struct.unpack_from("<IIQQ", content)
    found, at = EditableGGUF(), 24
    for _ in range(n_keys):
        key, at = _read(content, at, STRING)
        (kind,) = struct.unpack_from("<I", content, at)
        value, at = _read(content, at + 4, kind)
        found.metadata[str(key)] = (kind, value)
    places: list[tuple[TensorEntry, int]] = []
    for _ in range(n_tensors):
        name, at = _read(content, at, STRING)
        (n_dims,) = struct.unpack_from("<I", content, at)
        shape = list(struct.unpack_from(f"<{n_dims}Q", content, at + 4))
        kind, offset = struct.unpack_from("<IQ", content, at + 4 + 8 * n_dims)
        at += 16 + 8 * n_dims
        found.tensors[str(name)] = TensorEntry(shape, kind)
        places.append((found.tensors[str(name)], offset))
    begin = at + -at % _ALIGNMENT
    for tensor, offset in places:
        tensor.content = content[begin + offset : begin + offset + n_bytes(tensor.shape, tensor.kind)]
    return found


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _packed(kind: int, value: object) -> bytes:
    if kind == STRING:
        return _text(str(value))
    if kind == ARRAY:
        assert isinstance(value, tuple)
        item_kind, items = value
        return struct.pack("<IQ", item_kind, len(items)) + b"".join(_packed(item_kind, item) for item in items)
    return struct.pack(_FORMATS[kind], value)


def _read(content: bytes, at: int, kind: int) -> tuple[object, int]:
    if kind == STRING:
        (n,) = struct.unpack_from("<Q", content, at)
        return content[at + 8 : at + 8 + n].decode(), at + 8 + n
    if kind == ARRAY:
        item_kind, n = struct.unpack_from("<IQ", content, at)
        at, items = at + 12, []
        for _ in range(n):
            item, at = _read(content, at, item_kind)
            items.append(item)
        return (item_kind, items), at
    (value,) = struct.unpack_from(_FORMATS[kind], content, at)
    return value, at + struct.calcsize(_FORMATS[kind])


def _drawn(dice: random.Random, kind: int, n: int) -> bytes:
    """Return random weights of magnitude 0.1, or random bytes for a packed type."""
    if kind == 0:
        cycle = struct.pack("<64f", *(dice.gauss(0, 0.1) for _ in range(64)))
    elif kind == 1:
        cycle = struct.pack("<64e", *(dice.gauss(0, 0.1) for _ in range(64)))
    else:
        cycle = dice.randbytes(256)
    return (cycle * (n // len(cycle) + 1))[:n]
