"""Key files for tests, and what must hold of the bytes of an encrypted directory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from erllama.cache.blocks.key_file import create_key_file


def new_key(path: Path) -> Path:
    """Create a key file, and return its path."""
    create_key_file(path)
    return path


def join_keys(path: Path, *newest_first: Path) -> Path:
    """Write the keys of several files to one, in place of its content, and return its path."""
    content = "".join(each.read_text() for each in newest_first)
    path.touch(mode=0o600)
    path.write_text(content)
    return path


def all_bytes(root: Path) -> bytes:
    """Return names and contents of all files below a directory."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return b"\n".join(str(path.relative_to(root)).encode() + b"\n" + path.read_bytes() for path in files)


def traces_of_tokens(tokens: NDArray[np.int32]) -> dict[str, bytes]:
    """Return the forms in which eight tokens in a row may be written. Ids are large, so that no form is short."""
    some = tokens[:8]
    return {
        "int16": some.astype("<i2").tobytes(),
        "int32": some.astype("<i4").tobytes(),
        "int32 big-endian": some.astype(">i4").tobytes(),
        "int64": some.astype("<i8").tobytes(),
        "float32": some.astype("<f4").tobytes(),
        "varint": b"".join(map(_varint, some.tolist())),
        "text": ", ".join(map(str, some.tolist())).encode(),
        "JSON": ",".join(map(str, some.tolist())).encode(),
        "hex": some.astype("<i4").tobytes().hex().encode(),
    }


def traces_of_text(text: str) -> dict[str, bytes]:
    """Return the forms in which a text may be written."""
    return {
        "utf-8": text.encode(),
        "utf-16": text.encode("utf-16-le"),
        "utf-16 big-endian": text.encode("utf-16-be"),
        "utf-32": text.encode("utf-32-le"),
        "hex": text.encode().hex().encode(),
    }


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out + bytes([value]))
