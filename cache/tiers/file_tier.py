"""Tiers of files: `disk`, and `ram_file` on a tmpfs. A directory, its index, and one .kvc file a block.

A block is reserved in the index, written under a temporary name, made durable,
and then, its reservation still there, renamed into place and indexed in one
transaction. What a crash leaves between those steps is put right when the
directory is next opened: a valid file that the index lacks is adopted, a row
without its file is dropped, what dead processes left half-done is removed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from erllama._runtime.log import logger
from erllama.cache.blocks import kvc
from erllama.cache.blocks.block import Block
from erllama.cache.blocks.keys import KEY_BYTES
from erllama.cache.texts.text_tokens import KnownText, TextDigests
from erllama.cache.tiers.directory import CacheDirectory, warn_of_file_system
from erllama.cache.tiers.index import FileStamp, Index, is_damaged, may_tell_damage, set_aside, tells_damage
from erllama.cache.tiers.tier import Changes, Problem, SimulatedCrash, Tier, TierRow
from erllama.cache.tiers.watch import DirectoryWatch
from erllama.errors import CacheError, CacheFormatError

log = logger("erllama.cache")

_TEXT_BYTES = 64 << 20  # of texts and their tokens: about a thousandth of the KV of as many
_MOST_SUSPECTS = 1000  # names; beyond that, all files are looked at
# A file that makes no sense and is younger than that may be one that somebody is copying in.
_SETTLED_SECONDS = 2.0
# A link, a socket or a device without a driver, a directory; a sector that cannot be read.
_OF_THE_FILE = {errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EISDIR, errno.EIO, errno.EBADMSG}
_AGAIN_SECONDS = 1.0  # before what failed for a reason of the moment is tried again


class FileTier(Tier):
    """Blocks as files under one private directory, shared by any number of processes.

    Args:
        root: the directory, made if missing.
        budget: most bytes of the block files of the directory, those of all processes and those being written.
        name: "ram_file" for a directory in memory, whose files need not be made durable.
        watch: hear of files that come or go behind the cache's back.

    Raises (from `open`):
        CacheError: the directory is not private to us, is a link, lies in another cache's, cannot be
            locked or shared, or its index is of a newer release.
        OSError, sqlite3.Error: it cannot be used.
    """

    def __init__(self, root: Path, budget: int, *, name: str = "disk", watch: bool = True) -> None:
        super().__init__(name, budget)
        self.root = root
        self._durable = name != "ram_file"
        self._watching = watch
        self._watch: DirectoryWatch | None = None
        self._directory: CacheDirectory | None = None
        self._index: Index | None = None
        self._broken = False  # the index is open and no good: `open` replaces it
        self._damage: Exception | None = None  # what says that its content is not what was written
        self._on_change: Callable[[], None] = lambda: None
        self._suspects_lock = threading.Lock()
        self._suspects: dict[str, float] = {}  # names to look at, and not before when, by time.monotonic()
        self._suspects_all = False  # there were too many to remember
        self._uses_seen = time.time_ns()  # what was used before, the rows tell
        self._delays: dict[str, float] = {}  # of names that cannot be looked at, each longer than the last

    # --- opening and closing ---------------------------------------------------------------

    @property
    def usable(self) -> bool:
        return self._index is not None and not self._broken

    @property
    def place(self) -> str:
        return str(self.root)

    def where(self, block: Block) -> str:
        return str(self.path_of(block.key))

    def open(self) -> None:
        damage, self._damage = self._damage, None
        self.close()
        directory = CacheDirectory(self.root)
        try:
            if damage is not None and (tells_damage(damage) or is_damaged(directory.index)):
                set_aside(directory.index, damage)
            try:
                self._open_in(directory)
            except sqlite3.Error as error:
                self.close()
                if not tells_damage(error) and not (may_tell_damage(error) and is_damaged(directory.index)):
                    raise
                set_aside(directory.index, error)
                directory = CacheDirectory(self.root)
                self._open_in(directory)
        except BaseException:
            self.close()
            directory.leave()
            raise
        warn_of_file_system(self.root, in_memory=not self._durable)

    def _open_in(self, directory: CacheDirectory) -> None:
        self._directory = directory
        self._index, self._broken = Index(directory.index), False
        if self._watching:
            # Before the first look: what comes in between is seen twice rather than never.
            self._watch = DirectoryWatch(directory.blocks, self._suspect)
        self._reap()
        with self._using() as index:
            self._compare(index.stamps(), by_name=True)

    def close(self) -> None:
        watch, self._watch = self._watch, None
        index, self._index = self._index, None
        directory, self._directory = self._directory, None
        if watch is not None:
            watch.stop()
        if index is not None:
            index.close()
        if directory is not None:
            directory.leave()

    def forked(self) -> None:
        """In a forked child: let go of the lock, so that the parent's death shows."""
        if self._directory is not None:
            self._directory.close()

    def abandon(self) -> None:
        """Let go as the system does when a process is killed: what is half-done stays half-done."""
        if self._watch is not None:
            self._watch.stop()
        if self._index is not None:
            self._index.close()
        if self._directory is not None:
            self._directory.close()
        self._watch = self._index = self._directory = None

    def _open_index(self) -> Index:
        index = self._index
        if index is None or self._broken:
            raise CacheError(f"{self.root} is not open")
        if index.lost or not self._open_directory.whole:
            self._broken = True  # closing it may wait, and whoever notices may not
            raise CacheError(f"{self.root} was removed or replaced; it is opened anew")
        return index

    @property
    def _open_directory(self) -> CacheDirectory:
        if self._directory is None:
            raise CacheError(f"{self.root} is not open")
        return self._directory

    @contextlib.contextmanager
    def _using(self) -> Iterator[Index]:
        """The index; given up where its content turns out to be damaged, so that opening makes it anew."""
        try:
            yield self._open_index()
        except UnicodeDecodeError as error:
            self._broken, self._damage = True, error
            raise CacheError(f"the index of {self.root} is damaged: {error}") from error
        except sqlite3.Error as error:
            if may_tell_damage(error):
                self._broken, self._damage = True, error
            raise

    # --- what the cache calls --------------------------------------------------------------

    def rows(self) -> list[TierRow]:
        with self._using() as index:
            return index.rows()

    def size(self, block: Block, payload_bytes: int) -> int:
        return kvc.header_bytes(block.n_tokens) + payload_bytes

    def holds(self, key: bytes) -> bool:
        """Whether the index says that a block is stored now."""
        with self._using() as index:
            return index.stamp(key) is not None

    def path_of(self, key: bytes) -> Path:
        """The file of a block."""
        return self.root / "blocks" / f"{key.hex()}{kvc.SUFFIX}"

    def write(self, block: Block, payload: memoryview) -> None:
        directory, final = self._open_directory, self.path_of(block.key)
        partial, before = directory.new_partial(), directory.new_partial()
        published = replaced = False
        try:
            self._step("reserved")
            kvc.write(partial, block, payload, durable=self._durable)
            self._step("written")
            with self._using() as index, index.transaction():
                if index.reserved_by(block.key) != directory.owner:
                    raise CacheError("the reservation is gone: another process took this one for dead")
                if index.stamp(block.key) is not None:
                    with contextlib.suppress(OSError):
                        os.link(final, before)
                        replaced = True
                    partial.rename(final)
                elif self._in_the_way(final, block):
                    partial.unlink()
                else:
                    partial.rename(final)
                published = True
                self._step("published")
                index.put(block, _stamp(final), time.time_ns())
                if not replaced:
                    index.release(block.key, directory.owner)
        except SimulatedCrash:
            raise  # nothing is tidied up after a process that was killed
        except BaseException:
            self._take_back(final if published else partial, before, final)
            with contextlib.suppress(CacheError, OSError, sqlite3.Error), self._using() as index:
                index.release(block.key, directory.owner)
            raise
        if replaced:  # the reservation counts the older version's bytes until its last link is gone
            before.unlink(missing_ok=True)
            with self._using() as index:
                index.release(block.key, directory.owner)

    def _take_back(self, written: Path, before: Path, final: Path) -> None:
        """Undo a write: a file that is not in the index would be outside every budget."""
        with contextlib.suppress(OSError):
            written.unlink()
        with contextlib.suppress(OSError):
            before.rename(final)

    def _step(self, name: str) -> None:
        """A moment at which a process may die; tests make it die there."""

    def _in_the_way(self, final: Path, block: Block) -> bool:
        """Whether a file that the index lacks is as good as ours; what is not is replaced."""
        try:
            found, _ = kvc.read(final)
        except FileNotFoundError:
            return False
        except (CacheFormatError, OSError) as error:
            if not _tells_of_the_file(error):
                raise
            log.warning("%s: %s; replaced", final, error)
            self.damaged += 1
            self._open_directory.set_aside(final)
            return False
        return (found.key, found.recipe, found.slice_end) == (block.key, block.recipe, block.slice_end)

    def read(self, block: Block) -> tuple[Block, memoryview]:
        found, payload = kvc.read(self.path_of(block.key))
        # The file checks out; what the index says of it must be the same, down to every token.
        if (found.key, found.parent, found.namespace, found.start, found.tokens) != (
            block.key,
            block.parent,
            block.namespace,
            block.start,
            block.tokens,
        ):
            raise CacheFormatError("the file holds another block than the index says")
        return found, payload.data

    def remove(self, keys: Sequence[bytes]) -> None:
        """Rows and files go in one transaction, so that the index never counts less than there is."""
        if not keys:
            return
        failure: BaseException | None = None
        with self._using() as index, index.transaction():
            for key in keys:
                try:
                    self.path_of(key).unlink(missing_ok=True)
                except OSError as error:
                    failure = error
                except BaseException as error:  # the index must tell of what was removed so far
                    failure = error
                    break
            if failure is not None:  # what may still be there stays in the index, and in the budget
                keys = [key for key in keys if _is_gone(self.path_of(key))]
            index.remove(keys)
        if failure is not None:
            raise failure

    def set_aside(self, block: Block) -> None:
        with self._using() as index, index.transaction():
            index.remove([block.key])
            with contextlib.suppress(FileNotFoundError):
                self._open_directory.set_aside(self.path_of(block.key))

    def touch(self, used: Iterable[tuple[bytes, int]]) -> None:
        with self._using() as index:
            index.touch(used)

    def uses(self) -> list[tuple[bytes, int]]:
        now = time.time_ns()
        with self._using() as index:
            # All of them where our own clock was ahead when we last looked.
            found = index.uses_since(self._uses_seen if self._uses_seen <= now else 0)
        self._uses_seen = min(max((at for _, at in found), default=self._uses_seen), now)
        return found

    # --- sharing ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._using() as index, index.exclusive():
            yield

    def reserve(self, block: Block, n_bytes: int) -> bool:
        with self._using() as index:
            owner = index.reserved_by(block.key)
            if owner is not None and owner != self._open_directory.owner:
                return False
            index.reserve(block.key, self._open_directory.owner, n_bytes)
            return True

    def reserved(self) -> int:
        with self._using() as index:
            return sum(n_bytes for _, n_bytes in index.reservations().values())

    def tidy(self) -> None:
        with self._using() as index:
            owners = {owner for owner, _ in index.reservations().values()}
            if self._open_directory.owner in owners:
                # One thread writes, and it is here: what is reserved for us was left by a write that failed.
                index.release_all([self._open_directory.owner])
        if any(not self._open_directory.alive(owner) for owner in owners):
            self._reap()

    def in_flight(self, key: bytes) -> bool:
        with self._using() as index:
            owner = index.writer_of(key)
        return owner is not None and owner != self._open_directory.owner and self._open_directory.alive(owner)

    @property
    def shared(self) -> bool:
        with contextlib.suppress(OSError, CacheError):
            return self._open_directory.others()
        return False

    def changes(self) -> Changes | None:
        # Requests come this way: whether the directory is still whole is for others to look.
        index = self._index
        if index is None or self._broken:
            return None
        try:
            return index.changes()
        except sqlite3.Error as error:
            if may_tell_damage(error):
                self._broken, self._damage = True, error
            raise

    # --- fingerprints of models, remembered beside what they computed -----------------------

    def fingerprint(self, identity: str) -> str | None:
        with self._using() as index:
            return index.fingerprint(identity)

    def remember_fingerprint(self, identity: str, sha256: str) -> None:
        with self._using() as index:
            index.remember_fingerprint(identity, sha256)

    # --- texts, and the tokens that they were computed as -------------------------------------

    def longest_text(self, digests: TextDigests, longer_than: int) -> KnownText | None:
        # Requests come this way, too: whether the directory is still whole is for others to look.
        index = self._index
        return None if index is None or self._broken else index.texts.longest(digests, longer_than)

    def forget_texts(self) -> None:
        """Forget which tokens texts were computed as."""
        with self._using() as index, index.transaction():
            index.texts.clear()

    def remember_text(self, known: KnownText) -> None:
        with self._using() as index, index.transaction():
            index.texts.remember(known, _TEXT_BYTES)

    def touch_texts(self, used: Iterable[tuple[bytes, int]]) -> None:
        with self._using() as index, index.transaction():
            index.texts.touch(used)

    # --- files that come and go behind our back ---------------------------------------------

    def watch(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change

    def _suspect(self, name: str, delay: float = 0.0) -> None:
        with self._suspects_lock:
            self._suspects.setdefault(name, time.monotonic() + delay)
            if len(self._suspects) > _MOST_SUSPECTS:
                self._suspects, self._suspects_all = {}, True
        self._on_change()

    def examine(self) -> bool:
        now = time.monotonic()
        with self._suspects_lock:
            everything, self._suspects_all = self._suspects_all, False
        if everything:
            try:
                with self._using() as index:
                    self._compare(index.stamps(), by_name=False)
            except BaseException:
                self._suspects_all = True
                raise
        with self._suspects_lock:
            due = [name for name, since in self._suspects.items() if since <= now]
            for name in due:
                del self._suspects[name]
        while due:
            try:
                self._look_at(self._open_directory.blocks / due[-1], whole=True)
            except BaseException:
                for name in due:
                    self._suspect(name, _AGAIN_SECONDS)
                raise
            due.pop()
        with self._suspects_lock:
            return bool(self._suspects)

    def mend(self) -> None:
        self.tidy()
        self._reap()
        with self._using() as index:
            index.trim_changes()
            self._compare(index.stamps(), by_name=False)

    def verify(self, on_read: Callable[[int], object] = lambda n_bytes: None) -> Iterator[Problem]:
        """As of `Tier`; `on_read` is told the bytes of each file that was looked at."""
        with self._using() as index:
            rows = {row.block.key: row for row in index.rows_now()}
        for key, row in rows.items():
            try:
                self.read(row.block)
                with self._using() as index:
                    known = index.stamp(key)
                if known is not None and known != _stamp(self.path_of(key)):
                    raise CacheFormatError("it is not the file that the index knows")
            except (CacheFormatError, OSError) as error:
                with self._using() as index:
                    if index.stamp(key) is not None:  # not evicted meanwhile
                        yield Problem(self.name, str(self.path_of(key)), str(error))
            on_read(row.n_bytes)
        directory = self._open_directory
        for entry in list(directory.block_files()):
            key_of_file = _key_of(entry.name)
            if key_of_file in rows:
                continue
            # In a transaction: a file that is being published is in place a moment before its row.
            with self._using() as index, index.transaction():
                known = index.stamp(key_of_file) if key_of_file is not None else None
                unknown = known is None and os.path.lexists(entry.path)
            if unknown:
                yield Problem(self.name, entry.path, "the index does not know it")
        for path in directory.partial.iterdir():
            if not directory.alive(directory.owner_of(path)):
                yield Problem(self.name, str(path), "a dead process left it")

    def check(self) -> Iterator[Problem]:
        # Files that others removed or cut are found when they are used; bytes that are not counted are not.
        directory = self._open_directory
        with self._using() as index:
            known = index.stamps()
        for entry in list(directory.block_files()):
            key = _key_of(entry.name)
            if key is None:
                continue  # `verify` tells of it
            with contextlib.suppress(FileNotFoundError):
                n_bytes = _stamp(Path(entry.path)).n_bytes
                counted = known[key].n_bytes if key in known else None
                if counted is None:
                    yield Problem(self.name, entry.path, f"{n_bytes} bytes that the index does not know")
                elif n_bytes > counted:
                    yield Problem(self.name, entry.path, f"{n_bytes} bytes, and {counted} in the index")
        for path in directory.partial.iterdir():
            if directory.owner_of(path) == directory.owner:
                yield Problem(self.name, str(path), "a write left it")

    def _reap(self) -> None:
        """Remove what dead processes left: files, then reservations, which count them, then locks, which say so."""
        directory = self._open_directory
        with self._using() as index:
            left = {key: o for key, (o, _) in index.reservations().items() if not directory.alive(o)}
            if left:
                with index.transaction():
                    for key in left:
                        # It may have been renamed into place, and the index not told.
                        self._look_at(self.path_of(key), whole=True)
                    directory.reap_files()
                    index.release_all(set(left.values()))
        directory.reap()

    def _compare(self, known: dict[bytes, FileStamp], *, by_name: bool) -> None:
        """Bring index and files together: by their names alone, or by their sizes and times, too."""
        directory = self._open_directory
        seen = set()
        for entry in list(directory.block_files()):
            key = _key_of(entry.name)
            seen.add(key)
            with contextlib.suppress(FileNotFoundError):
                if key is None or key not in known or not (by_name or _stamp(Path(entry.path)) == known[key]):
                    self._look_at(Path(entry.path), whole=not by_name)
        missing = [key for key in known.keys() - seen if _is_gone(self.path_of(key))]
        if missing:
            log.warning("%d blocks of the index in %s have no file; dropped", len(missing), self.root)
            with self._using() as index:
                index.remove(missing)

    def _look_at(self, path: Path, *, whole: bool) -> None:
        """Make the index say of one name what is there; `whole`: payload checksums, too."""
        key = _key_of(path.name)
        with self._using() as index:
            try:
                stamp = _stamp(path)
            except FileNotFoundError:
                if key is not None and index.stamp(key) is not None:
                    with index.transaction():
                        if _is_gone(path):
                            index.remove([key])
                return
            if key is not None and index.stamp(key) == stamp:
                return
            try:
                block = kvc.read(path)[0] if whole else kvc.read_header(path)[0]
                path = self._rightly_named(path, block.key)
                path.chmod(0o600)
            except FileNotFoundError:
                return
            except (CacheFormatError, OSError) as error:
                self._refuse(path, key, error)
                return
            with index.transaction():
                if key is not None and key != block.key:
                    index.remove([key])  # what was under that name is gone
                if os.path.lexists(path) and index.stamp(block.key) != stamp:
                    index.put(block, stamp, time.time_ns())

    def _rightly_named(self, path: Path, key: bytes) -> Path:
        """A block that lies under another name gets its own."""
        right = self.path_of(key)
        if path != right:
            if os.path.lexists(right):
                raise CacheFormatError("the file holds another block than its name says")
            path.rename(right)
        return right

    def _refuse(self, path: Path, key: bytes | None, error: Exception) -> None:
        if not _tells_of_the_file(error):
            delay = self._delays[path.name] = min(2 * self._delays.get(path.name, _AGAIN_SECONDS / 2), 300.0)
            log.log(
                logging.WARNING if delay == _AGAIN_SECONDS else logging.DEBUG, "%s: %s; again later", path, error
            )
            self._suspect(path.name, delay)
            return
        with contextlib.suppress(OSError):
            age = time.time() - path.lstat().st_mtime
            if 0 <= age < _SETTLED_SECONDS and path.is_file() and not path.is_symlink():
                self._suspect(path.name, _SETTLED_SECONDS - age)
                return
        log.warning("%s: %s; set aside", path, error)
        self.damaged += 1
        with contextlib.suppress(OSError):
            self._open_directory.set_aside(path)
        if key is not None:
            with self._using() as index:
                index.remove([key])


def _tells_of_the_file(error: Exception) -> bool:
    """Whether an error is the file's own fault, and not one of the moment."""
    if isinstance(error, CacheFormatError):
        return True
    return isinstance(error, OSError) and error.errno in _OF_THE_FILE


def _stamp(path: Path) -> FileStamp:
    found = path.lstat()
    return FileStamp(found.st_size, found.st_mtime_ns)


def _key_of(name: str) -> bytes | None:
    stem = name.removesuffix(kvc.SUFFIX)
    if stem == name or len(stem) != 2 * KEY_BYTES:
        return None
    try:
        key = bytes.fromhex(stem)
    except ValueError:
        return None
    return key if key.hex() == stem else None


def _is_gone(path: Path) -> bool:
    """Whether there is no such file. A directory that cannot be looked into is no evidence of that."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False
