"""An open cache directory: the lock on it, its index, and whether both are still usable.

`FileTier` and its `Reconciler` share one `OpenDirectory`. Every use of the index goes through `using`, which
notices that the directory was removed, replaced or damaged. `usable` is then False, and the cache opens the tier
again.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from erllama.cache.blocks.encryption import Encryption
from erllama.cache.tiers.directory import CacheDirectory, new_cache_id
from erllama.cache.tiers.index_schema import is_damaged, may_show_damage, quarantine, shows_damage
from erllama.cache.tiers.key_state import remove_empty_index
from erllama.cache.tiers.sqlite_index import Index
from erllama.errors import CacheError, CacheKeyError


class OpenDirectory:
    """Lock and index of one directory. Closed until `open`.

    Args:
        root: the directory, created if missing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cache_id = new_cache_id()  # of the cache that uses the directory; `open` shows it to other caches
        self._directory: CacheDirectory | None = None
        self._index: Index | None = None
        self._unusable = False  # the index is open, and `open` must replace it
        self._damage: Exception | None = None  # an error that a damaged index may have caused

    @property
    def usable(self) -> bool:
        """Whether the index is open, and no use has found it damaged or replaced."""
        return self._index is not None and not self._unusable

    def open(self, prepare: Callable[[], None], encryption: Encryption | None = None) -> None:
        """Lock the directory, open its index, and call `prepare`, which makes the index fit the files.

        A damaged index is moved aside and replaced by a new one, once.

        Args:
            encryption: the keys that the directory may be encrypted with; None if it is not encrypted.

        Raises:
            CacheError, OSError, sqlite3.Error: as of `FileTier.open`.
        """
        damage, self._damage = self._damage, None
        self.close()
        directory = CacheDirectory(self.root, self.cache_id)
        try:
            if damage is not None and (shows_damage(damage) or is_damaged(directory.index)):
                quarantine(directory.index, damage)
            try:
                self._open_index(directory, encryption)
                prepare()
            except sqlite3.Error as error:
                self.close()
                if not shows_damage(error) and not (may_show_damage(error) and is_damaged(directory.index)):
                    raise
                quarantine(directory.index, error)
                directory = CacheDirectory(self.root, self.cache_id)
                self._open_index(directory, encryption)
                prepare()
        except BaseException:
            self.close()
            directory.leave()
            raise

    def _open_index(self, directory: CacheDirectory, encryption: Encryption | None) -> None:
        self._directory = directory
        if encryption is not None and directory.index.exists() and not directory.sharers():
            remove_empty_index(self.root)
        self._index, self._unusable = Index(directory.index, encryption), False

    def close(self) -> None:
        """Close the index and release the lock. Idempotent."""
        index, self._index = self._index, None
        directory, self._directory = self._directory, None
        if index is not None:
            index.close()
        if directory is not None:
            directory.leave()

    def close_in_child(self) -> None:
        """Close this process's copy of the lock after a fork, so that the lock ends with the parent."""
        if self._directory is not None:
            self._directory.close()

    def abandon(self) -> None:
        """Close as the system does when it kills a process: half-done writes stay half-done."""
        if self._index is not None:
            self._index.close()
        if self._directory is not None:
            self._directory.close()
        self._directory = self._index = None

    @property
    def directory(self) -> CacheDirectory:
        """The locked directory.

        Raises:
            CacheError: it is not open.
        """
        if self._directory is None:
            raise CacheError(f"{self.root} is not open")
        return self._directory

    @contextlib.contextmanager
    def using(self) -> Iterator[Index]:
        """Yield the index. After an error that damage may have caused, `usable` is False until the next `open`.

        Raises:
            CacheError: the directory is not open, or it was removed or replaced.
            CacheKeyError: its keys were rotated. `usable` is then False, too.
        """
        try:
            yield self._checked_index()
        except CacheKeyError:
            self.note_rotation()
            raise
        except UnicodeDecodeError as error:
            self.note_damage(error)
            raise CacheError(f"the index of {self.root} is damaged: {error}") from error
        except sqlite3.Error as error:
            if may_show_damage(error):
                self.note_damage(error)
            raise

    def note_damage(self, error: Exception) -> None:
        """Record an error that a damaged index may have caused."""
        self._unusable, self._damage = True, error

    def note_rotation(self) -> None:
        """Record that another process has rotated the keys. The next `open` reads them again."""
        self._unusable = True

    def _checked_index(self) -> Index:
        index = self.unchecked_index
        if index is None:
            raise CacheError(f"{self.root} is not open")
        if index.is_replaced or not self.directory.is_complete:
            self._unusable = True  # not closed here: closing may wait, and this caller may not
            raise CacheError(f"{self.root} was removed or replaced; the cache opens it again")
        return index

    @property
    def unchecked_index(self) -> Index | None:
        """The index; None where it is not usable. Does not check whether the directory was replaced.

        For requests, which must not wait for the file system.
        """
        return None if self._unusable else self._index
