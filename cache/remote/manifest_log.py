"""The manifests of a remote tier as one machine reads and writes them.

A machine publishes what it stored and removed as a new segment, and reads the segments of the others that it has
not read yet. Any machine merges small segments into larger ones, so that their number stays small: the start of a
machine costs one short listing and as many reads as there are segments, however many blocks there are. Two machines
that merge the same segments at once do no harm, because entries may be listed twice. In a large fleet, a machine
reads few of the small segments itself: it reads what others have merged.
"""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import NamedTuple

from erllama._runtime.log import logger
from erllama.cache.remote import manifest
from erllama.cache.remote.block_list import BlockList
from erllama.cache.remote.daemon_threads import DaemonThreads
from erllama.cache.remote.manifest import Entry, Event, SegmentName
from erllama.cache.remote.object_codec import ObjectCodec
from erllama.cache.remote.stores import ObjectStore
from erllama.errors import CacheFormatError, CacheKeyError, SignatureRefused

log = logger("erllama.cache")

_random = random.SystemRandom()  # apart from the generator that a program may have seeded: machines must differ

_MOST_LISTED = 20_000  # names of segments that one poll looks at; a healthy bucket has less than a hundred
_READ_AT_ONCE = 4
_MERGE_FROM = 8  # segments of about the same size
_SIZE_BITS = 3  # sizes within a factor of 8 are about the same
_MERGE_AT_ONCE = 512  # segments that one merge reads
_LARGE_ENTRIES = manifest.MAX_ENTRIES // 2  # a segment of so many entries, or bytes, is merged only when stale
_LARGE_BYTES = manifest.FULL_BYTES // 2
_LOOKED_AT = 8  # large segments of which each poll counts the entries that still count
_FORGET_SECONDS = 3600.0  # between two searches for removals to forget
_READ_TRIES = 3  # of listing and reading all segments, while other machines merge them


class _Segment(NamedTuple):
    """A segment that was read or written."""

    entries: list[Entry]
    large: bool

    @classmethod
    def of(cls, entries: list[Entry]) -> _Segment:
        n_bytes = sum(map(manifest.raw_bytes, entries))
        return cls(entries, len(entries) >= _LARGE_ENTRIES or n_bytes >= _LARGE_BYTES)


