"""Which directories hold a cache: nested caches are refused, and operators' commands open what is one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import erllama
from erllama.cache import Cache
from erllama.cache.admin.maintenance import CacheFiles
from erllama.cache.tiers.directory import CacheDirectory, is_cache
from support.storage.blocks import SIZE, save


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A closed cache directory with three blocks."""
    root = tmp_path / "kv"
    with Cache(block_size=SIZE, ram=0, disk=root, watch=False) as cache:
        save(cache, np.arange(3 * SIZE, dtype=np.int32))
    return root


def lose(root: Path, part: str) -> None:
    """Take one part of a cache away: what a deletion, a copy without empty directories, or both leave."""
    if part in ("index", "all but the blocks"):
        for path in root.glob("index.db*"):
            path.unlink()
    if part in ("partial", "all but the blocks"):
        for name in ("partial", "owners", "damaged"):
            shutil.rmtree(root / name)


@pytest.mark.parametrize("part", ["nothing", "index", "partial", "all but the blocks"])
def test_a_cache_that_lost_a_part_is_still_a_cache(root: Path, part: str) -> None:
    lose(root, part)
    assert is_cache(root)
    inner = root / "inner"
    with pytest.raises(erllama.CacheError, match="lies in the cache directory"):
        CacheDirectory(inner)
    assert not inner.exists()
    with pytest.raises(erllama.CacheError, match="holds the cache directory"):
        CacheDirectory(root.parent)
    with CacheFiles(root) as files:
        assert len(files.rows()) == 3
        assert files.verify() == []


def test_a_new_cache_without_blocks_is_a_cache(tmp_path: Path) -> None:
    CacheDirectory(tmp_path / "kv").leave()
    assert is_cache(tmp_path / "kv")


@pytest.mark.parametrize("content", [[], ["0001.dat"], ["0001.kvc"], ["index.html"]])
@pytest.mark.parametrize("writable", [True, False])
def test_a_folder_named_blocks_alone_is_not_a_cache(
    tmp_path: Path, content: list[str], writable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blocks").mkdir()
    for name in content:
        (tmp_path / "blocks" / name).touch()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and (writable or mode != os.W_OK))
    assert not is_cache(tmp_path)
    with pytest.raises(erllama.CacheError, match="holds no cache"):
        CacheFiles(tmp_path)
    CacheDirectory(tmp_path / "kv").leave()


def test_a_missing_directory_and_a_file_are_not_caches(tmp_path: Path) -> None:
    assert not is_cache(tmp_path / "missing")
    (tmp_path / "file").touch()
    assert not is_cache(tmp_path / "file")
