"""Writes a GGUF file that appears only when it is complete. For the generators of test models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from erllama.checks import import_optional

if TYPE_CHECKING:
    from gguf import GGUFWriter


def require_gguf() -> None:
    """Raise MissingPackage if the `gguf` package, which every generator of a model needs, is not installed."""
    import_optional("gguf", needed_by="writing a GGUF file", package="gguf", install="'erllama[models]'")


@contextmanager
def new_gguf(path: Path, architecture: str) -> Iterator[GGUFWriter]:
    """Yield a writer for metadata and tensors. The file appears when the block ends without an exception."""
    require_gguf()
    from gguf import GGUFWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    writer = GGUFWriter(partial, architecture)
    try:
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
