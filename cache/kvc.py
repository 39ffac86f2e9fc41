"""Reads and writes `.kvc` files: the public name of `erllama.cache.blocks.kvc`."""

from erllama.cache.blocks.kvc import (
    MAGIC,
    MAX_TOKENS,
    SUFFIX,
    VERSION,
    decode_header,
    encode_header,
    header_bytes,
    read,
    read_header,
    read_header_from,
    write,
)

__all__ = [
    "MAGIC",
    "MAX_TOKENS",
    "SUFFIX",
    "VERSION",
    "decode_header",
    "encode_header",
    "header_bytes",
    "read",
    "read_header",
    "read_header_from",
    "write",
]
