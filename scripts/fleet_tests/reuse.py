"""Reuse: three replicas with separate caches reuse as much of the prompts as one large replica."""

from __future__ import annotations

import httpx

from scripts.fleet_tests.conversations import Conversation, Turn, converse, totals, with_client
from scripts.fleet_tests.environment import Environment

SHARE = 0.95  # of one replica's reused tokens


def test_reuse(environment: Environment) -> None:
    """Run the same conversations on one replica, and on three with each policy; compare the reused tokens."""
    found = {"one replica": run(environment, replicas=1, options_slots=12)}
    for policy in ("prefix", "round_robin", "random"):
        found[f"three, {policy}"] = run(environment, replicas=3, policy=policy)
    one = found["one replica"].cached
    for name, total in found.items():
        print(
            f"{name:20} prompt tokens {total.prompt:8} reused {total.cached:8} "
            f"({total.cached / total.prompt:.3f} of the prompts, {total.cached / one:.3f} of one replica)",
            flush=True,
        )
    assert found["three, prefix"].cached >= SHARE * one
    for policy in ("round_robin", "random"):
        assert found[f"three, {policy}"].cached < found["three, prefix"].cached


def run(environment: Environment, options_slots: int = 4, **options: object) -> Turn:
    """Return the totals of all conversations on a new fleet."""
    model = {"n_ctx": 16384, "n_threads": 1, "n_threads_batch": 1, "n_seq_max": options_slots}
    environment.deploy(options=model, **options)
    conversations = [Conversation(number) for number in range(environment.n_conversations)]

    async def work(client: httpx.AsyncClient) -> None:
        await converse(client, conversations, environment.n_turns, at_once=8, max_tokens=8)

    with_client(environment.port, work)
    print(f"  {options}: {environment.routing_counts()}", flush=True)
    return totals(conversations)
