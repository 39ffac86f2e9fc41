"""Encrypts what a cache stores: block files, rows of an index and stored texts.

`Encryption` holds the keys of a key file. AES-256-GCM encrypts content, under keys that HKDF-SHA256 derives for one
file or for one process with a random salt, so that no nonce repeats under a key. AES-256-SIV encrypts names:
equal names have equal ciphertexts, which an index and a directory can look up, and which the key decrypts again.
docs/encryption.md describes what is hidden and what is not. `kvc` and the tiers use this module. Thread-safe.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

from erllama.cache.blocks.key_file import SecretKeys, read_key_file
from erllama.checks import import_optional
from erllama.errors import CacheFormatError, CacheKeyError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import AEADDecryptionContext, AEADEncryptionContext
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

TAG_BYTES = 16
ID_BYTES = 8  # of a key
SALT_BYTES = 32  # of a file
NAME_OVERHEAD = 16  # bytes that a name has beyond what it names
_ROW_SALT_BYTES, _NONCE_BYTES = 16, 12
SEAL_OVERHEAD = ID_BYTES + _ROW_SALT_BYTES + _NONCE_BYTES + TAG_BYTES
# Messages under one derived key. Their nonces are random, of 96 bits: two of them are equal with probability 2^-57.
_MESSAGES_PER_SALT = 1 << 20
_DERIVED_KEPT = 1024  # derived keys in memory, one for each process that wrote rows


class ContentKey:
    """One key of a key file, as it encrypts content.

    Attributes:
        key_id: 8 bytes that identify the key without revealing it.
    """

    def __init__(self, key_id: bytes, content: bytes, rows: bytes, names: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESSIV

        self.key_id = key_id
        self._content, self._rows, self._names = content, rows, AESSIV(names)
        self._lock = threading.Lock()
        self._derived: dict[bytes, AESGCM] = {}  # by salt
        self._salt, self._n_sealed = b"", _MESSAGES_PER_SALT

    def name(self, value: bytes, kind: bytes) -> bytes:
        """Return the name that stands for a value: always the same, of `NAME_OVERHEAD` bytes more."""
        return self._names.encrypt(value, [kind])

    def value_of(self, name: bytes, kind: bytes) -> bytes | None:
        """Return the value that a name stands for; None if this key did not make the name."""
        from cryptography.exceptions import InvalidTag

        try:
            return self._names.decrypt(name, [kind])
        except (InvalidTag, ValueError):  # ValueError: it is shorter than a name
            return None

    def seal(self, content: bytes, context: bytes) -> bytes:
        """Return content encrypted. `open` needs the same context."""
        with self._lock:
            if self._n_sealed >= _MESSAGES_PER_SALT:
                self._salt, self._n_sealed = os.urandom(_ROW_SALT_BYTES), 0
            self._n_sealed += 1
            salt = self._salt
        # Random, because a forked process inherits the salt.
        nonce = os.urandom(_NONCE_BYTES)
        return self.key_id + salt + nonce + self._row_cipher(salt).encrypt(nonce, content, context)

    def open(self, sealed: bytes, context: bytes) -> bytes:
        """Return the content that `seal` was called with.

        Raises:
            CacheFormatError: the bytes or the context are not those of `seal`.
        """
        from cryptography.exceptions import InvalidTag

        end = ID_BYTES + _ROW_SALT_BYTES
        salt, nonce = sealed[ID_BYTES:end], sealed[end : end + _NONCE_BYTES]
        try:
            return self._row_cipher(salt).decrypt(nonce, sealed[end + _NONCE_BYTES :], context)
        except InvalidTag:
            raise CacheFormatError("the encrypted content was changed") from None

    def _row_cipher(self, salt: bytes) -> AESGCM:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        with self._lock:
            found = self._derived.get(salt)
            if found is None:
                if len(self._derived) >= _DERIVED_KEPT:
                    self._derived.clear()
                found = self._derived[salt] = AESGCM(_derive(self._rows, salt, b"erllama rows"))
            return found

    def file_key(self, salt: bytes) -> bytes:
        """Return the key of the file with a salt of `SALT_BYTES`."""
        return _derive(self._content, salt, b"erllama kvc 2")


class Encryption:
    """The keys with which the content of a cache is encrypted. New content is encrypted with `current`.

    Args:
        keys: those that content may be encrypted with, `current` first.
        source: names the key file in errors.
    """

    def __init__(self, keys: Iterable[ContentKey], source: str) -> None:
        self.keys = tuple(keys)
        self.source = source
        self.current = self.keys[0]
        self._by_id = {key.key_id: key for key in self.keys}

    @classmethod
    def of_keys(cls, keys: SecretKeys, source: str = "the key file") -> Encryption:
        """Return the encryption with these keys; the newest is the current one.

        Raises:
            MissingPackage: the package `cryptography` is not installed.
        """
        import_optional(
            "cryptography", needed_by="key_file", package="cryptography", install="'erllama[encryption]'"
        )
        ids = [bytes.fromhex(each) for each in keys.ids]
        # AES-256-SIV has a key of 64 bytes, for two purposes.
        names = [a + b for a, b in zip(keys.derive("block-names mac"), keys.derive("block-names"), strict=True)]
        parts = zip(ids, keys.derive("block-encryption"), keys.derive("row-encryption"), names, strict=True)
        return cls([ContentKey(*part) for part in parts], source)

    @classmethod
    def of_file(cls, path: str | os.PathLike[str]) -> Encryption:
        """Return the encryption with the keys of a file.

        Raises:
            CacheKeyError: the file cannot be used.
            MissingPackage: the package `cryptography` is not installed.
        """
        return cls.of_keys(read_key_file(path), f"key file {os.fspath(path)}")

    @property
    def key_ids(self) -> frozenset[bytes]:
        """The ids of the keys."""
        return frozenset(self._by_id)

    def key(self, key_id: bytes) -> ContentKey:
        """Return a key by its id.

        Raises:
            CacheKeyError: there is no such key.
        """
        found = self._by_id.get(key_id)
        if found is None:
            raise CacheKeyError(
                f"content is encrypted with key {key_id.hex()}, and {self.source} has "
                f"{', '.join(key.key_id.hex() for key in self.keys)}; add that key to the file"
            )
        return found

    def restricted(self, current: bytes, others: Iterable[bytes]) -> Encryption:
        """Return an encryption that has these keys alone.

        Raises:
            CacheKeyError: one of them is missing.
        """
        return Encryption([self.key(current), *(self.key(each) for each in others if each != current)], self.source)

    def name(self, value: bytes, kind: bytes) -> bytes:
        """Return the name that stands for a value under the current key."""
        return self.current.name(value, kind)

    def names(self, value: bytes, kind: bytes) -> list[bytes]:
        """Return the names that stand for a value under all keys, that of the current key first."""
        return [key.name(value, kind) for key in self.keys]

    def value_of(self, name: bytes, kind: bytes) -> bytes | None:
        """Return the value that a name stands for; None if no key made the name."""
        found = self.find(name, kind)
        return None if found is None else found[0]

    def find(self, name: bytes, kind: bytes) -> tuple[bytes, ContentKey] | None:
        """Return the value that a name stands for, and the key that made the name; None if no key did."""
        for key in self.keys:
            if (value := key.value_of(name, kind)) is not None:
                return value, key
        return None

    def seal(self, content: bytes, context: bytes) -> bytes:
        """Return content encrypted with the current key. `open` needs the same context."""
        return self.current.seal(content, context)

    def open(self, sealed: object, context: bytes) -> bytes:
        """Return the content that `seal` was called with.

        Raises:
            CacheFormatError: the bytes or the context are not those of `seal`.
            CacheKeyError: the key is missing.
        """
        if not isinstance(sealed, bytes) or len(sealed) < SEAL_OVERHEAD:
            raise CacheFormatError("the encrypted content was changed")
        return self.key(sealed[:ID_BYTES]).open(sealed, context)


def encryptor(key: bytes, number: int) -> AEADEncryptionContext:
    """Return AES-256-GCM for message `number` under a key that has no other message of this number."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    return Cipher(algorithms.AES(key), modes.GCM(number.to_bytes(_NONCE_BYTES, "little"))).encryptor()


def decryptor(key: bytes, number: int) -> AEADDecryptionContext:
    """Return the counterpart of `encryptor`."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    return Cipher(algorithms.AES(key), modes.GCM(number.to_bytes(_NONCE_BYTES, "little"))).decryptor()


def finish(decryptor: AEADDecryptionContext, tag: bytes) -> None:
    """Verify what a decryptor decrypted.

    Raises:
        CacheFormatError: the tag does not fit.
    """
    from cryptography.exceptions import InvalidTag

    try:
        decryptor.finalize_with_tag(tag)
    except InvalidTag:
        raise CacheFormatError("the encrypted content was changed") from None


def _derive(key: bytes, salt: bytes, purpose: bytes) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), 32, salt, purpose).derive(key)
