"""Rotates the keys of an encrypted cache directory, while other processes use it.

`rotate_keys` first encrypts pins and texts with the newest key of the key file, in one transaction that makes this
key the current one. It then encrypts one block after the other, as any process writes a newer version of a block.
At last it ends the use of the old keys. The next run completes a run that was killed. Other processes notice each
change of the keys in use, open the directory again, and read the key file again. The command `erllama cache rekey`
calls it.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from erllama._runtime.log import logger
from erllama.cache.admin.maintenance import NO_BUDGET, BlockTotals
from erllama.cache.blocks.encryption import Encryption
from erllama.cache.tiers.directory import is_cache, is_gone
from erllama.cache.tiers.file_names import INDEX_NAME, block_name, block_path
from erllama.cache.tiers.file_tier import FileTier
from erllama.cache.tiers.key_state import KeyState
from erllama.cache.tiers.read_only import is_read_only
from erllama.cache.tiers.reconciler import is_fault_of_file
from erllama.cache.tiers.row_codec import BLOCK
from erllama.cache.tiers.tier import TierRow
from erllama.errors import CacheError, CacheFormatError, CacheVersionError

log = logger("erllama.cache")

_WAIT_SECONDS = 60.0  # for blocks that other processes are writing: far longer than a write takes
_RETRY_SECONDS = 0.1

OnProgress = Callable[[float], object]


class RotationResult(NamedTuple):
    """Result of a rotation.

    Attributes:
        key_id: the current key, as 16 hexadecimal digits.
        old_key_ids: the keys whose use ended.
        encrypted: blocks that were encrypted again.
        n_damaged: blocks that were damaged or could not be read, and were removed.
    """

    key_id: str
    old_key_ids: tuple[str, ...]
    encrypted: BlockTotals
    n_damaged: int


def rotate_keys(
    root: Path, key_file: Path, *, in_memory: bool = False, on_done: OnProgress = lambda done: None
) -> RotationResult:
    """Encrypt the content of a directory with the newest key of a file, and end the use of the old keys.

    Args:
        key_file: has the new key first, and below it the keys in use.
        in_memory: whether the directory is on a tmpfs, where files need not be made durable.
        on_done: called with the fraction of the blocks that are encrypted with the newest key.

    Raises:
        CacheKeyError: the directory is not encrypted, or the key file lacks a key in use.
        CacheError, OSError, sqlite3.Error: the directory cannot be changed. What was encrypted stays, and the next
            call continues.
    """
    if not is_cache(root):
        raise CacheError(f"{root} holds no cache; use the directory of one")
    if is_read_only(root):
        raise CacheError(f"{root} is read-only and cannot be changed; use a process that may write to it")
    tier = _RotatingTier(root, NO_BUDGET, name="ram_file" if in_memory else "disk", watch=False, key_file=key_file)
    try:
        tier.open()
        return tier.rotate(Encryption.of_file(key_file), on_done)
    finally:
        tier.close()


class _RotatingTier(FileTier):
    """A directory whose keys are being rotated."""

    def rotate(self, encryption: Encryption, on_done: OnProgress) -> RotationResult:
        """Rotate the keys as `rotate_keys` describes."""
        self._make_current(encryption.current.key_id)
        totals, n_damaged = self._encrypt_blocks(on_done)
        old = self._end_old_keys()
        self._remove_remains()
        return RotationResult(
            encryption.current.key_id.hex(), tuple(sorted(key_id.hex() for key_id in old)), totals, n_damaged
        )

    def _make_current(self, newest: bytes) -> None:
        """Make a key the current one, and encrypt pins and texts with it."""
        with self._using() as index, index.transaction():
            keys = index.keys
            if keys is None or keys.current == newest:
                return
            pins, old = index.all_pins(), index.codec
            index.set_keys(KeyState(newest, (keys.others | {keys.current}) - {newest}))
            index.pins.replace_all(pins)
            index.texts.encrypt_again(old)
            self._encryption = index.encryption

    def _encrypt_blocks(self, on_done: OnProgress) -> tuple[BlockTotals, int]:
        """Encrypt the blocks with the current key. Returns those that it encrypted, and how many were damaged."""
        n_blocks = n_bytes = n_damaged = 0
        deadline = time.monotonic() + _WAIT_SECONDS
        newer: dict[bytes, str] = {}  # blocks that this release cannot read, and why
        while left := [row for row in self._rows_under_old_keys() if row.block.key not in newer]:
            in_flight = 0
            for n_done, row in enumerate(left, 1):
                try:
                    written = self._encrypt(row)
                except FileNotFoundError:
                    self._drop_row(row)
                    continue
                except CacheVersionError as error:
                    newer[row.block.key] = f"{self.location_of(row.block)}: {error}"
                    continue
                except CacheFormatError as error:
                    log.warning("%s: %s; removed", self.location_of(row.block), error)
                    self.quarantine(row.block)
                    n_damaged += 1
                    continue
                n_blocks, n_bytes = n_blocks + written, n_bytes + written * row.n_bytes
                in_flight += not written
                on_done(n_done / len(left))
            if in_flight:
                if time.monotonic() > deadline:
                    raise CacheError(f"other processes are writing {in_flight} blocks of {self.root}; run it again")
                time.sleep(_RETRY_SECONDS)
        if newer:
            example = next(iter(newer.values()))
            raise CacheError(f"{len(newer)} blocks are of a newer release ({example}); run rekey of that release")
        return BlockTotals(n_blocks, n_bytes), n_damaged

    def _rows_under_old_keys(self) -> list[TierRow]:
        """Return the blocks that have a row under an old key."""
        with self._using() as index:
            names, encryption = index.stamps(), index.encryption
            assert encryption is not None  # `rotate` has made a key the current one
            newest = {encryption.name(row.block.key, BLOCK): row for row in index.peek_rows()}
            found = [encryption.value_of(name, BLOCK) for name in names.keys() - newest.keys()]
            rows = {row.block.key: row for row in newest.values()}
            return [rows[key] for key in found if key is not None and key in rows]

    def _encrypt(self, row: TierRow) -> bool:
        """Encrypt a block with the current key. Returns False if another process is writing it."""
        with self.exclusive():
            if not self.reserve(row.block, row.n_bytes):
                return False
        try:
            found, payload = self.read(row.block)
        except BaseException as error:
            with contextlib.suppress(CacheError, OSError, sqlite3.Error):
                self.release_stale_reservations()
            if isinstance(error, OSError) and is_fault_of_file(error):
                raise CacheFormatError(f"the file cannot be read: {error}") from error
            raise
        self.write_used(found, payload, row.last_used)
        return True

    def _drop_row(self, row: TierRow) -> None:
        """Remove the row of a block whose file is missing, unless the block was evicted meanwhile."""
        with self._using() as index, index.transaction():
            name = index.listed_name(row.block.key)
            if name is not None and is_gone(block_path(self.root, name)):
                index.remove_names([name])

    def _end_old_keys(self) -> frozenset[bytes]:
        """End the use of all keys but the current one; return them. No row and no file is encrypted with them."""
        with self._using() as index, index.transaction():
            keys, encryption = index.keys, index.encryption
            if keys is None or encryption is None or not keys.others:
                return frozenset()
            for name in index.stamps():
                known = encryption.find(name, BLOCK)
                if known is None or known[1].key_id != keys.current:
                    raise CacheError(f"a block of {self.root} is encrypted with an old key; run it again")
            for entry in list(self._open_directory.directory.block_files()):
                name_of_file = block_name(entry.name)
                known = None if name_of_file is None else encryption.find(name_of_file, BLOCK)
                if known is not None and known[1].key_id != keys.current:
                    Path(entry.path).unlink(missing_ok=True)  # an ended process left it
            index.set_keys(KeyState(keys.current, frozenset()))
            index.forget_changes()
            self._encryption = index.encryption
            return keys.others

    def _remove_remains(self) -> None:
        """Remove what may be encrypted with old keys: damaged files, and what the database no longer uses."""
        for path in [*(self.root / "damaged").iterdir(), *self.root.glob(f"{INDEX_NAME}.damaged-*")]:
            path.unlink(missing_ok=True)
        with self._using() as index:
            index.shrink()
