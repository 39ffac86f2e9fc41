"""Keys of blocks: SHA-256 over a namespace and a token prefix.

A key identifies a block and everything before it:

    key(-1) = sha256(namespace)
    key(i)  = sha256(key(i-1) || tokens of block i as little-endian u32)

So equal keys mean equal namespaces and equal token prefixes, to the token. The namespace is the canonical text of
everything that changes the content of KV or its layout. Cache and engine compute keys with these functions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from erllama.errors import OptionError

KEY_BYTES = 32
TOKEN_BYTES = 4

NamespaceValue = str | int | float | bool | None


def namespace_key(parts: Mapping[str, NamespaceValue]) -> bytes:
    """Return the root key of a namespace, 32 bytes, independent of the order of `parts`."""
    canonical = json.dumps(dict(parts), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).digest()


def token_bytes(tokens: Sequence[int] | NDArray[np.integer]) -> bytes:
    """Return token ids, shape (n,), as little-endian u32, four bytes each.

    Raises:
        OptionError: the ids are not integers from 0 to 2**32 - 1.
    """
    try:
        ids = np.asarray(tokens)
    except (ValueError, OverflowError) as error:
        raise OptionError(f"token ids: {error}; pass integers from 0 to 2**32 - 1") from None
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise OptionError(f"token ids of shape {ids.shape} and type {ids.dtype}; pass integers, shape (n,)")
    if ids.size and ids.dtype != np.uint32 and (ids.min() < 0 or ids.max() >= 2**32):
        wrong = ids[(ids < 0) | (ids >= 2**32)][0]
        raise OptionError(f"token id {wrong} is not a u32; pass ids from 0 to 2**32 - 1")
    return np.ascontiguousarray(ids, dtype="<u4").tobytes()


def child_key(parent: bytes, tokens: bytes) -> bytes:
    """Return the key of the block of `tokens`, as `token_bytes` returns them, that follows `parent`."""
    return hashlib.sha256(parent + tokens).digest()


def common_prefix(a: bytes | NDArray[np.integer], b: bytes | NDArray[np.integer]) -> int:
    """Return how many tokens two token strings share at their start.

    Args:
        a, b: each as bytes from `token_bytes`, or as ids, shape (n,).
    """
    if isinstance(a, bytes) and a == b:
        return len(a) // TOKEN_BYTES
    left, right = _ids(a), _ids(b)
    n = min(len(left), len(right))
    if not n or left[0] != right[0]:
        return 0
    differ = left[:n] != right[:n]
    first = int(differ.argmax())
    return first if differ[first] else n


def _ids(tokens: bytes | NDArray[np.integer]) -> NDArray[np.integer]:
    return np.frombuffer(tokens, "<u4", len(tokens) // TOKEN_BYTES) if isinstance(tokens, bytes) else tokens
