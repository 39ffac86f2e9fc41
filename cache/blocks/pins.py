"""Pins: prefixes whose blocks stay stored, as callers see them and as the index of a directory stores them.

A pin protects its blocks by their keys, so several pins may share a block. A block that was lost is protected again
as soon as it is stored again.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from erllama.cache.blocks.block import MAX_POSITION, Block
from erllama.cache.blocks.keys import KEY_BYTES
from erllama.errors import OptionError, PinError

MAX_NAME = 200  # characters of a name
_END_BYTES = 8
_ENTRY_BYTES = KEY_BYTES + _END_BYTES


class PrefixNotStored(PinError):  # noqa: N818
    """A prefix cannot be pinned, because the cache lacks a part of it. Computing the prefix may store it."""


@dataclass(frozen=True, slots=True)
class Pin:
    """A pinned prefix.

    Attributes:
        name: its name, unique in the cache.
        model: the id of the model that computed it.
        n_tokens: tokens of the prefix.
        n_bytes: bytes of its blocks that are stored. Blocks that several pins share count for each of them.
        expires: when it ends, in seconds since 1970; None if it does not.
        created: when it was created or replaced, in seconds since 1970.
        n_stored: tokens from the first one on that are stored and protected. Fewer than `n_tokens` if a block was
            lost or damaged, or if older pins take all the bytes that pins may protect.
    """

    name: str
    model: str
    n_tokens: int
    n_bytes: int
    expires: float | None
    created: float
    n_stored: int

    @property
    def complete(self) -> bool:
        """Whether the whole prefix is stored and protected."""
        return self.n_stored == self.n_tokens

    def as_plain(self) -> dict[str, str | int | float | None]:
        """Return the attributes as numbers and texts, by the names that commands and servers print."""
        return {
            "name": self.name,
            "model": self.model,
            "tokens": self.n_tokens,
            "stored_tokens": self.n_stored,
            "bytes": self.n_bytes,
            "created": self.created,
            "expires": self.expires,
        }


class PinnedBlock(NamedTuple):
    """The key of a block that a pin protects, and the position after its last token."""

    key: bytes
    end: int


@dataclass(frozen=True)  # without slots, so that `keys` is computed once
class PinRecord:
    """A pin as the index of a directory stores it.

    Attributes:
        name, model, n_tokens, created, expires: as in `Pin`.
        model_key: root key of the model's blocks without a salt or adapters, which identifies the model.
        blocks: the protected blocks, by their ends.
    """

    name: str
    model: str
    model_key: bytes
    n_tokens: int
    blocks: tuple[PinnedBlock, ...]
    created: float
    expires: float | None

    @cached_property
    def keys(self) -> frozenset[bytes]:
        """The keys of the protected blocks."""
        return frozenset(block.key for block in self.blocks)

    def expired(self, now: float) -> bool:
        """Return whether the pin has ended at a time, in seconds since 1970."""
        return self.expires is not None and self.expires <= now

    def n_stored(self, stored: Container[bytes]) -> int:
        """Return how many tokens, from the first one on, are in blocks whose keys are in `stored`."""
        end = 0
        for block in self.blocks:
            if block.key not in stored:
                return min(end, self.n_tokens)
            end = block.end
        return self.n_tokens

    def describe(self, sizes: Mapping[bytes, int], protected: Container[bytes]) -> Pin:
        """Return the pin as callers see it.

        Args:
            sizes: bytes of each stored block, by key.
            protected: keys of the blocks that are stored and protected.
        """
        n_bytes = sum(sizes.get(block.key, 0) for block in self.blocks)
        stored = self.n_stored(protected)
        return Pin(self.name, self.model, self.n_tokens, n_bytes, self.expires, self.created, stored)


def pinned_blocks(blocks: Iterable[Block]) -> tuple[PinnedBlock, ...]:
    """Return each block once, ordered by its end."""
    return tuple(sorted({PinnedBlock(block.key, block.end) for block in blocks}, key=lambda block: block.end))


def pack_blocks(blocks: Sequence[PinnedBlock]) -> bytes:
    """Return blocks as bytes: for each one its key, and its end as little-endian u64."""
    return b"".join(block.key + block.end.to_bytes(_END_BYTES, "little") for block in blocks)


def unpack_blocks(raw: bytes) -> tuple[PinnedBlock, ...]:
    """Return the blocks that `pack_blocks` was called with.

    Raises:
        ValueError: the bytes are not those of blocks.
    """
    if not raw or len(raw) % _ENTRY_BYTES:
        raise ValueError(f"{len(raw)} bytes are not a list of blocks")
    entries = (raw[at : at + _ENTRY_BYTES] for at in range(0, len(raw), _ENTRY_BYTES))
    blocks = tuple(PinnedBlock(each[:KEY_BYTES], int.from_bytes(each[KEY_BYTES:], "little")) for each in entries)
    if any(block.end >= MAX_POSITION for block in blocks):
        raise ValueError("a position is out of range")
    return blocks


def admitted_pins(
    pins: Iterable[PinRecord], sizes: Mapping[bytes, int], quota: int, now: float
) -> tuple[list[PinRecord], int]:
    """Return the pins that are in effect, and the bytes that they protect. Shared blocks count once.

    The oldest pins come first. A pin whose blocks would exceed `quota` together with those of older pins protects
    no block: the quota was larger when it was created, or its blocks were not stored then.

    Args:
        sizes: bytes of each stored block, by key.
        quota: maximum bytes that pins may protect.
        now: in seconds since 1970.
    """
    admitted: list[PinRecord] = []
    counted: set[bytes] = set()
    total = 0
    for pin in sorted(pins, key=lambda pin: (pin.created, pin.name)):
        if pin.expired(now):
            continue
        new = pin.keys - counted
        n_bytes = sum(sizes.get(key, 0) for key in new)
        if total + n_bytes <= quota:
            admitted.append(pin)
            counted |= new
            total += n_bytes
    return admitted, total


def check_pin_name(name: object) -> str:
    """Return a name of a pin.

    Raises:
        OptionError: it is not a text of 1 to 200 printable characters.
    """
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise OptionError(f"name={name!r:.100}; pass a text of 1 to {MAX_NAME} printable characters")
    return name
