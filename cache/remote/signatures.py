"""Signatures of what a remote tier stores: HMAC-SHA256 with a key that only the machines of the fleet have.

An object begins with a header: magic, the name of the key, and the signature of the kind of the object and of its
content. So a manifest cannot pass as a block. Whoever can write to the bucket but lacks the key cannot make a
machine restore KV: forged KV would make a model say what the forger wants.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence

from erllama.cache.blocks.key_file import SecretKeys
from erllama.cache.remote.stores import Content
from erllama.errors import SignatureRefused

_MAGIC = b"\x89ERS\r\n\x1a\n"  # as that of .kvc files: not text, and changed by a copy in text mode
_HEADER = struct.Struct("<8s8s32s")  # magic, name of the key, signature
SIGNATURE_BYTES = _HEADER.size
_PURPOSE = "remote-signature"


class Signer:
    """Signs objects with the newest key of a file, and accepts the signatures of all its keys."""

    def __init__(self, keys: SecretKeys) -> None:
        names = [bytes.fromhex(name) for name in keys.ids]
        self._keys = dict(zip(names, keys.derive(_PURPOSE), strict=True))
        self._newest = names[0]

    def sign(self, kind: str, parts: Sequence[Content]) -> bytes:
        """Return the header of an object.

        Args:
            kind: what the object is, such as "block".
            parts: its content.
        """
        signature = self._signature(self._newest, kind, parts)
        return _HEADER.pack(_MAGIC, self._newest, signature)

    def open(self, kind: str, content: memoryview) -> memoryview:
        """Verify an object, and return what follows its header.

        Raises:
            SignatureRefused: it has no signature of one of the keys.
        """
        if content.nbytes < SIGNATURE_BYTES:
            raise SignatureRefused(f"{content.nbytes} bytes are too few for a signature")
        magic, name, signature = _HEADER.unpack_from(content)
        if magic != _MAGIC:
            raise SignatureRefused("it is not signed")
        if name not in self._keys:
            raise SignatureRefused("it is signed with a key that the key file does not have", unknown_key=True)
        rest = content[SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._signature(name, kind, [rest])):
            raise SignatureRefused("its signature does not match")
        return rest

    def _signature(self, name: bytes, kind: str, parts: Sequence[Content]) -> bytes:
        digest = hmac.new(self._keys[name], kind.encode() + b"\0", hashlib.sha256)
        for part in parts:
            digest.update(part)
        return digest.digest()
