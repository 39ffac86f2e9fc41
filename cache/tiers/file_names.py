"""Names of the files of a cache directory: the index, and one file per block."""

from __future__ import annotations

import re
from pathlib import Path

from erllama.cache.blocks import kvc
from erllama.cache.blocks.encryption import NAME_OVERHEAD
from erllama.cache.blocks.keys import KEY_BYTES

INDEX_NAME = "index.db"
# The key in hex, or the encrypted key.
BLOCK_FILE = re.compile(rf"[0-9a-f]{{{2 * KEY_BYTES}}}([0-9a-f]{{{2 * NAME_OVERHEAD}}})?{re.escape(kvc.SUFFIX)}")


def block_path(root: Path, name: bytes) -> Path:
    """Return the path of the file of a block.

    Args:
        name: the key of the block, or its encrypted key.
    """
    return root / "blocks" / f"{name.hex()}{kvc.SUFFIX}"


def block_name(file_name: str) -> bytes | None:
    """Return the key or the encrypted key in a file name; None if it is not the name of a block file."""
    return bytes.fromhex(file_name.removesuffix(kvc.SUFFIX)) if BLOCK_FILE.fullmatch(file_name) else None


def is_encrypted_name(name: bytes) -> bool:
    """Return whether `block_name` returned an encrypted key."""
    return len(name) != KEY_BYTES
