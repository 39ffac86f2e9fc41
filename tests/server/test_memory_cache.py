"""`serve --no-cache` keeps prompts in memory, and not beyond the end of the server."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import psutil
import pytest

from erllama.cli.server.memory_cache import memory_cache
from support.http_server import CHAT, chat_body, serve_command
from support.subprocesses import run_python


def test_the_directory_is_private_and_goes_with_the_cache(tmp_path: Path) -> None:
    with memory_cache({"ram": "1MiB", "disk": True}, tmp_path) as cache:
        (directory,) = tmp_path.iterdir()
        assert directory.stat().st_mode & 0o777 == 0o700
        assert [status.tier for status in cache.tiers()] == ["ram_file"]
    assert list(tmp_path.iterdir()) == []


def test_directories_of_killed_servers_alone_are_removed(tmp_path: Path) -> None:
    run_python(
        """
        import os, sys
        from pathlib import Path
        from erllama.cli.server.memory_cache import memory_cache

        with memory_cache({}, Path(sys.argv[1])):
            os.kill(os.getpid(), 9)
        """,
        tmp_path,
    )
    (left,) = tmp_path.iterdir()
    with memory_cache({}, tmp_path):
        (first,) = tmp_path.iterdir()
        assert first != left
        with memory_cache({}, tmp_path):
            assert len(list(tmp_path.iterdir())) == 2
        assert list(tmp_path.iterdir()) == [first]


def test_without_a_tmpfs_there_is_a_ram_tier(tmp_path: Path) -> None:
    with memory_cache({}, tmp_path / "none") as cache:
        assert cache.tier_names == ("ram",)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this system has no /dev/shm")
def test_a_server_without_a_cache_leaves_none(tmp_path: Path, tiny_gguf: Path) -> None:
    around = {"ERLLAMA_CACHE_DIR": ""}  # the variable would override the option
    with serve_command(
        tmp_path, tiny_gguf, "--no-cache", "--threads", 1, "--n-ctx", 512, environment=around
    ) as server:
        directories = {Path(file.path).parent for file in psutil.Process(server.process.pid).open_files()}
        (own,) = {each for each in directories if each.name.startswith(f"erllama-{os.geteuid()}-server-")}
        body = chat_body("the same words " * 20, max_tokens=1)
        details = [
            httpx.post(server.url + CHAT, json=body, timeout=60).json()["usage"]["prompt_tokens_details"]
            for _ in range(2)
        ]
        assert details[1]["cached_tokens"] > 0
        server.stop()
    assert not own.exists()
