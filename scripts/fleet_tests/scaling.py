"""Scaling from one replica to three under load: the new ones find their prefixes in the shared bucket."""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple

import httpx

from erllama.cache.blocks.key_file import create_key_file
from scripts.fleet_tests.conversations import Conversation, converse, send, with_client
from scripts.fleet_tests.environment import Environment, running_replicas

SHARE = 0.8  # of the prefix tokens
_N = 60
_SCALE_SECONDS = 600


class Counts(NamedTuple):
    """What a replica has done: tokens of prompts, and those of them from its context and from its cache."""

    prompt: int
    shared: int
    cached: int


async def replica_counts() -> dict[str, Counts]:
    """Return the counts of each running replica."""
    found = {}
    for name, started in (await running_replicas()).items():
        values = started.state.metrics.counts
        found[name] = Counts(values[1], values[2], values[3])
    return found


async def load_until_three(client: httpx.AsyncClient) -> None:
    """Send cold prompts until there are three replicas."""
    deadline, number = time.monotonic() + _SCALE_SECONDS, 1000
    while len(await replica_counts()) < 3:
        assert time.monotonic() < deadline, "the fleet did not scale to three replicas"
        each = [[{"role": "user", "content": f"Tell a story about {number + n} boats."}] for n in range(24)]
        number += 24
        await asyncio.gather(*(send(client, messages, 48) for messages in each))


def test_scaling(environment: Environment) -> None:
    """Run conversations on one replica, scale to three, and continue each conversation by one turn."""
    bucket, key_file = environment.directory / "bucket", environment.directory / "key"
    create_key_file(key_file)
    environment.deploy(
        max_replicas=3,
        target_requests=2,
        upscale_delay=2,
        cache={"disk": None, "remote": str(bucket), "remote_key_file": str(key_file)},
    )

    async def work(client: httpx.AsyncClient) -> None:
        conversations = [Conversation(number) for number in range(_N)]
        await converse(client, conversations, 2, at_once=1, max_tokens=8)
        first = set(await replica_counts())
        print(f"{_N} conversations of 2 turns on {len(first)} replica", flush=True)
        began = time.monotonic()
        await load_until_three(client)
        before = await replica_counts()
        print(f"three replicas after {time.monotonic() - began:.0f} s of load", flush=True)
        await converse(client, conversations, 1, at_once=24, max_tokens=8)
        after = await replica_counts()
        expected = sum(each.turns[-1].earlier for each in conversations) / sum(
            each.turns[-1].prompt for each in conversations
        )
        prompt = found = 0
        for name, counts in after.items():
            if name not in first and name in before:
                prompt += counts.prompt - before[name].prompt
                found += counts.shared + counts.cached - before[name].shared - before[name].cached
        assert prompt, "the new replicas got no requests"
        print(
            f"new replicas: {prompt} prompt tokens, about {prompt * expected:.0f} of them of earlier turns, "
            f"{found} found: {found / (prompt * expected):.3f}",
            flush=True,
        )
        assert found >= SHARE * prompt * expected

    with_client(environment.port, work)
