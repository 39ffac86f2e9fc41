"""Keys: what makes two pieces of KV the same.

A key names a block and everything before it:

    key(-1) = sha256(namespace)
    key(i)  = sha256(key(i-1) || tokens of block i as little-endian u32)

so equal keys mean equal namespaces and equal token prefixes, to the token. The
namespace is the canonical text of everything that changes what KV holds or how
it is laid out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

KEY_BYTES = 32
TOKEN_BYTES = 4

NamespaceValue = str | int | float | bool | None


def namespace_key(parts: Mapping[str, NamespaceValue]) -> bytes:
    """The root key of a namespace, 32 bytes, independent of the order of `parts`."""
    canonical = json.dumps(dict(parts), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).digest()


def token_bytes(tokens: NDArray[np.integer]) -> bytes:
    """Token ids as little-endian u32, four bytes each."""
    return np.ascontiguousarray(tokens, dtype="<u4").tobytes()


def child_key(parent: bytes, tokens: bytes) -> bytes:
    """The key of the block of `tokens` (as `token_bytes` gives them) that follows `parent`."""
    return hashlib.sha256(parent + tokens).digest()


def common_prefix(a: bytes, b: bytes) -> int:
    """How many tokens two token strings share at their start."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n // TOKEN_BYTES
    left, right = np.frombuffer(a[:n], "<u4"), np.frombuffer(b[:n], "<u4")
    return int(np.argmax(left != right))
