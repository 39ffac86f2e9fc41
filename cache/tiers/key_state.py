"""Which keys an index and its directory are encrypted with, and the checks that no other key is used.

The table `encryption` has one row per key in use; one of them is current. There are several while keys are rotated.
Every process compares the table with the keys that it uses before it reads or writes rows. So a process with an old
key never takes a row that it cannot read for damaged. `Index` calls these functions.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from erllama.cache.blocks.encryption import Encryption
from erllama.cache.tiers.file_names import INDEX_NAME, block_name, is_encrypted_name
from erllama.cache.tiers.index_schema import ENCRYPTED_VERSION, SCHEMA_VERSION
from erllama.cache.tiers.row_codec import BLOCK
from erllama.errors import CacheKeyError

_ANOTHER = "use another directory, or remove the content of this one with `erllama cache wipe`"


class KeyState(NamedTuple):
    """The ids of the current key and of the others in use."""

    current: bytes
    others: frozenset[bytes]

    @property
    def key_ids(self) -> list[str]:
        """The ids as 16 hexadecimal digits each, that of the current key first."""
        return [self.current.hex(), *sorted(key_id.hex() for key_id in self.others)]


def read_state(connection: sqlite3.Connection) -> KeyState:
    """Return the state in the database of an encrypted index.

    Raises:
        sqlite3.DatabaseError: there is no state.
    """
    rows = connection.execute("SELECT key_id, current FROM encryption").fetchall()
    current = [key_id for key_id, is_current in rows if is_current]
    if len(current) != 1:
        raise sqlite3.DatabaseError(f"{len(current)} rows of current keys; there must be one")
    return KeyState(current[0], frozenset(key_id for key_id, _ in rows) - {current[0]})


def write_state(connection: sqlite3.Connection, state: KeyState) -> None:
    """Replace the state, within a transaction of the caller."""
    connection.execute("DELETE FROM encryption")
    connection.execute("INSERT INTO encryption VALUES (?, 1)", [state.current])
    connection.executemany("INSERT INTO encryption VALUES (?, 0)", [(each,) for each in sorted(state.others)])


def check_kind(root: Path, *, is_encrypted: bool, encryption: Encryption | None) -> None:
    """Check that a directory is encrypted if, and only if, there is a key.

    Raises:
        CacheKeyError: otherwise.
    """
    if is_encrypted and encryption is None:
        raise CacheKeyError(f"{root} is encrypted; pass its key_file, or {_ANOTHER}")
    if not is_encrypted and encryption is not None:
        raise CacheKeyError(
            f"{root} is not encrypted, and {encryption.source} is for encrypted directories; {_ANOTHER}. "
            "`erllama cache export` and `import` copy the blocks into an encrypted one"
        )


def is_encrypted(root: Path) -> bool:
    """Return whether a cache directory is encrypted. Does not change it."""
    try:
        uri = f"file:{quote(str(root / INDEX_NAME))}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    except sqlite3.Error:
        version = 0
    if version:
        return version == ENCRYPTED_VERSION
    names = (block_name(path.name) for path in (root / "blocks").iterdir())
    return any(name is not None and is_encrypted_name(name) for name in names)


def remove_empty_index(root: Path) -> None:
    """Remove an index without content that is not encrypted, so that an encrypted one takes its place.

    The caller has locked the directory, and no other process has.
    """
    path = root / INDEX_NAME
    if any((root / "blocks").iterdir()):
        return
    try:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            if int(connection.execute("PRAGMA user_version").fetchone()[0]) != SCHEMA_VERSION:
                return
            tables = ("blocks", "texts", "pins")
            if any(connection.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() for table in tables):
                return
    except sqlite3.Error:
        return
    for suffix in ("-wal", "-shm", ""):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def state_of_files(root: Path, encryption: Encryption | None) -> KeyState | None:
    """Return the keys of the files of a directory whose index is lost or new; None for one without encryption.

    Raises:
        CacheKeyError: the files need another key, or a key where there is none, or no key.
    """
    found: set[bytes] = set()
    blocks = root / "blocks"
    for path in blocks.iterdir() if blocks.is_dir() else ():
        name = block_name(path.name)
        if name is None:
            continue
        check_kind(root, is_encrypted=is_encrypted_name(name), encryption=encryption)
        if encryption is not None:
            known = encryption.find(name, BLOCK)
            if known is None:
                raise unknown_key(path, encryption)
            found.add(known[1].key_id)
    if encryption is None:
        return None
    in_use = [key.key_id for key in encryption.keys if key.key_id in found] or [encryption.current.key_id]
    return KeyState(in_use[0], frozenset(in_use[1:]))


def unknown_key(path: Path, encryption: Encryption) -> CacheKeyError:
    """Return the error for a file that none of the keys has encrypted."""
    return CacheKeyError(f"{path} is encrypted with a key that {encryption.source} does not have; add that key")


def restrict(encryption: Encryption, state: KeyState, root: Path) -> Encryption:
    """Return the encryption with the keys in use alone.

    Raises:
        CacheKeyError: one of them is missing.
    """
    missing = ({state.current} | state.others) - encryption.key_ids
    if missing:
        wanted = ", ".join(sorted(key_id.hex() for key_id in missing))
        has = ", ".join(sorted(key_id.hex() for key_id in encryption.key_ids))
        raise CacheKeyError(
            f"{root} is encrypted with key {wanted}, and {encryption.source} has {has}; add that key to the file, "
            f"or {_ANOTHER}"
        )
    return encryption.restricted(
        state.current, [key.key_id for key in encryption.keys if key.key_id in state.others]
    )
