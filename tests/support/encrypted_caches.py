"""Runs tests, and the child processes that they start, with caches that encrypt their directories.

ERLLAMA_TEST_KEY_FILE=FILE makes it the key file of every cache, tier and directory that a test opens without one.
`make test-encrypted` sets it.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from erllama.cache import Cache, FileTier
from erllama.cache.admin.maintenance import CacheFiles

VARIABLE = "ERLLAMA_TEST_KEY_FILE"


def encrypt_all(key_file: Path) -> None:
    """Make a file the key file of all caches that are opened without one."""
    for kind in (Cache, FileTier, CacheFiles):
        _set_default(kind, key_file)


def _set_default(kind: type, key_file: Path) -> None:
    original = kind.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def init(self: object, *arguments: object, **options: object) -> None:
        options.setdefault("key_file", key_file)
        original(self, *arguments, **options)

    kind.__init__ = init  # type: ignore[misc]


if name := os.environ.get(VARIABLE):
    encrypt_all(Path(name))
