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
from erllama.cache.tiers.changed_files import ChangedFiles
from erllama.cache.tiers.directory import block_key, block_path, is_gone
from erllama.cache.tiers.open_directory import OpenDirectory
from erllama.cache.tiers.sqlite_index import FileStamp
from erllama.errors import CacheFormatError

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
            key = block_key(entry.name)
            seen.add(key)
            path = Path(entry.path)
            with contextlib.suppress(FileNotFoundError):
                if key is None or key not in stamps or not (by_name or FileStamp.of(path) == stamps[key]):
                    self._check_file(path, verify_payload=not by_name)
        missing = [key for key in stamps.keys() - seen if is_gone(block_path(self._open_directory.root, key))]
        if missing:
            log.warning(
                "%d blocks of the index in %s have no file; dropped", len(missing), self._open_directory.root
            )
            with self._open_directory.using() as index:
                index.remove(missing)

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
            left = {key: owner for key, (owner, _) in index.reservations().items() if not directory.is_alive(owner)}
            if left:
                with index.transaction():
                    for key in left:
                        # The process may have renamed the file into place and ended before it updated the index.
                        self._check_file(block_path(self._open_directory.root, key), verify_payload=True)
                    directory.remove_leftover_files()
                    index.release_all(set(left.values()))
        directory.remove_leftovers()

    def _check_file(self, path: Path, *, verify_payload: bool) -> None:
        """Make the index fit the file of one name; `verify_payload`: check the payload's checksum, too."""
        key = block_key(path.name)
        with self._open_directory.using() as index:
            try:
                stamp = FileStamp.of(path)
            except FileNotFoundError:
                if key is not None and index.stamp(key) is not None:
                    with index.transaction():
                        if is_gone(path):
                            index.remove([key])
                return
            if key is not None and index.stamp(key) == stamp:
                return
            try:
                block = kvc.read(path)[0] if verify_payload else kvc.read_header(path)[0]
                path = self._rename_to_key(path, block.key)
                path.chmod(0o600)
            except FileNotFoundError:
                return
            except (CacheFormatError, OSError) as error:
                self._reject(path, key, error)
                return
            with index.transaction():
                if key is not None and key != block.key:
                    index.remove([key])  # the block that had this name is gone
                if os.path.lexists(path) and index.stamp(block.key) != stamp:
                    index.put(block, stamp, time.time_ns())

    def _rename_to_key(self, path: Path, key: bytes) -> Path:
        """Rename the file of a block to the name of its key, unless it has that name; return its path."""
        right = block_path(self._open_directory.root, key)
        if path != right:
            if os.path.lexists(right):
                raise CacheFormatError("the file contains another block than its name says")
            path.rename(right)
        return right

    def _reject(self, path: Path, key: bytes | None, error: Exception) -> None:
        """Quarantine a file that cannot be read; check it again later where it may be readable then."""
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
        if key is not None:
            with self._open_directory.using() as index:
                index.remove([key])


def is_fault_of_file(error: Exception) -> bool:
    """Return whether the file itself causes an error, so that a retry cannot help."""
    if isinstance(error, CacheFormatError):
        return True
    return isinstance(error, OSError) and error.errno in _FILE_ERRORS
