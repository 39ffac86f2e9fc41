"""Damages the bytes of files, for tests and their children."""

from __future__ import annotations

import random


def corrupted(content: bytes, seed: int, header: int) -> bytes:
    """Return a file with a flipped bit, random bytes or an extreme number in its first `header` bytes."""
    dice, found = random.Random(seed), bytearray(content)
    if seed % 3 == 0:
        found[dice.randrange(header)] ^= 1 << dice.randrange(8)
    elif seed % 3 == 1:
        for _ in range(dice.randrange(1, 5)):
            found[dice.randrange(header)] = dice.randrange(256)
    else:
        at, n = dice.randrange(header), dice.choice([1, 2, 4, 8])
        found[at : at + n] = bytes([dice.choice([0, 1, 0x7F, 0x80, 0xFF])]) * n
    return bytes(found)
