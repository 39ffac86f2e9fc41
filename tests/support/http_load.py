"""Clients of a server that behave as clients do: they leave, read slowly, send too much, or send nonsense."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress

from support.http_server import chat_body, request_bytes

Address = tuple[str, int]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

# More than the default limit of a body, in its declared length alone.
_HUGE = 64 << 20


async def _ask(address: Address, rng: random.Random, request: bytes) -> Streams:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(request)
    with suppress(ConnectionError):
        await writer.drain()
    return reader, writer


def _prompt(rng: random.Random) -> str:
    # A few prefixes, so that some prompts are cached.
    return f"prefix {rng.randrange(5)} " * rng.randrange(1, 12) + str(rng.random())


async def _status(reader: asyncio.StreamReader) -> int:
    line = await reader.readline()
    return int(line.split()[1]) if line else 0


async def whole(address: Address, rng: random.Random) -> int:
    body = chat_body(_prompt(rng), max_tokens=rng.randrange(1, 20))
    reader, writer = await _ask(address, rng, request_bytes(body, headers={"connection": "close"}))
    status = await _status(reader)
    rest = await reader.read()
    writer.close()
    assert status != 200 or b'"finish_reason"' in rest
    return status


async def stream(address: Address, rng: random.Random) -> int:
    body = chat_body(_prompt(rng), max_tokens=rng.randrange(1, 20), stream=True)
    reader, writer = await _ask(address, rng, request_bytes(body, headers={"connection": "close"}))
    status = await _status(reader)
    rest = await reader.read()
    writer.close()
    assert status != 200 or b"data: [DONE]" in rest
    return status


async def leaving(address: Address, rng: random.Random) -> int:
    """Leave in the middle of a long answer, or before it."""
    body = chat_body(_prompt(rng), stream=rng.random() < 0.5)
    _, writer = await _ask(address, rng, request_bytes(body))
    await asyncio.sleep(rng.random() * 0.1)
    if rng.random() < 0.5:
        writer.transport.abort()
    else:
        writer.close()
    return 0


async def slow(address: Address, rng: random.Random) -> int:
    """Read a few bytes at a time, and leave."""
    body = chat_body(_prompt(rng), max_tokens=30, stream=True)
    reader, writer = await _ask(address, rng, request_bytes(body))
    for _ in range(20):
        if not await reader.read(rng.randrange(1, 50)):
            break
        await asyncio.sleep(0.01)
    writer.close()
    return 0


async def huge(address: Address, rng: random.Random) -> int:
    head = request_bytes(b"", headers={"content-length": str(_HUGE), "connection": "close"})
    reader, writer = await _ask(address, rng, head + b" " * rng.randrange(200000))
    status = await _status(reader)
    writer.transport.abort()
    return status


async def malformed(address: Address, rng: random.Random) -> int:
    choices: list[Callable[[], bytes]] = [
        lambda: request_bytes(rng.randbytes(200), headers={"connection": "close"}),
        lambda: request_bytes(b"[" * 5000, headers={"connection": "close"}),
        lambda: request_bytes({"messages": [{"role": 7}]}, headers={"connection": "close"}),
        lambda: rng.randbytes(100) + b"\r\n\r\n",
        lambda: request_bytes(json.dumps(chat_body()).encode(), headers={"content-length": "-1"}),
    ]
    reader, writer = await _ask(address, rng, rng.choice(choices)())
    writer.write_eof()
    status = await _status(reader)
    writer.transport.abort()
    return status


async def unfinished(address: Address, rng: random.Random) -> int:
    """Send a part of a request, and leave."""
    request = request_bytes(chat_body(_prompt(rng)))
    _, writer = await _ask(address, rng, request[: rng.randrange(len(request))])
    await asyncio.sleep(rng.random() * 0.02)
    writer.transport.abort()
    return 0


Client = Callable[[Address, random.Random], Coroutine[None, None, int]]
CLIENTS: tuple[Client, ...] = (whole, whole, stream, stream, leaving, leaving, slow, huge, malformed, unfinished)


async def run_clients(address: Address, n_requests: int, n_clients: int, seed: int) -> Counter[tuple[str, int]]:
    """Make requests, many at a time. Returns how often each kind of client got each status; 0 for none."""
    rng, counts = random.Random(seed), Counter[tuple[str, int]]()
    kinds = iter([rng.choice(CLIENTS) for _ in range(n_requests)])

    async def work(number: int) -> None:
        own = random.Random(seed * 1000 + number)
        for client in kinds:
            try:
                status = await client(address, own)
            except ConnectionError:
                assert client in (huge, malformed, leaving), client
                status = 0
            counts[client.__name__, status] += 1

    await asyncio.gather(*(work(number) for number in range(n_clients)))
    return counts


async def time_requests(address: Address, path: str, done: asyncio.Event) -> list[float]:
    """Return the seconds of requests for a cheap path, one every 20 ms, until the load is done."""
    seconds = []
    while not done.is_set():
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection(*address)
        writer.write(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
        assert await reader.read()
        seconds.append(time.perf_counter() - began)
        writer.close()
        await asyncio.sleep(0.02)
    return seconds
