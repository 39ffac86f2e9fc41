"""Runs three replicas behind vllm-router and beside Dynamo's selection service, and prints where requests went.

    python -m scripts.router_tests --python ENVIRONMENT/bin/python

The environment has vllm-router and ai-dynamo-runtime. Exits with 1 if a request did not reach the replica that has
its prefix.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from scripts.router_tests.replicas import (
    BLOCK_SIZE,
    MODEL,
    Json,
    Replica,
    ask,
    conversation,
    free_ports,
    rendered,
)

_N = 3
_ROUTED = 0.9  # the fraction of a prompt that only the replica with its prefix has
_SECONDS = 60.0


class Failures:
    """Prints each check, and counts those that fail."""

    def __init__(self) -> None:
        self.count = 0

    def check(self, what: str, passed: bool, seen: object) -> None:
        self.count += not passed
        print(f"{'ok  ' if passed else 'FAIL'} {what}: {seen}", flush=True)


@contextmanager
def started_router(python: Path, replicas: Sequence[Replica], log: Path) -> Iterator[str]:
    """Start vllm-router in front of replicas, and yield its URL."""
    port = free_ports(2)
    command = [str(python.parent / "vllm-router"), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-port", str(port + 1), "--policy", "kv_aware"]
    command += ["--kv-event-block-size", str(BLOCK_SIZE), "--kv-event-model", MODEL]
    for each in replicas:
        command += ["--kv-event-source", f"{each.url}={each.events}"]
        command += ["--kv-event-replay-source", f"{each.url}={each.replays}"]
    command += ["--worker-urls", *(each.url for each in replicas)]
    with log.open("wb") as output:
        router = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until(lambda: _answers(f"{url}/health"), f"vllm-router did not start; see {log}")
        yield url
    finally:
        router.terminate()
        router.wait(30)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True


def _wait_until(condition: Callable[[], bool], message: str) -> None:
    deadline = time.monotonic() + _SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(message)
        time.sleep(0.5)


class Selection:
    """Dynamo's selection service in a process of its environment."""

    def __init__(self, python: Path, log: IO[bytes]) -> None:
        script = Path(__file__).with_name("dynamo_selection.py")
        self._process = subprocess.Popen(
            [str(python), str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )

    def __enter__(self) -> Selection:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _call(self, request: Json) -> object:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def register(self, number: int, replica: Replica, *, again: bool = False) -> None:
        """Register a replica; again, after it has restarted: the service ignores lower numbers of batches."""
        worker = {"worker_id": number, "endpoint": replica.url, "block_size": BLOCK_SIZE, "total_kv_blocks": 10_000}
        worker |= {"events": replica.events, "replay_endpoint": replica.replays}
        self._call({"worker": worker, "again": again})

    def holders(self, token_ids: list[int]) -> list[int]:
        """Return the numbers of the replicas that have most of a prompt, and the selected one if it has it."""
        found = self._call({"token_ids": token_ids})
        assert isinstance(found, dict)
        names = ("device_blocks", "host_pinned_blocks", "disk_blocks")
        enough = found["n_blocks"] * _ROUTED - BLOCK_SIZE / 16
        holders = [each["worker_id"] for each in found["workers"] if max(each[name] for name in names) >= enough]
        return holders if not holders or found["selected"] in holders else [-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="the environment's interpreter")
    python = parser.parse_args().python
    failures = Failures()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        replicas = [Replica(folder / f"replica-{number}") for number in range(_N)]
        for each in replicas:
            stack.callback(each.stop)
            each.wait()
        _run(python, replicas, folder, failures, stack)
    sys.exit(failures.count > 0)


def _run(python: Path, replicas: list[Replica], folder: Path, failures: Failures, stack: ExitStack) -> None:
    chats = [conversation(number) for number in range(_N)]
    for replica, chat in zip(replicas, chats, strict=True):
        ask(replica.url, chat)
    url = stack.enter_context(started_router(python, replicas, folder / "router.log"))
    dynamo = stack.enter_context(Selection(python, stack.enter_context((folder / "dynamo.log").open("wb"))))
    for number, replica in enumerate(replicas):
        dynamo.register(number, replica)
    tokens = [rendered(replicas[0].url, chat) for chat in chats]

    def expect(what: str, owners: list[list[int]]) -> None:
        _wait_for_dynamo(dynamo, tokens, owners)
        found = [dynamo.holders(each) for each in tokens]
        failures.check(f"Dynamo, {what}", found == owners, found)
        reused = [round(ask(url, chat), 2) for chat in chats]
        wanted = [owner for owner in owners if owner]
        failures.check(f"vllm-router, {what}", sum(each >= _ROUTED for each in reused) >= len(wanted), reused)

    expect("subscribers that connect late", [[0], [1], [2]])
    replicas[0].evict()
    ask(replicas[1].url, chats[0])
    expect("after an eviction, with the prompt at another replica", [[1], [1], [2]])
    replicas[2].kill()
    replicas[2].start()
    replicas[2].wait()
    dynamo.register(2, replicas[2], again=True)
    expect("after a restart", [[1], [1], [2]])


def _wait_for_dynamo(dynamo: Selection, tokens: list[list[int]], owners: list[list[int]]) -> None:
    """Wait until the events have arrived, which takes a while on a busy machine."""
    deadline = time.monotonic() + _SECONDS
    while [dynamo.holders(each) for each in tokens] != owners and time.monotonic() < deadline:
        time.sleep(0.5)


if __name__ == "__main__":
    main()
