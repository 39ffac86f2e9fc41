"""File tiers: `disk`, and `ram_file` on a tmpfs. A directory, its index, and one .kvc file per block.

`FileTier` is the tier that `Cache` creates for its directories. Its guarantee is that the index lists only whole
files. A block is reserved in the index, written under a temporary name, and made durable. Then, if its reservation
is still there, one transaction renames the file into place and adds its row. After a crash between those steps, the
next opening repairs the directory: it adopts a valid file that the index lacks, drops a row without a file, and
removes leftovers of ended processes.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from erllama._runtime.log import logger
from erllama.cache.blocks import kvc
from erllama.cache.blocks.block import Block
from erllama.cache.blocks.encryption import ContentKey, Encryption
from erllama.cache.blocks.pins import PinRecord
from erllama.cache.texts.text_tokens import TextDigests, TextRecord
from erllama.cache.tiers.changed_files import ChangedFiles
from erllama.cache.tiers.directory import is_gone, warn_about_file_system
from erllama.cache.tiers.file_names import block_name, block_path
from erllama.cache.tiers.index_schema import may_show_damage
from erllama.cache.tiers.key_state import KeyState
from erllama.cache.tiers.open_directory import OpenDirectory
from erllama.cache.tiers.reconciler import Reconciler, is_fault_of_file
from erllama.cache.tiers.row_codec import BLOCK
from erllama.cache.tiers.sqlite_index import FileStamp, Index
from erllama.cache.tiers.tier import Changes, Problem, SimulatedCrash, Tier, TierRow
from erllama.cache.tiers.watch import DirectoryWatch
from erllama.errors import CacheError, CacheFormatError, CacheKeyError

T = TypeVar("T")

log = logger("erllama.cache")

_TEXT_BYTES = 64 << 20  # of texts and their tokens: about a thousandth of the KV of as many tokens


class _Place(NamedTuple):
    """Where the file of a block may be: its name and path, and the key that it is encrypted with."""

    name: bytes
    path: Path
    content_key: ContentKey | None


class FileTier(Tier):
    """Blocks as files under one private directory, shared by any number of processes.

    Args:
        root: the directory, created if missing.
        budget: maximum bytes of the block files of the directory. Files of all processes count, and those being
            written.
        name: "ram_file" for a directory in memory, whose files need not be made durable.
        watch: notice files that others add to the directory or remove from it.
        key_file: file of the keys that encrypt the directory; None for a directory that is not encrypted.

    Raises (from `open`):
        CacheError: the directory is not private to this user, is a link, lies in another cache, cannot be locked or
            shared, or its index is of a newer release.
        CacheKeyError: the key is missing or wrong, or the directory is not encrypted. The directory is not changed.
        OSError, sqlite3.Error: the directory cannot be used.
    """

    def __init__(
        self,
        root: Path,
        budget: int,
        *,
        name: str = "disk",
        watch: bool = True,
        key_file: Path | None = None,
    ) -> None:
        super().__init__(name, budget)
        self.root = root
        self._key_file = key_file
        self._encryption: Encryption | None = None  # the keys in use, while the directory is open
        self._durable = name != "ram_file"
        self._watching = watch
        self._watch: DirectoryWatch | None = None
        self._open_directory = OpenDirectory(root)
        self._changed_files = ChangedFiles()
        self._reconciler = Reconciler(self._open_directory, self._changed_files)
        self._uses_read = time.time_ns()  # uses up to then were read: `rows` contains the earlier ones

    # --- opening and closing ---------------------------------------------------------------

    @property
    def usable(self) -> bool:
        return self._open_directory.usable

    @property
    def location(self) -> str:
        return str(self.root)

    def location_of(self, block: Block) -> str:
        return str(self.path_of(block.key))

    def open(self) -> None:
        try:
            self._open_directory.open(self._prepare, self._keys_of_file())
        except BaseException:
            self._stop_watch()
            raise
        warn_about_file_system(self.root, in_memory=not self._durable)

    def _keys_of_file(self) -> Encryption | None:
        return None if self._key_file is None else Encryption.of_file(self._key_file)

    @property
    def keys(self) -> KeyState | None:
        """The ids of the keys that the directory is encrypted with; None if it is not encrypted or not open."""
        if self._encryption is None:
            return None
        current = self._encryption.current.key_id
        return KeyState(current, self._encryption.key_ids - {current})

    def file_name(self, block: Block) -> tuple[str, ContentKey | None]:
        """Return the name of a block's file under the current key, and that key; None without encryption."""
        place = self._places(block.key)[-1]
        return place.path.name, place.content_key

    def key_of_name(self, name: bytes) -> tuple[bytes, ContentKey]:
        """Return the key of the block whose encrypted key is `name`, and the key that encrypted it.

        Raises:
            CacheKeyError: no key of the key file has encrypted it.
        """
        encryption = self._keys_of_file()
        if encryption is None:
            raise CacheKeyError(f"the block is encrypted, and {self.root} is not; use an encrypted directory")
        found = encryption.find(name, BLOCK)
        if found is None:
            raise CacheKeyError(f"the block is encrypted with a key that {encryption.source} does not have")
        return found

    def _prepare(self) -> None:
        self._stop_watch()
        with self._using() as index:
            self._encryption = index.encryption
        if self._watching:
            # Before the files are compared: a change in between is then noticed twice rather than never.
            self._watch = DirectoryWatch(self._open_directory.directory.blocks, self._changed_files.add)
        with self._reconciling() as reconciler:
            reconciler.remove_leftovers()
            reconciler.reconcile(by_name=True)

    def close(self) -> None:
        self._stop_watch()
        self._open_directory.close()

    def _stop_watch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.stop()

    def forked(self) -> None:
        """Close the copy of the lock in a forked child, so that the lock ends with the parent."""
        self._open_directory.close_in_child()

    def abandon(self) -> None:
        """Close as the system does when it kills a process: half-done writes stay half-done."""
        self._stop_watch()
        self._open_directory.abandon()

    def _read_at_once(self, read: Callable[[Index], T | None]) -> T | None:
        """Return what an index has; None if it is not open. For requests, which must not wait.

        Other calls check whether the directory was replaced.
        """
        index = self._open_directory.unchecked_index
        if index is None:
            return None
        try:
            return read(index)
        except CacheKeyError:
            self._open_directory.note_rotation()
            raise
        except sqlite3.Error as error:
            if may_show_damage(error):
                self._open_directory.note_damage(error)
            raise

    def _using(self) -> contextlib.AbstractContextManager[Index]:
        return self._open_directory.using()

    @contextlib.contextmanager
    def _reconciling(self) -> Iterator[Reconciler]:
        """Yield the reconciler, and count the files that it quarantines."""
        before = self._reconciler.n_quarantined
        try:
            yield self._reconciler
        finally:
            self.damaged += self._reconciler.n_quarantined - before

    # --- called by the cache --------------------------------------------------------------

    def rows(self) -> list[TierRow]:
        with self._using() as index:
            return index.rows()

    def size(self, block: Block, payload_bytes: int) -> int:
        return kvc.file_bytes(block.n_tokens, payload_bytes, encrypted=self._key_file is not None)

    def holds(self, key: bytes) -> bool:
        """Return whether the index lists a block."""
        with self._using() as index:
            return index.stamp(key) is not None

    def path_of(self, key: bytes) -> Path:
        """Return the path of a block's file, in a directory whose keys are not being rotated."""
        return self._places(key)[-1].path

    def _places(self, key: bytes) -> list[_Place]:
        """Return where the file of a block may be. While keys are rotated, that under the current key is last."""
        encryption = self._encryption
        if encryption is None:
            return [_Place(key, block_path(self.root, key), None)]
        keys = [(each.name(key, BLOCK), each) for each in reversed(encryption.keys)]
        return [_Place(name, block_path(self.root, name), content_key) for name, content_key in keys]

    def write(self, block: Block, payload: memoryview) -> None:
        self.write_used(block, payload, time.time_ns())

    def write_used(self, block: Block, payload: memoryview, last_used: int) -> None:
        """Write a block as `write` does. `last_used`: when it was last used, in ns since 1970."""
        directory, final = self._open_directory.directory, self._places(block.key)[-1]
        partial, older = directory.new_partial(), directory.new_partial()
        replaced: Path | None = None
        published = False
        try:
            self._step("reserved")
            kvc.write(partial, block, payload, durable=self._durable, content_key=final.content_key)
            self._step("written")
            with self._using() as index, index.transaction():
                if index.reserved_by(block.key) != directory.owner:
                    raise CacheError("another process removed the reservation, because it took this one for ended")
                listed = index.listed_name(block.key)
                if listed is not None:
                    with contextlib.suppress(OSError):
                        os.link(block_path(self.root, listed), older)
                        replaced = block_path(self.root, listed)
                    partial.rename(final.path)
                elif self._has_same_version(final, block):
                    partial.unlink()
                else:
                    partial.rename(final.path)
                published = True
                self._step("published")
                if listed is not None and listed != final.name:  # it was encrypted with an old key
                    block_path(self.root, listed).unlink(missing_ok=True)
                    index.remove_names([listed])
                index.put(block, FileStamp.of(final.path), last_used, final.content_key)
                if replaced is None:
                    index.release(block.key, directory.owner)
        except SimulatedCrash:
            raise  # tests end a write as if the process had been killed: no cleanup
        except BaseException:
            self._undo_write(final.path if published else partial, older, replaced)
            with contextlib.suppress(CacheError, OSError, sqlite3.Error), self._using() as index:
                index.release(block.key, directory.owner)
            raise
        if replaced is not None:  # the reservation counts the older version's bytes until its last link is removed
            older.unlink(missing_ok=True)
            with self._using() as index:
                index.release(block.key, directory.owner)

    def _undo_write(self, written: Path, older: Path, replaced: Path | None) -> None:
        """Remove the written file and restore the older one: no budget counts a file that the index lacks."""
        with contextlib.suppress(OSError):
            written.unlink()
        if replaced is not None:
            with contextlib.suppress(OSError):
                older.rename(replaced)

    def _step(self, name: str) -> None:
        """Mark a step of `write`. Tests override it to end the process there."""

    def _has_same_version(self, final: _Place, block: Block) -> bool:
        """Return whether a file that the index lacks holds the same version; quarantine an invalid file."""
        try:
            found, _ = kvc.read(final.path, final.content_key)
        except FileNotFoundError:
            return False
        except (CacheFormatError, OSError) as error:
            if not is_fault_of_file(error):
                raise
            log.warning("%s: %s; replaced", final.path, error)
            self.damaged += 1
            self._open_directory.directory.quarantine(final.path)
            return False
        return (found.key, found.recipe, found.slice_end) == (block.key, block.recipe, block.slice_end)

    def read(self, block: Block) -> tuple[Block, memoryview]:
        found, payload = self._read_file(block.key)
        # The file is valid. The index must describe the same block, down to every token.
        if (found.key, found.parent, found.namespace, found.start, found.tokens) != (
            block.key,
            block.parent,
            block.namespace,
            block.start,
            block.tokens,
        ):
            raise CacheFormatError("the file contains another block than the index says")
        return found, payload.data

    def _read_file(self, key: bytes) -> tuple[Block, NDArray[np.uint8]]:
        *olds, current = self._places(key)
        for place in olds:
            with contextlib.suppress(FileNotFoundError):
                return kvc.read(place.path, place.content_key)
        return kvc.read(current.path, current.content_key)

    def remove(self, keys: Sequence[bytes]) -> None:
        """Remove rows and files in one transaction, so that the index never counts fewer bytes than there are."""
        if not keys:
            return
        failure: BaseException | None = None
        with self._using() as index, index.transaction():
            for key in keys:
                try:
                    for place in self._places(key):
                        place.path.unlink(missing_ok=True)
                except OSError as error:
                    failure = error
                except BaseException as error:  # the index must reflect the removals so far
                    failure = error
                    break
            if failure is not None:  # files that may still exist stay in the index and count towards the budget
                keys = [key for key in keys if all(is_gone(place.path) for place in self._places(key))]
            index.remove(keys)
        if failure is not None:
            raise failure

    def quarantine(self, block: Block) -> None:
        with self._using() as index, index.transaction():
            index.remove([block.key])
            for place in self._places(block.key):
                with contextlib.suppress(FileNotFoundError):
                    self._open_directory.directory.quarantine(place.path)

    def touch(self, used: Iterable[tuple[bytes, int]]) -> None:
        with self._using() as index:
            index.touch(used)

    def uses(self) -> list[tuple[bytes, int]]:
        now = time.time_ns()
        with self._using() as index:
            # All uses, if this process's clock was ahead at the last call.
            found = index.uses_since(self._uses_read if self._uses_read <= now else 0)
        self._uses_read = min(max((at for _, at in found), default=self._uses_read), now)
        return found

    # --- sharing ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._using() as index, index.exclusive():
            yield

    def reserve(self, block: Block, n_bytes: int) -> bool:
        with self._using() as index:
            owner = index.reserved_by(block.key)
            if owner is not None and owner != self._open_directory.directory.owner:
                return False
            index.reserve(block.key, self._open_directory.directory.owner, n_bytes)
            return True

    def reserved(self) -> int:
        with self._using() as index:
            return sum(n_bytes for _, n_bytes in index.reservations().values())

    def release_stale_reservations(self) -> None:
        directory = self._open_directory.directory
        with self._using() as index:
            owners = {owner for owner, _ in index.reservations().values()}
            if directory.owner in owners:
                # One thread writes, and it is this one: a write that failed left these reservations.
                index.release_all([directory.owner])
        if any(not directory.is_alive(owner) for owner in owners):
            with self._reconciling() as reconciler:
                reconciler.remove_leftovers()

    def in_flight(self, key: bytes) -> bool:
        with self._using() as index:
            owner = index.writer_of(key)
        directory = self._open_directory.directory
        return owner is not None and owner != directory.owner and directory.is_alive(owner)

    def use_for(self, cache_id: str) -> None:
        """Set the id of the cache that uses this tier. `open` shows it to the other caches of the directory."""
        self._open_directory.cache_id = cache_id

    def sharers(self) -> set[str]:
        """Return the ids of the other caches, of this process and of others, that have the directory open."""
        with contextlib.suppress(OSError, CacheError):
            return self._open_directory.directory.sharers()
        return set()

    @property
    def shared(self) -> bool:
        return bool(self.sharers())

    def changes(self) -> Changes | None:
        return self._read_at_once(Index.changes)

    # --- pins ------------------------------------------------------------------------------

    def pins(self) -> list[PinRecord]:
        """Return all pins of the directory, expired ones included."""
        with self._using() as index:
            return index.all_pins()

    def changed_pins(self) -> list[PinRecord] | None:
        """Return all pins of the directory; None if there was no change since the last call. Never waits.

        Within `exclusive`, the result is up to date.
        """
        return self._read_at_once(Index.changed_pins)

    def put_pin(self, pin: PinRecord) -> None:
        """Store a pin. Replaces one of the same name. Removes expired pins."""
        with self._using() as index, index.transaction():
            index.pins.remove_expired(time.time())
            index.pins.put(pin)

    def remove_pin(self, name: str) -> bool:
        """Remove a pin. Return False if no pin has this name."""
        with self._using() as index, index.transaction():
            return index.pins.remove(name)

    # --- fingerprints of models, stored beside their blocks ---------------------------------

    def fingerprint(self, identity: str) -> str | None:
        with self._using() as index:
            return index.fingerprint(identity)

    def remember_fingerprint(self, identity: str, sha256: str) -> None:
        with self._using() as index:
            index.remember_fingerprint(identity, sha256)

    # --- texts, and the tokens that they were computed as -------------------------------------

    def longest_text(self, digests: TextDigests, longer_than: int) -> TextRecord | None:
        # Requests call this: other calls check whether the directory was replaced.
        index = self._open_directory.unchecked_index
        return None if index is None else index.texts.longest(digests, longer_than)

    def forget_texts(self) -> None:
        """Remove the tokens of all texts."""
        with self._using() as index, index.transaction():
            index.texts.clear()

    def remember_text(self, record: TextRecord) -> None:
        with self._using() as index, index.transaction():
            index.texts.remember(record, _TEXT_BYTES)

    def touch_texts(self, used: Iterable[tuple[bytes, int]]) -> None:
        with self._using() as index, index.transaction():
            index.texts.touch(used)

    # --- files that others change ------------------------------------------

    def watch(self, on_change: Callable[[], None]) -> None:
        self._changed_files.on_add = on_change

    def examine(self) -> bool:
        with self._reconciling() as reconciler:
            return reconciler.check_changed()

    def repair(self) -> None:
        self.release_stale_reservations()
        with self._reconciling() as reconciler:
            reconciler.remove_leftovers()
            with self._using() as index:
                index.trim_changes()
                with index.transaction():
                    index.pins.remove_expired(time.time())
            reconciler.reconcile(by_name=False)

    def verify(self, on_read: Callable[[int], object] = lambda n_bytes: None) -> Iterator[Problem]:
        """Verify as `Tier.verify` describes. `on_read` is called with the bytes of each file that was read."""
        with self._using() as index:
            rows = {row.block.key: row for row in index.peek_rows()}
            names = set(index.stamps())
        for key, row in rows.items():
            try:
                self.read(row.block)
                with self._using() as index:
                    stamp = index.stamp(key)
                if stamp is not None and stamp not in self._stamps(key):
                    raise CacheFormatError("the file is not the one that the index lists")
            except (CacheFormatError, CacheKeyError, OSError) as error:
                with self._using() as index:
                    if index.stamp(key) is not None:  # not evicted meanwhile
                        yield Problem(self.name, str(self.path_of(key)), str(error))
            on_read(row.n_bytes)
        directory = self._open_directory.directory
        for entry in list(directory.block_files()):
            name = block_name(entry.name)
            if name in names:
                continue
            # In a transaction: the file of a write in progress is in place shortly before its row.
            with self._using() as index, index.transaction():
                stamp = index.stamp_of(name) if name is not None else None
                unknown = stamp is None and os.path.lexists(entry.path)
            if unknown:
                yield Problem(self.name, entry.path, "the index does not list it")
        for path in directory.partial.iterdir():
            if not directory.is_alive(directory.owner_of(path)):
                yield Problem(self.name, str(path), "an ended process left it")

    def _stamps(self, key: bytes) -> list[FileStamp]:
        """Return the stamps of the files of a block; several only while keys are rotated."""
        found = []
        for place in self._places(key):
            with contextlib.suppress(FileNotFoundError):
                found.append(FileStamp.of(place.path))
        return found

    def check(self) -> Iterator[Problem]:
        # Only bytes that no budget counts. A removed or truncated file shows when it is used.
        directory = self._open_directory.directory
        with self._using() as index:
            stamps = index.stamps()
        for entry in list(directory.block_files()):
            name = block_name(entry.name)
            if name is None:
                continue  # `verify` reports it
            with contextlib.suppress(FileNotFoundError):
                n_bytes = FileStamp.of(Path(entry.path)).n_bytes
                counted = stamps[name].n_bytes if name in stamps else None
                if counted is None:
                    yield Problem(self.name, entry.path, f"{n_bytes} bytes that the index does not list")
                elif n_bytes > counted:
                    yield Problem(self.name, entry.path, f"{n_bytes} bytes, and {counted} in the index")
        for path in directory.partial.iterdir():
            if directory.owner_of(path) == directory.owner:
                yield Problem(self.name, str(path), "a write left it")
