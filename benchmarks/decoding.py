"""Scenarios of decoding: one stream against llama-bench, streams and agents against llama-server."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from benchmarks.engines import (
    SHORT_PROMPT,
    Engine,
    Ours,
    Prompt,
    Prompts,
    Reply,
    Server,
    ask,
    ask_together,
    llama_bench,
    whole_cells,
)
from benchmarks.measure import AbsentError, Figure, Findings, Line, Plot, Setup, Target, in_turn
from benchmarks.processes import answer, measure_in_process

REPEAT = 3  # repetitions within one run, in one process, after a warm-up


def one(setup: Setup) -> Findings:
    """Compare decode and prefill of one stream. Each run of both sides is a separate process that loads the model,
    since the speed varies by a few percent with the memory layout."""
    n_decode, n_prefill = setup.of(128, 16), setup.of(512, 64)
    findings = Findings()
    for what, sizes, bench, target in (
        # At the same depth: both sides decode after as many tokens, which attention reads for every token.
        ("decode", (SHORT_PROMPT, n_decode), ("-p", "0", "-n", str(n_decode), "-d", str(SHORT_PROMPT)), 0.98),
        ("prefill", (n_prefill, 0), ("-p", str(n_prefill), "-n", "0"), 0.97),
    ):
        shown = {"erllama": "", "llama-bench": shlex.join(["llama-bench", *bench])}

        def ours(sizes: tuple[int, int] = sizes, shown: dict[str, str] = shown) -> float:
            command, speeds = measure_in_process("decoding", setup, *sizes)
            shown["erllama"] = command
            return float(statistics.median(speeds))

        def theirs(bench: tuple[str, ...] = bench, shown: dict[str, str] = shown) -> float:
            command, speeds = llama_bench(setup, *bench, repeat=REPEAT)
            shown["llama-bench"] = command
            return statistics.median(speeds)

        pair = in_turn(ours, theirs, setup.runs)
        findings.figures.append(
            Figure(
                f"one-{what}",
                f"one stream, {what}",
                "llama-bench",
                "tokens/s",
                *pair,
                Target(">=", target),
                (shown["erllama"], shown["llama-bench"]),
                (f"{max(sizes)} tokens; each value is the median of {REPEAT} repetitions in one process",),
            )
        )
    return findings


def _measure_alone(setup: Setup, n_prompt: int, n_reply: int) -> tuple[str, list[float]]:
    """Run one stream of this library; return its command and the tokens per second of each repetition."""
    prompts = Prompts(setup)
    with Ours(setup, n_prompt + n_reply + 256) as engine:
        speeds = []
        for _ in range(REPEAT + 1):
            engine.model.evict()  # empties the context, as llama-bench does
            done = engine.model.complete(prompts.of(n_prompt), max_tokens=n_reply or 1, temperature=0)
            if n_reply:
                speeds.append(done.timings.decode_tokens / done.timings.decode)
            else:
                speeds.append(done.timings.prefill_tokens / done.timings.prefill)
        return f"{engine.command}.complete(ids, max_tokens={n_reply or 1}, temperature=0)", speeds[1:]


class Rates(NamedTuple):
    """Tokens per second of several streams together.

    Attributes:
        while_all: counted while all streams decode: from the first token of the last stream that starts to the last
            token of the first stream that ends.
        whole: all tokens, divided by the time from the requests to the last token of all.
    """

    while_all: float
    whole: float


def rates(replies: Sequence[Reply]) -> Rates:
    """Return the speed of streams.

    Raises:
        AbsentError: the streams did not all run at once.
    """
    opens = max(reply.pieces[0].at for reply in replies)
    closes = min(reply.ended for reply in replies)
    if closes <= opens:
        raise AbsentError(
            "one stream ended before another began, so they never all ran at once; try a larger model"
        )
    n_within = sum(
        max((p.n_tokens for p in reply.pieces if p.at <= closes), default=0)
        - max((p.n_tokens for p in reply.pieces if p.at <= opens), default=0)
        for reply in replies
    )
    wall = max(reply.ended for reply in replies) - min(reply.asked for reply in replies)
    return Rates(n_within / (closes - opens), sum(reply.n_tokens for reply in replies) / wall)


def streams(n: int, more: tuple[str, ...], target: Target | None, setup: Setup) -> Findings:
    """Compare the decoding of `n` concurrent streams without common prefixes, all tokens together."""
    n_tokens = setup.of(128, 48 if setup.real else 200)
    n_ctx = n * whole_cells(SHORT_PROMPT + n_tokens)
    prompts = Prompts(setup)
    found: dict[str, list[Rates]] = {}
    lengths: dict[str, set[int]] = {}

    def measure(engine: Engine, asked: list[list[Prompt]]) -> float:
        replies = ask_together(engine, asked.pop(), n_tokens)
        lengths.setdefault(engine.name, set()).update(reply.n_tokens for reply in replies)
        found.setdefault(engine.name, []).append(rates(replies))
        return found[engine.name][-1].while_all

    with Ours(setup, n_ctx, n_seq_max=n) as ours, Server(setup, ours, n_ctx, n, more) as server:
        same = [prompts.many(n, SHORT_PROMPT) for _ in range(setup.runs + 1)]
        ours_ask, theirs_ask = same.copy(), same.copy()
        measure(ours, ours_ask)  # warm-up
        measure(server, theirs_ask)
        found.clear()
        pair = in_turn(lambda: measure(ours, ours_ask), lambda: measure(server, theirs_ask), setup.runs)
        notes = [
            f"{name}: whole requests, from the start to the last token of all, "
            f"{statistics.median(rate.whole for rate in each):.1f} tokens/s; "
            f"tokens of each reply: {sorted(lengths[name])}"
            for name, each in found.items()
        ]
        peer = " ".join(["llama-server", "-np", str(n), *more])
        shown = f"{ours.command}.stream(ids, max_tokens={n_tokens}, temperature=0), in {n} threads"
        return Findings(
            [
                Figure(
                    f"streams-{n}" + "".join(more),
                    f"{n} streams, decode, all tokens together",
                    peer,
                    "tokens/s",
                    *pair,
                    target,
                    (shown, server.command),
                    notes,
                )
            ]
        )


def agents(setup: Setup) -> Findings:
    """Compare eight concurrent requests with a long common prefix and different tails."""
    n, n_prefix, n_tail, n_tokens = 8, setup.of(1024, 96), 32, setup.of(16, 4)
    n_ctx = n * whole_cells(n_prefix + n_tail + n_tokens)
    prompts = Prompts(setup)
    computed: dict[str, list[int]] = {}
    waited: dict[str, list[float]] = {}

    def measure(engine: Engine, asked: list[list[Prompt]]) -> float:
        replies = ask_together(engine, asked.pop(), n_tokens)
        computed.setdefault(engine.name, []).append(sum(reply.n_computed for reply in replies))
        waited.setdefault(engine.name, []).extend(reply.pieces[0].at - reply.asked for reply in replies)
        return max(reply.ended for reply in replies) - min(reply.asked for reply in replies)

    def round_of() -> list[Prompt]:
        prefix = prompts.of(n_prefix)
        return [[*prefix, 5 + at, *prompts.of(n_tail - 1)] for at in range(n)]

    with Ours(setup, n_ctx, n_seq_max=n) as ours, Server(setup, ours, n_ctx, n) as server:
        for engine in (ours, server):
            ask(engine, prompts.of(SHORT_PROMPT), 4)  # warm-up
        same = [round_of() for _ in range(setup.runs)]
        ours_ask, theirs_ask = same.copy(), same.copy()
        pair = in_turn(lambda: measure(ours, ours_ask), lambda: measure(server, theirs_ask), setup.runs)
        each = {name: sorted(set(counts)) for name, counts in computed.items()}
        figure = Figure(
            "agents",
            f"{n} agents at once, one prefix of {n_prefix} tokens, tails of {n_tail}: wall time",
            f"llama-server -np {n}",
            "s",
            *pair,
            Target("<=", 0.5),
            (f"{ours.command}.stream(ids, max_tokens={n_tokens}, temperature=0), in {n} threads", server.command),
            [
                f"prompt tokens computed: {_listed(each)}; the minimum is {n_prefix + n * n_tail}",
            ],
        )
        lines = [
            Line(name, [(100 * (at + 1) / len(times), seconds) for at, seconds in enumerate(sorted(times))])
            for name, times in waited.items()
        ]
        title = f"{n} agents with one prefix of {n_prefix} tokens: time to the first token"
        return Findings([figure], [Plot("agents", title, "percent of requests", "seconds", lines)])


def _listed(values: Mapping[str, object]) -> str:
    """Return "erllama 1280, llama-server 8448"; a peer that failed is absent."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


SCENARIOS: dict[str, Callable[[Setup], Findings]] = {
    "one": one,
    "streams-4": partial(streams, 4, (), Target(">=", 1.0)),
    "streams-8": partial(streams, 8, (), Target(">=", 1.0)),
    "streams-8-unified": partial(streams, 8, ("--kv-unified",), None),
    "agents": agents,
}

if __name__ == "__main__":
    answer(_measure_alone)
