"""Signatures of thinking: a client returns a thought with the signature that it was sent with.

The engine signs all thinking of a reply up to the end of each thought. So a later thought is verified together with
the earlier ones of its message.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac


class ThoughtSigner:
    """Signs and verifies the thoughts of a server.

    Args:
        key: the key that the engine signs with.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def sign(self, thinking: str) -> bytes:
        """Return the engine's signature of a reply's thinking; for a thought that the engine did not end."""
        return hmac.digest(self._key, thinking.encode("utf-8", "surrogatepass"), hashlib.sha256)

    def is_valid(self, thinking: str, signature: bytes) -> bool:
        """Return whether this server signed some thinking."""
        return hmac.compare_digest(self.sign(thinking), signature)


def encode_signature(signature: bytes, hidden: str = "") -> str:
    """Return a signature as a block has it.

    Args:
        hidden: the thought, for a block that does not show it. The client returns it within the signature.
    """
    text = base64.b64encode(signature).decode()
    if hidden:
        text += "." + base64.b64encode(hidden.encode("utf-8", "surrogatepass")).decode()
    return text


def decode_signature(text: str) -> tuple[bytes, str]:
    """Return a signature and the thought within it, which is "" for a block that shows its thought.

    A text that is not a signature of this server returns an empty one, which is never valid.
    """
    signature, _, hidden = text.partition(".")
    try:
        thought = base64.b64decode(hidden, validate=True).decode("utf-8", "surrogatepass")
        return base64.b64decode(signature, validate=True), thought
    except (binascii.Error, ValueError):
        return b"", ""
