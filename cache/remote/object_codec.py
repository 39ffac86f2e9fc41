"""How blocks and segments become objects of a remote tier: their names, their encryption and their signatures.

Without encryption, an object is named after the key of its block. With it, AES-SIV makes the name of key and
version, so that the listing of a bucket shows no hash of a prompt; the id of the encrypting key is before it. The
signature covers what is encrypted. Thread-safe.
"""

from __future__ import annotations

from erllama.cache.blocks import kvc
from erllama.cache.blocks.block import Block
from erllama.cache.blocks.encryption import Encryption
from erllama.cache.blocks.key_file import SecretKeys
from erllama.cache.remote.signatures import SIGNATURE_BYTES, Signer
from erllama.cache.remote.stores import Content

BLOCK, SEGMENT = "block", "manifest"  # kinds of objects; the signature covers them
NO_KEY = b""  # the id of the key of what is not encrypted
_NAME_KIND, _SEGMENT_CONTEXT = b"remote block", b"remote manifest"


class ObjectCodec:
    """Names, encrypts and signs the objects of one tier.

    Args:
        keys: sign and verify all objects.
        encryption: encrypts them; None for no encryption.

    Attributes:
        key_id: of the key that encrypts new objects, 8 bytes; empty without encryption.
    """

    def __init__(self, keys: SecretKeys, encryption: Encryption | None = None) -> None:
        self._signer, self._encryption = Signer(keys), encryption
        self.key_id = NO_KEY if encryption is None else encryption.current.key_id

    def has_key(self, key_id: bytes) -> bool:
        """Return whether this machine reads what is encrypted with a key, or with none if it is empty.

        A machine with encryption reads only what is encrypted.
        """
        return key_id in self._encryption.key_ids if self._encryption is not None else key_id == NO_KEY

    @property
    def keys_text(self) -> str:
        """The keys that encrypt and decrypt, for messages."""
        if self._encryption is None:
            return "there is no key file that decrypts"
        return f"{self._encryption.source} has {', '.join(key.key_id.hex() for key in self._encryption.keys)}"

    # --- blocks --------------------------------------------------------------------------------------

    def name(self, block: Block, version: bytes, key_id: bytes) -> str:
        """Return the name of the object of a block; "" if this machine lacks the key."""
        if not self.has_key(key_id):
            return ""
        if self._encryption is None:
            return f"blocks/{block.namespace.hex()[:16]}/{block.key.hex()}-{version.hex()}"
        name = self._encryption.key(key_id).name(block.key + version, _NAME_KIND)
        return f"encrypted/{key_id.hex()}/{name.hex()}"

    @property
    def prefixes(self) -> list[str]:
        """The prefixes of the names of all blocks that this machine can read."""
        if self._encryption is None:
            return ["blocks"]
        return [f"encrypted/{key.key_id.hex()}" for key in self._encryption.keys]

    def block_bytes(self, n_tokens: int, payload_bytes: int) -> int:
        """Return the bytes of the object of a block."""
        encrypted = self._encryption is not None
        return SIGNATURE_BYTES + kvc.file_bytes(n_tokens, payload_bytes, encrypted=encrypted)

    def encode_block(self, block: Block, payload: memoryview, key_id: bytes) -> list[Content]:
        """Return the content of the object of a block, as its parts."""
        if self._encryption is None:
            parts: list[Content] = list(kvc.encode(block, payload))
        else:
            # Copies, because a piece is valid until the next one.
            parts = [bytes(piece) for piece in kvc.encode(block, payload, self._encryption.key(key_id))]
        return [self._signer.sign(BLOCK, parts), *parts]

    def decode_block(self, content: memoryview, key_id: bytes) -> tuple[Block, memoryview]:
        """Return the block of an object, and its payload.

        Raises:
            SignatureRefused: the object has no signature of one of the keys.
            CacheFormatError: it is not a valid block, or is encrypted with another key than `key_id`.
        """
        key = None if self._encryption is None else self._encryption.key(key_id)
        block, payload = kvc.decode(self._signer.open(BLOCK, content), key)
        return block, payload.data

    # --- segments of manifests -------------------------------------------------------------------------

    def encode_segment(self, content: bytes) -> list[bytes]:
        """Return the content of the object of a segment, as its parts. The key `key_id` encrypts it."""
        if self._encryption is not None:
            content = self._encryption.seal(content, _SEGMENT_CONTEXT)
        return [self._signer.sign(SEGMENT, [content]), content]

    def decode_segment(self, content: memoryview) -> memoryview:
        """Return what `encode_segment` was called with.

        Raises:
            SignatureRefused: the object has no signature of one of the keys.
            CacheFormatError: it is not encrypted, or was changed.
            CacheKeyError: it is encrypted with a key that this machine lacks.
        """
        opened = self._signer.open(SEGMENT, content)
        if self._encryption is None:
            return opened
        return memoryview(self._encryption.open(bytes(opened), _SEGMENT_CONTEXT))
