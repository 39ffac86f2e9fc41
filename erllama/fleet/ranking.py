"""The order in which a request tries replicas: by cached prefix and load, then by queue, then by chance."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from random import Random
from typing import NamedTuple

from erllama.fleet.loads import Load
from erllama.fleet.prefix_index import CachedPrefix

# What a cached token is worth that is read from a file or a bucket: less than one in memory, more than one to
# compute.
DISK_SHARE = 0.9


class Candidate(NamedTuple):
    """A replica that may get a request: what it has of the prompt, and its load."""

    replica: str
    cached: CachedPrefix
    load: Load


def score(candidate: Candidate, weight: float) -> float:
    """Return how well a replica suits a request, in tokens: what it has, minus what it has to compute before.

    Args:
        weight: of the tokens that it has to compute before.
    """
    fast, total = candidate.cached
    return fast + DISK_SHARE * (total - fast) - weight * candidate.load.tokens


def rank(candidates: Sequence[Candidate], weight: float, random: Random) -> list[list[str]]:
    """Return replicas from the best to the worst, in groups of at most two.

    Equal scores are ordered by the number of requests. Among replicas that are equal in both, two random ones form
    a group, so that the shorter queue at that moment decides between them: if all routers chose the same one, all
    cold prompts would go to it.
    """

    def order(candidate: Candidate) -> tuple[float, int]:
        return -score(candidate, weight), candidate.load.requests

    groups: list[list[str]] = []
    for _, equal in groupby(sorted(candidates, key=order), key=order):
        names = [candidate.replica for candidate in equal]
        random.shuffle(names)
        groups += [names[start : start + 2] for start in range(0, len(names), 2)]
    return groups
