"""Scenarios of load: conversations that take turns, long prompts beside replies, and parked cells."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from typing import NamedTuple

from benchmarks.decoding import rates
from benchmarks.engines import (
    N_BATCH,
    SHORT_PROMPT,
    Engine,
    Ours,
    Piece,
    Prompt,
    Prompts,
    Server,
    ask,
    ask_together,
    whole_cells,
)
from benchmarks.measure import AbsentError, Figure, Findings, Line, Plot, Setup, Target, in_turn


def pingpong(setup: Setup) -> Findings:
    """Compare ten conversations that take turns on four slots. Each turn continues the last one.

    A turn sends the whole history. The time is that from the request to its last token, over all turns except the
    first of each conversation, which is cold on both sides.
    """
    n_talks, n_slots, n_turns = 10, 4, setup.of(4, 2)
    n_first, n_more, n_tokens = setup.of(400, 40), setup.of(40, 8), setup.of(16, 4)
    max_length = n_first + n_turns * (n_more + n_tokens)
    n_ctx = n_slots * whole_cells(max_length)
    prompts = Prompts(setup)
    computed: dict[str, list[int]] = {}

    def talk(engine: Engine, histories: list[Prompt], asked: list[list[Prompt]]) -> float:
        for history in histories:
            ask(engine, history, n_tokens)
        began, n_computed = time.perf_counter(), 0
        for turn in asked:
            for history, new_tokens in zip(histories, turn, strict=True):
                history += new_tokens
                n_computed += ask(engine, history, n_tokens).n_computed
        computed.setdefault(engine.name, []).append(n_computed)
        return time.perf_counter() - began

    def one_round() -> tuple[list[Prompt], list[list[Prompt]]]:
        return prompts.many(n_talks, n_first), [prompts.many(n_talks, n_more) for _ in range(n_turns)]

    with Ours(setup, n_ctx, n_seq_max=n_slots) as ours, Server(setup, ours, n_ctx, n_slots) as server:
        rounds = [one_round() for _ in range(setup.runs)]

        def with_next(engine: Engine) -> Callable[[], float]:
            own = [([list(history) for history in histories], asked) for histories, asked in rounds]
            return lambda: talk(engine, *own.pop())

        pair = in_turn(with_next(ours), with_next(server), setup.runs)
        each = {name: statistics.median(counts) for name, counts in computed.items()}
        return Findings(
            [
                Figure(
                    "pingpong",
                    f"{n_talks} conversations in turn on {n_slots} slots, {n_turns} more turns each: wall time",
                    f"llama-server -np {n_slots}",
                    "s",
                    *pair,
                    Target("<=", 1.0),
                    (f"{ours.command}.stream(history, max_tokens={n_tokens}, temperature=0)", server.command),
                    [
                        "prompt tokens computed in those turns: "
                        + ", ".join(f"{name} {count:.0f}" for name, count in each.items())
                        + f"; {n_talks * n_turns * n_more} of them are new",
                        "histories contain the questions but not the replies, so a turn differs from the last "
                        "context at the start of the reply",
                    ],
                )
            ]
        )


class Waits(NamedTuple):
    """Waits of streams while a prompt is prefilled, in seconds.

    Attributes:
        between: all waits of all streams for their next tokens.
        steady: the median of the waits before the prompt arrived.
        first: from the request with the prompt to its first token.
    """

    between: list[float]
    steady: float
    first: float


def waits(pieces: Iterable[Piece], after: float, before: float) -> list[float]:
    """Return the waits that overlap the time between two moments. A piece of n tokens counts as n waits."""
    each = list(pieces)
    return [
        (here.at - last.at) / max(1, here.n_tokens - last.n_tokens)
        for last, here in pairwise(each)
        if here.at > after and last.at < before
    ]


def beside_a_prompt(engine: Engine, prompts: Prompts, n_streams: int, n_prompt: int) -> Waits:
    """Send a long prompt while streams run."""
    enough = threading.Event()
    every: list[list[Piece]] = [[] for _ in range(n_streams)]
    callers = ThreadPoolExecutor(n_streams)
    streams = [callers.submit(engine.reply, prompts.of(SHORT_PROMPT), 1024, pieces, enough) for pieces in every]
    try:
        while min(len(pieces) for pieces in every) < 24:
            for stream in streams:
                if stream.done():
                    stream.result()  # raises what failed it
                    raise AbsentError(
                        f"{engine.name}: a stream ended before the prompt arrived; try a larger model"
                    )
            time.sleep(0.01)
        running = max(pieces[0].at for pieces in every)
        asked = time.perf_counter()
        read = ask(engine, prompts.of(n_prompt), 1).pieces[0].at
        time.sleep(0.1)
        if any(pieces[-1].at < asked for pieces in every):
            time.sleep(2)  # a stream that waited the whole time gets its next token here
    finally:
        enough.set()
        callers.shutdown()
    between = [wait for pieces in every for wait in waits(pieces, asked, read)]
    steady = statistics.median(wait for pieces in every for wait in waits(pieces, running, asked))
    return Waits(between, steady, read - asked)


def mixed(setup: Setup) -> Findings:
    """Compare the waits for a token of three streams and of a long prompt that arrives while they run.

    The library runs with its default chunks, and with smaller ones. llama-server fills a batch with the prompt, and
    its streams wait.
    """
    n_streams, n_prompt = 3, setup.of(2048, 256)
    n_ctx = (n_streams + 1) * whole_cells(max(n_prompt, 1024 + SHORT_PROMPT))
    prompts = Prompts(setup)
    chunks = [None, *(setup.of(size, size // 4) for size in (64, 128))]
    with ExitStack() as stack:
        with Ours(setup, 256) as vocabulary:
            server = stack.enter_context(Server(setup, vocabulary, n_ctx, n_streams + 1))

        def of_server() -> Waits:
            ask(server, prompts.of(SHORT_PROMPT), 4)
            return beside_a_prompt(server, prompts, n_streams, n_prompt)

        figures, lines = [], []
        for chunk in chunks:
            found: list[tuple[Waits, Waits]] = []
            for _ in range(setup.runs):
                theirs = of_server()
                # One model at a time: the threads of several models in one process slow each other down.
                options = {} if chunk is None else {"prefill_chunk_size": chunk}
                with Ours(setup, n_ctx, n_seq_max=n_streams + 1, **options) as ours:
                    ask(ours, prompts.of(SHORT_PROMPT), 4)
                    found.append((beside_a_prompt(ours, prompts, n_streams, n_prompt), theirs))
            steady = statistics.median(mine.steady for mine, _ in found)
            name, size = ("default", "default chunks") if chunk is None else (str(chunk), f"chunks of {chunk}")
            peer = f"llama-server -np {n_streams + 1}, batches of {min(N_BATCH, n_prompt)}"
            shown = (f"{ours.command}, {n_streams} streams and a prompt of {n_prompt} ids", server.command)
            figures += [
                Figure(
                    f"mixed-wait-{name}",
                    f"longest wait for a token while {n_prompt} tokens are prefilled, {size}",
                    peer,
                    "s",
                    [max(mine.between) for mine, _ in found],
                    [max(theirs.between) for _, theirs in found],
                    Target("<=", 0.333) if chunk is None else None,
                    shown,
                    [f"before the prompt arrived, a token took {1e3 * steady:.1f} ms"],
                ),
                Figure(
                    f"mixed-first-{name}",
                    f"first token of {n_prompt} tokens beside {n_streams} streams, {size}",
                    peer,
                    "s",
                    [mine.first for mine, _ in found],
                    [theirs.first for _, theirs in found],
                    Target("<=", 1.0) if chunk is None else None,
                    shown,
                ),
            ]
            lines.append(Line(f"erllama, {size}", _distribution([mine.between for mine, _ in found])))
        lines.append(Line("llama-server", _distribution([theirs.between for _, theirs in found])))
    title = f"Waits for a token while {n_prompt} tokens are prefilled"
    return Findings(figures, [Plot("mixed", title, "percent of tokens", "seconds", lines, log_y=True)])


def _distribution(runs: list[list[float]]) -> list[tuple[float, float]]:
    """Return the waits by rank, as 50 points of (percent, seconds)."""
    ordered = sorted(wait for run in runs for wait in run)
    return [(2.0 * i, ordered[min(len(ordered) * i // 50, len(ordered) - 1)]) for i in range(51)]


def parked(setup: Setup) -> Findings:
    """Measure the cost of parked cells, which finished requests leave for later ones, for four streams."""
    n_streams, n_parked, n_tokens = 4, 4, setup.of(64, 200)
    sizes = [setup.of(size, size // 20) for size in (1000, 2500)]
    prompts = Prompts(setup)
    n_ctx = max(sizes) + n_streams * (SHORT_PROMPT + n_tokens) + 512

    def speed(size: int, flash_attn: bool) -> float:
        # One model at a time: the threads of several models in one process slow each other down.
        options = {"flash_attn": flash_attn, "parked_cells": size, "n_seq_max": n_streams + n_parked}
        with Ours(setup, n_ctx, **options) as engine:
            shown[size, flash_attn] = engine.command
            ask_together(engine, prompts.many(n_streams, SHORT_PROMPT), n_tokens)  # warm-up
            engine.model.evict()
            for _ in range(n_parked if size else 0):
                ask(engine, prompts.of(size // n_parked - 2), 1)
            replies = ask_together(engine, prompts.many(n_streams, SHORT_PROMPT), n_tokens)
            return rates(replies).while_all

    shown: dict[tuple[int, bool], str] = {}
    figures = []
    for flash_attn in (True, False):
        attention = f"flash attention {'on' if flash_attn else 'off'}"
        for size in sizes:
            ours, theirs = in_turn(
                lambda size=size, flash_attn=flash_attn: speed(size, flash_attn),  # type: ignore[misc]
                lambda: speed(0, True),
                setup.runs,
            )
            figures.append(
                Figure(
                    f"parked-{size}" + ("" if flash_attn else "-without-flash-attention"),
                    f"{n_streams} streams beside {size} parked cells, {attention}",
                    "no parked cells, flash attention on",
                    "tokens/s",
                    ours,
                    theirs,
                    None,
                    (shown[size, flash_attn], shown[0, True]),
                )
            )
    return Findings(figures)


SCENARIOS: dict[str, Callable[[Setup], Findings]] = {"pingpong": pingpong, "mixed": mixed, "parked": parked}
