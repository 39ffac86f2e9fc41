"""Many clients at once, most of them rude: no memory, no file and no slot is lost.

ERLLAMA_LOAD says how many requests there are; `make stress`: 10,000.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from pathlib import Path

import httpx
import psutil

import erllama
from erllama._runtime.printing import echo
from erllama.testing.scripted import write_scripted
from support.cli import SPECIAL, TEMPLATE
from support.engine_models import GatedBackend
from support.http_load import CLIENTS, run_clients, time_requests, whole
from support.http_server import running, serve_command
from support.threads import wait_until

N_REQUESTS = int(os.environ.get("ERLLAMA_LOAD", "150"))
N_CLIENTS = 64
# Caches and pools grow at first. A leak of one request's objects would exceed this many times.
_GROWTH = 64 << 20


def endless(tmp_path: Path) -> Path:
    letters = "abcdefghijklmnopqrstuvwxyz"
    follows = {"<|assistant|>": "a", **{letter: letters[(i + 1) % 26] for i, letter in enumerate(letters)}}
    return write_scripted(
        tmp_path / "endless.gguf", follows, special=SPECIAL, chat_template=TEMPLATE, n_ctx_train=65536
    )


def footprint(process: psutil.Process) -> tuple[int, int]:
    return process.memory_info().rss, process.num_fds()


def test_rude_clients_cost_neither_memory_nor_files_nor_slots(tmp_path: Path) -> None:
    options = ("--threads", 1, "--n-ctx", 4096, "--load", "n_seq_max=8", "--no-cache", "--access-log", "none")
    with serve_command(tmp_path, endless(tmp_path), *options, environment={"ERLLAMA_CACHE_DIR": ""}) as server:
        host, port = server.url.removeprefix("http://").split(":")
        address = (host, int(port))
        process = psutil.Process(server.process.pid)

        async def load(n_requests: int, seed: int) -> tuple[Counter[tuple[str, int]], list[float]]:
            done = asyncio.Event()
            timing = asyncio.create_task(time_requests(address, "/openapi.json", done))
            counts = await run_clients(address, n_requests, N_CLIENTS, seed)
            done.set()
            return counts, await timing

        asyncio.run(load(max(N_REQUESTS // 4, 100), 1))
        rss, n_files = footprint(process)
        counts, seconds = asyncio.run(load(N_REQUESTS, 2))
        for (name, status), n in sorted(counts.items()):
            echo(f"{name:12} {status:3} {n:6}")
        seconds.sort()
        echo(f"another endpoint: median {seconds[len(seconds) // 2]:.4f} s, slowest {seconds[-1]:.4f} s")
        assert counts["whole", 200] == sum(n for (name, _), n in counts.items() if name == "whole")
        assert counts["stream", 200] == sum(n for (name, _), n in counts.items() if name == "stream")
        assert not any(status >= 500 for _, status in counts)
        assert {status for name, status in counts if name == "huge"} <= {413, 0}
        assert all_slots_work(server.url)
        wait_until(lambda: footprint(process)[1] <= n_files)
        echo(f"memory {(footprint(process)[0] - rss) / 2**20:+.1f} MiB, files {footprint(process)[1] - n_files:+d}")
        assert footprint(process)[0] < rss + _GROWTH
        assert "Traceback" not in server.log.read_text()


def all_slots_work(url: str) -> bool:
    """Whether twice as many requests as there are slots are answered."""

    async def ask() -> list[int]:
        host, port = url.removeprefix("http://").split(":")
        return await asyncio.gather(*(whole((host, int(port)), random.Random(i)) for i in range(16)))

    return asyncio.run(ask()) == [200] * 16


def test_rude_clients_leave_no_task_behind() -> None:
    backend = GatedBackend()
    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache, n_seq_max=8) as model:
        with running(model) as server:
            tasks = server.tasks
            httpx.get(server.url + "/nothing", timeout=120)
            before = tasks()
            counts = asyncio.run(run_clients(server.address, 60, 16, 3))
            assert counts.total() == 60
            assert {name for name, _ in counts} == {client.__name__ for client in CLIENTS}
            wait_until(lambda: model.queue_depth + model.pending == 0)
            wait_until(lambda: tasks() <= before)