class ManifestLog:
    """Reads and writes segments. `publish`, `read_new` and `merge` are called by one thread at a time.

    Args:
        blocks: receives the entries of other machines.
        threads: read several segments at once.
        count: adds to a counter of the tier.
        on_replaced: called with the entries of stored blocks that another version has replaced.

    Attributes:
        n_due: segments of the last listing that should be merged.
        n_writers: machines that wrote the small segments of the last listing.
        key_problem: why this machine can read none of the segments of the last listing; None if it can read one, or
            there is none.
    """

    def __init__(
        self,
        store: ObjectStore,
        codec: ObjectCodec,
        blocks: BlockList,
        threads: DaemonThreads,
        count: Callable[[str, int], None],
        on_replaced: Callable[[Sequence[Entry]], None],
    ) -> None:
        self._store, self._codec, self._blocks, self._threads = store, codec, blocks, threads
        self._count, self._on_replaced = count, on_replaced
        self._lock = threading.Lock()  # guards what is below
        self._waiting: list[Entry] = []
        self._waiting_since = 0.0  # by time.monotonic()
        self._known: dict[str, _Segment] = {}
        self._listed: set[str] = set()  # of the last listing
        self._is_cut_off = False  # whether the last listing reached its limit
        self._stale: set[str] = set()  # large segments of which at most half of the entries count
        self._forget_at = time.monotonic() + _FORGET_SECONDS
        self._refused: set[str] = set()
        self._foreign: set[str] = set()  # segments that are signed or encrypted with keys that this machine lacks
        self._writer = secrets.token_hex(8)
        self._number = 0
        self.n_due = self.n_writers = 0
        self.key_problem: str | None = None

    @property
    def unread_problem(self) -> str | None:
        """Why segments of the last listing were not read, which may list any object; None if all were."""
        with self._lock:
            if self._is_cut_off:
                return f"there are more than {_MOST_LISTED} manifests"
            unread = sorted(self._listed - self._known.keys())
        if not unread:
            return None
        rest = f" and {len(unread) - 1} more manifests" if len(unread) > 1 else ""
        return f"{unread[0]}{rest} could not be read"

    def read_all(self) -> None:
        """Read all segments, those included that other machines merge meanwhile."""
        for _ in range(_READ_TRIES):
            self.read_new()
            if self.unread_problem is None:
                return

    @property
    def has_waiting(self) -> bool:
        """Whether entries wait to be published."""
        return bool(self._waiting)

    @property
    def n_segments(self) -> int:
        """The number of segments that were read, or written."""
        return len(self._known)

    # --- writing --------------------------------------------------------------------------------------

    def append(self, entry: Entry) -> None:
        """Add an entry to the next segment."""
        with self._lock:
            if not self._waiting:
                self._waiting_since = time.monotonic()
            self._waiting.append(entry)

    def seconds_to_publish(self, delay: float) -> float | None:
        """Return when entries must be published, in seconds from now; None if there are none.

        Args:
            delay: how long an entry may wait.
        """
        with self._lock:
            if not self._waiting:
                return None
            if len(self._waiting) >= manifest.MAX_ENTRIES:
                return 0.0
            return max(self._waiting_since + delay - time.monotonic(), 0.0)

    def publish(self) -> None:
        """Write the entries that wait. On a failure they wait on, and the error is raised."""
        while True:
            with self._lock:
                entries = self._waiting[: manifest.MAX_ENTRIES]
            if not entries:
                return
            for part in manifest.split(entries):
                self._write([entry for entry in part if self._blocks.counts(entry)])
                with self._lock:
                    del self._waiting[: len(part)]

    def _write(self, entries: Sequence[Entry]) -> None:
        """Write one segment."""
        if not entries:
            return
        self._number += 1
        name = str(SegmentName(self._writer, self._number, len(entries), self._codec.key_id))
        self._store.put(name, manifest.encode(entries, self._codec))
        with self._lock:
            self._known[name] = _Segment.of(list(entries))

    # --- reading --------------------------------------------------------------------------------------

    def read_new(self, until: float | None = None, most: int | None = None) -> bool:
        """Read the segments that were not read yet, large ones first.

        Args:
            until: when to stop, by time.monotonic(); None for never.
            most: how many to read. Small ones beyond that are read once a machine has merged them.

        Returns:
            False if some are left because of `until`.

        Raises:
            RemoteError: the service fails.
        """
        new = self._list_new()
        for at in range(0, len(new) if most is None else min(len(new), most), _READ_AT_ONCE):
            if until is not None and time.monotonic() >= until:
                return False
            names = [str(name) for name in new[at : at + _READ_AT_ONCE]]
            reads = [self._threads.submit(_Read(self._store, self._codec, name)) for name in names]
            for name, read in zip(names, reads, strict=True):
                self._apply(name, read)
        return True

    def _list_new(self) -> list[SegmentName]:
        """Return the names of the segments that were not read yet, large ones first."""
        listed = {each.name for each in islice(self._store.list(manifest.PREFIX), _MOST_LISTED + 1)}
        is_cut_off = len(listed) > _MOST_LISTED
        every = [name for text in listed if (name := manifest.parse_name(text)) is not None]
        parsed = [name for name in every if self._codec.has_key(name.key_id)]
        self._note_foreign([name for name in every if not self._codec.has_key(name.key_id)], bool(parsed))
        with self._lock:
            self._listed, self._is_cut_off = listed, is_cut_off
            for text in self._known.keys() - listed:  # merged into others
                del self._known[text]
            large = {text for text, segment in self._known.items() if segment.large}
            self._refused &= listed
            self._foreign &= listed
            new = [name for name in parsed if str(name) not in self._known and str(name) not in self._refused]
        self._look_for_stale(_random.sample(sorted(large), min(len(large), _LOOKED_AT)))
        small = [name for name in parsed if name.n_entries < _LARGE_ENTRIES and str(name) not in large]
        self.n_due, self.n_writers = len(_due(small)) + len(self._stale), len({name.writer for name in small})
        return sorted(new, key=lambda name: name.n_entries, reverse=True)

    def _look_for_stale(self, names: Iterable[str]) -> None:
        """Find the large segments of which at most half of the entries still count."""
        with self._lock:
            self._stale &= self._known.keys()
            segments = [(name, self._known[name].entries) for name in names if name in self._known]
        for name, entries in segments:
            if 2 * sum(map(self._blocks.counts, entries)) <= len(entries):
                self._stale.add(name)

    def _note_foreign(self, names: Sequence[SegmentName], has_others: bool) -> None:
        """Count the segments that this machine has no key for. They stay where they are, and are not read."""
        ids = ", ".join(sorted({name.key_id.hex() for name in names if name.key_id}))
        if ids:
            problem = (
                f"what is stored there is encrypted with {ids}, and {self._codec.keys_text}; pass the key file of "
                "the other machines as key_file, or another prefix"
            )
        else:
            problem = "what is stored there is not encrypted; omit key_file, or pass another prefix"
        self.key_problem = problem if names and not has_others else None
        new = {str(name) for name in names} - self._foreign
        if new and has_others and not self._foreign:
            log.warning("some manifests of the remote tier are not used: %s", problem)
        self._count("remote_unknown_keys", len(new))
        self._foreign |= new

    def _apply(self, name: str, read: Future[list[Entry]]) -> None:
        try:
            entries = read.result()
        except FileNotFoundError:
            return  # merged since it was listed; the next poll finds the merged one
        except (CacheFormatError, CacheKeyError) as error:
            log.warning("manifest %s: %s; ignored", name, error)
            self._count("remote_manifests_refused", 1)
            with self._lock:
                self._refused.add(name)
                if isinstance(error, SignatureRefused) and error.unknown_key:
                    self._foreign.add(name)
            return
        if any(entry.hidden for entry in entries):
            self._count("remote_unknown_keys", 1)
        self._on_replaced(self._blocks.merge(entries))
        with self._lock:
            self._known[name] = _Segment.of(self._blocks.shared(entries))

    # --- merging --------------------------------------------------------------------------------------

    @property
    def should_merge(self) -> bool:
        """Whether this machine should merge now. Of all machines that ask at about the same time, few should."""
        if not self.n_due:
            return False
        wanted = max(1.0, 2 * self.n_due / _MERGE_AT_ONCE)
        return _random.random() < wanted / max(self.n_writers, 1)

    def merge(self, *, always: bool = False) -> None:
        """Merge small segments into larger ones, and write stale ones anew. Reads those not read yet first.

        Args:
            always: merge all small segments, however few there are.
        """
        self.read_new(most=None if always else _MERGE_AT_ONCE)
        with self._lock:
            known = dict(self._known)
        if always:
            self._look_for_stale([name for name, segment in known.items() if segment.large])
        parsed = [name for text in known if (name := manifest.parse_name(text)) is not None]
        small = [name for name in parsed if not known[str(name)].large]
        due = [*(small if always else _due(small)), *(name for name in parsed if str(name) in self._stale)]
        merged = [str(name) for name in sorted(due, key=lambda name: name.n_entries)[:_MERGE_AT_ONCE]]
        if len(merged) < 2 and not self._stale.intersection(merged):
            return
        forgotten = self._forget_removals(merged)
        every = (entry for name in merged for entry in known[name].entries if entry.key not in forgotten)
        for part in manifest.split(_newest(entry for entry in every if self._blocks.counts(entry))):
            self._write(part)
        self._store.delete(merged)  # only now: until then, a machine that starts reads these
        with self._lock:
            self._listed.difference_update(merged)
            self._stale.difference_update(merged)
            for text in merged:
                self._known.pop(text, None)

    def forget_removals(self) -> None:
        """Forget old removals that no longer matter. Does so rarely, because it looks at all entries."""
        if time.monotonic() >= self._forget_at:
            self._forget_at = time.monotonic() + _FORGET_SECONDS
            self._forget_removals(())

    def _forget_removals(self, merged: Collection[str]) -> set[bytes]:
        """Forget old removals of blocks that no segment lists. Their entries must go, too. Returns their keys.

        Args:
            merged: segments that are about to be removed.
        """
        if self.unread_problem is not None:
            return set()  # what was not read may list any block
        keys = self._blocks.old_removals()
        if keys:
            with self._lock:
                others = [segment.entries for name, segment in self._known.items() if name not in merged]
            for entries in others:
                keys.difference_update(entry.key for entry in entries if entry.event is Event.STORED)
        self._blocks.forget_removals(keys)
        return keys


def _due(small: Iterable[SegmentName]) -> list[SegmentName]:
    """Return the segments to merge: those of which there are many of about the same size.

    A segment grows by a factor with each merge, so that an entry is written and read a few times only.
    """
    by_size: dict[int, list[SegmentName]] = defaultdict(list)
    for name in small:
        by_size[max(name.n_entries, 1).bit_length() // _SIZE_BITS].append(name)
    return [name for names in by_size.values() if len(names) >= _MERGE_FROM for name in names]


class _Read:
    """Reads one segment."""

    def __init__(self, store: ObjectStore, codec: ObjectCodec, name: str) -> None:
        self._store, self._codec, self.name = store, codec, name

    def __call__(self) -> list[Entry]:
        return manifest.decode(self._store.get(self.name, manifest.MAX_SEGMENT_BYTES), self._codec)


def _newest(entries: Iterable[Entry]) -> list[Entry]:
    """Return one entry per block, and its latest use."""
    found: dict[tuple[bytes, bool], Entry] = {}
    for entry in entries:
        kind = (entry.key, entry.event is Event.USED)
        if kind not in found or found[kind].at < entry.at:
            found[kind] = entry
    return list(found.values())
