"""Reconciliation of a cache directory's index with its files.

Adopts files that the index lacks, drops rows without files, and quarantines damaged files. `FileTier` calls it when
it opens a directory, when the directory watch reports changes, and for `gc`. One thread at a time may call a
`Reconciler`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from pathlib import Path

from erllama._runtime.log import logger
from erllama.cache.blocks import kvc
from erllama.cache.blocks.block import Block
from erllama.cache.blocks.encryption import ContentKey
from erllama.cache.tiers.changed_files import ChangedFiles
from erllama.cache.tiers.directory import is_gone
from erllama.cache.tiers.file_names import block_name, block_path, is_encrypted_name
from erllama.cache.tiers.key_state import check_kind, unknown_key
from erllama.cache.tiers.open_directory import OpenDirectory
from erllama.cache.tiers.row_codec import BLOCK
from erllama.cache.tiers.sqlite_index import FileStamp, Index
from erllama.errors import CacheFormatError, CacheKeyError

log = logger("erllama.cache")

# An invalid file that changed less than 2 seconds ago may be one that another program is still copying.
_SETTLED_SECONDS = 2.0
# The file is a link, a socket, a device without a driver, or a directory; or one of its sectors cannot be read.
_FILE_ERRORS = {errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EISDIR, errno.EIO, errno.EBADMSG}


class Reconciler:
    """Compares the files of one directory with its index and corrects the index.

    Args:
        open_directory: the directory.
        changed: names of files that others changed. Names to check again later are added to it.

    Attributes:
        n_quarantined: files moved to `damaged/` so far.
    """

    def __init__(self, open_directory: OpenDirectory, changed: ChangedFiles) -> None:
        self._open_directory = open_directory
        self._changed = changed
        self.n_quarantined = 0

    def reconcile(self, *, by_name: bool) -> None:
        """Compare all files with the index: by their names alone, or by their sizes and times, too."""
        with self._open_directory.using() as index:
            stamps = index.stamps()
        seen = set()
        for entry in list(self._open_directory.directory.block_files()):
            name = block_name(entry.name)
            seen.add(name)
            path = Path(entry.path)
            with contextlib.suppress(FileNotFoundError):
                if name is None or name not in stamps or not (by_name or FileStamp.of(path) == stamps[name]):
                    self._check_file(path, verify_payload=not by_name)
        missing = [name for name in stamps.keys() - seen if is_gone(block_path(self._open_directory.root, name))]
        if missing:
            log.warning(
                "%d blocks of the index in %s have no file; dropped", len(missing), self._open_directory.root
            )
            with self._open_directory.using() as index:
                index.remove_names(missing)

    def check_changed(self) -> bool:
        """Check the files that were reported as changed; return whether some are left to check later."""
        now = time.monotonic()
        if self._changed.take_all():
            try:
                self.reconcile(by_name=False)
            except BaseException:
                self._changed.mark_all()
                raise
        due = self._changed.take_due(now)
        while due:
            try:
                self._check_file(self._open_directory.directory.blocks / due[-1], verify_payload=True)
            except BaseException:
                self._changed.add_failed(due)
                raise
            due.pop()
        return len(self._changed) > 0

    def remove_leftovers(self) -> None:
        """Remove leftovers of ended processes: files, then the reservations that count them, then locks.

        The order matters: a reservation must count a file until it is removed, and a lock file identifies both.
        """
        directory = self._open_directory.directory
        with self._open_directory.using() as index:
            all_of = index.reservations().items()
            left = {name: owner for name, (owner, _) in all_of if not directory.is_alive(owner)}
            if left:
                with index.transaction():
                    for name in left:
                        # The process may have renamed the file into place and ended before it updated the index.
                        self._check_file(block_path(self._open_directory.root, name), verify_payload=True)
                    directory.remove_leftover_files()
                    index.release_all(set(left.values()))
        directory.remove_leftovers()

    def _check_file(self, path: Path, *, verify_payload: bool) -> None:
        """Make the index fit the file of one name; `verify_payload`: check the payload's checksum, too."""
        name = block_name(path.name)
        with self._open_directory.using() as index:
            try:
                stamp = FileStamp.of(path)
            except FileNotFoundError:
                if name is not None and index.stamp_of(name) is not None:
                    with index.transaction():
                        if is_gone(path):
                            index.remove_names([name])
                return
            if name is not None and index.stamp_of(name) == stamp:
                return
            try:
                block, content_key, path = self._read_file(index, path, name, verify_payload)
                path.chmod(0o600)
            except FileNotFoundError:
                return
            except (CacheFormatError, CacheKeyError, OSError) as error:
                self._reject(path, name, error)
                return
            right = block_name(path.name)
            with index.transaction():
                if name is not None and name != right:
                    index.remove_names([name])  # the block that had this name is gone
                if right is not None and os.path.lexists(path) and index.stamp_of(right) != stamp:
                    self._adopt(index, block, content_key, right, stamp)

    def _adopt(
        self, index: Index, block: Block, content_key: ContentKey | None, name: bytes, stamp: FileStamp
    ) -> None:
        """Add a file to the index. Called in a transaction.

        A process that ended while it encrypted a block again may have left two files of it. One stays: that of the
        newer key.
        """
        *_, newest = index.codec.names(block.key, BLOCK)
        for other in index.codec.names(block.key, BLOCK):
            if other != name and index.stamp_of(other) is not None:
                if other == newest:
                    block_path(self._open_directory.root, name).unlink(missing_ok=True)
                    return
                block_path(self._open_directory.root, other).unlink(missing_ok=True)
                index.remove_names([other])
        index.put(block, stamp, time.time_ns(), content_key)

    def _read_file(
        self, index: Index, path: Path, name: bytes | None, verify_payload: bool
    ) -> tuple[Block, ContentKey | None, Path]:
        """Return the block of a file, the key that it is encrypted with, and its path, which may be a new one.

        Raises:
            CacheFormatError, OSError: it is not a block of this directory.
            CacheKeyError: it needs another key.
        """
        content_key, key = None, None
        if index.encryption is not None:
            if name is None:
                raise CacheFormatError("its name is not an encrypted key")
            check_kind(path, is_encrypted=is_encrypted_name(name), encryption=index.encryption)
            known = index.encryption.find(name, BLOCK)
            if known is None:
                raise unknown_key(path, index.encryption)
            key, content_key = known
        read = kvc.read if verify_payload else kvc.read_header
        block = read(path, content_key)[0]
        if content_key is None:
            return block, None, self._rename_to_key(path, block.key)
        if block.key != key:
            raise CacheFormatError("the file contains another block than its name says")
        return block, content_key, path

    def _rename_to_key(self, path: Path, key: bytes) -> Path:
        """Rename the file of a block to the name of its key, unless it has that name; return its path."""
        right = block_path(self._open_directory.root, key)
        if path != right:
            if os.path.lexists(right):
                raise CacheFormatError("the file contains another block than its name says")
            path.rename(right)
        return right

    def _reject(self, path: Path, name: bytes | None, error: Exception) -> None:
        """Quarantine a file that cannot be read; check it again later where it may be readable then.

        A file that needs another key stays where it is.
        """
        if not is_fault_of_file(error):
            first = self._changed.add_retry(path.name)
            log.log(logging.WARNING if first else logging.DEBUG, "%s: %s; retried later", path, error)
            return
        with contextlib.suppress(OSError):
            age = time.time() - path.lstat().st_mtime
            if 0 <= age < _SETTLED_SECONDS and path.is_file() and not path.is_symlink():
                self._changed.add(path.name, _SETTLED_SECONDS - age)
                return
        log.warning("%s: %s; moved to damaged/", path, error)
        self.n_quarantined += 1
        with contextlib.suppress(OSError):
            self._open_directory.directory.quarantine(path)
        if name is not None:
            with self._open_directory.using() as index:
                index.remove_names([name])


def is_fault_of_file(error: Exception) -> bool:
    """Return whether the file itself causes an error, so that a retry cannot help."""
    if isinstance(error, CacheFormatError):
        return True
    return isinstance(error, OSError) and error.errno in _FILE_ERRORS
