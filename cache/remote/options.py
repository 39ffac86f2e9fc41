"""The options of a remote tier: checks them, and creates the tier.

`Cache` calls `remote_options` when it is created, and the process of a model passes the result to its own cache.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erllama.cache.blocks.encryption import Encryption
from erllama.cache.blocks.key_file import SecretKeys, read_key_file
from erllama.cache.remote.directory_store import DirectoryStore
from erllama.cache.remote.stores import ObjectStore, parse_address
from erllama.cache.remote.tier import REQUEST_SECONDS, RemoteTier
from erllama.cache.sizes import parse_bytes
from erllama.checks import encodable, seconds, shown
from erllama.errors import OptionError

DEFAULT_QUOTA = "1TiB"


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """The checked options of a remote tier, which another process can open it with.

    Attributes:
        address: as of `parse_address`.
        key_file: path of the file of keys that sign.
        quota: budget of the tier in bytes.
        lifetime: seconds after which an unused block is removed; None for never.
        read_only: whether the tier is only read.
        encryption_key_file: path of the file of keys that encrypt; None for no encryption.
    """

    address: str
    key_file: str
    quota: int
    lifetime: float | None = None
    read_only: bool = False
    encryption_key_file: str | None = None

    def as_plain(self) -> tuple[Any, ...]:
        """Return the fields in order, as numbers, texts, booleans and None."""
        return (self.address, self.key_file, self.quota, self.lifetime, self.read_only, self.encryption_key_file)


def remote_options(
    remote: object,
    key_file: object,
    quota: object,
    lifetime: object,
    read_only: bool,
    encryption_key_file: Path | None = None,
) -> RemoteOptions | None:
    """Check the options of a remote tier; None if there is none.

    Args:
        key_file: signs; None for `encryption_key_file`.
        encryption_key_file: encrypts; None for no encryption.

    Raises:
        OptionError: an option has the wrong type or value, a part of the tier's options is missing, or an option is
            set without the tier.
    """
    if remote is None or remote is False:
        if key_file is not None or lifetime is not None:
            name = "remote_key_file" if key_file is not None else "remote_lifetime"
            raise OptionError(f"{name} without remote; pass remote='s3://bucket/prefix', too, or leave it out")
        return None
    address = parse_address(remote)
    if key_file is None:
        key_file = encryption_key_file
    if key_file is None:
        raise OptionError(
            f"remote={address.text!r} without a key: whoever can write there could make models restore forged KV. "
            "Create a key with `erllama cache new-key FILE`, copy the file to each machine, and pass "
            "remote_key_file=FILE"
        )
    if not isinstance(key_file, str | os.PathLike) or not str(key_file):
        raise OptionError(f"remote_key_file={shown(key_file)}; pass the path of a file of keys")
    budget = parse_bytes("remote_quota", quota)
    if budget == 0:
        raise OptionError(f"remote_quota=0 leaves no room in {address.text}; pass a size, or omit 'remote'")
    kept = None if lifetime is None else seconds("remote_lifetime", lifetime)
    if kept is not None and kept < 60:
        raise OptionError(f"remote_lifetime={shown(lifetime)}; it must be at least a minute")
    path = str(Path(os.fspath(key_file)).expanduser().absolute())
    return RemoteOptions(
        encodable("remote", address.text),
        encodable("remote_key_file", path),
        budget,
        kept,
        read_only,
        None if encryption_key_file is None else encodable("key_file", str(encryption_key_file)),
    )


def create_remote_tier(options: RemoteOptions) -> RemoteTier:
    """Return the tier. It is not opened yet.

    Raises:
        CacheError: the key file cannot be used.
        MissingPackage: obstore is not installed, and the address is that of a bucket; or there is encryption, and
            the package `cryptography` is not installed.
        OptionError: obstore refuses the address, or a setting in the environment.
    """
    keys: SecretKeys = read_key_file(options.key_file)
    encrypting = options.encryption_key_file
    return RemoteTier(
        open_store(options.address),
        options.address,
        keys,
        options.quota,
        encryption=None if encrypting is None else Encryption.of_file(encrypting),
        lifetime=options.lifetime,
        read_only=options.read_only,
    )


def open_store(text: str) -> ObjectStore:
    """Return the store of an address. Does not reach it yet. Raises as `create_remote_tier` does."""
    address = parse_address(text)
    if address.path is not None:
        return DirectoryStore(address.path)
    from erllama.cache.remote.bucket_store import open_bucket  # imports an optional package

    return open_bucket(address, REQUEST_SECONDS)
