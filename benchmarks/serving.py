"""`erllama serve` against llama-server, with one client: speed, the cost of HTTP, a common prefix, and a restart.

`python -m benchmarks server`. Both get the same requests to `/completion`, from one client process. llama-server
keeps its prompts in memory, and loses them when it stops.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.engines import (
    N_BATCH,
    N_UBATCH,
    SHORT_PROMPT,
    HttpServer,
    Ours,
    Prompt,
    Prompts,
    Reply,
    Server,
    ask,
    ask_together,
    whole_cells,
)
from benchmarks.measure import Figure, Findings, Line, Plot, Setup, Target, in_turn
from erllama.testing.models import write_llama

CLIENTS = (1, 4, 8, 32)
N_SLOTS = 8  # of both servers; more clients wait


class OurServer(HttpServer):
    """`erllama serve`, in a separate process.

    Args:
        cache: its cache directory.
        more: further arguments.
    """

    name = "erllama serve"

    def __init__(
        self, setup: Setup, ours: Ours, n_ctx: int, n_slots: int, cache: Path, more: Sequence[str] = ()
    ) -> None:
        load = {"n_seq_max": n_slots, "n_batch": N_BATCH, "n_ubatch": N_UBATCH, "flash_attn": "true"}
        # fmt: off
        arguments = [
            sys.executable, "-m", "erllama", "serve", str(setup.model), "--host", "127.0.0.1",
            "--threads", str(setup.threads), "--n-ctx", str(n_ctx), "--n-gpu-layers", str(setup.gpu_layers),
            "--cache-dir", str(cache), "--access-log", "none",
            *(part for name, value in load.items() for part in ("--load", f"{name}={value}")), *more,
        ]
        # fmt: on
        super().__init__(arguments, ours)


def server(setup: Setup) -> Findings:
    """Compare the two servers with 1 to 32 clients, with agents of one prefix, and after a restart."""
    findings = Findings()
    with tempfile.TemporaryDirectory() as place:
        findings.add(_clients(setup, Path(place) / "clients"))
        findings.add(_agents(setup, Path(place) / "agents"))
        findings.add(_restart(setup, Path(place) / "restart"))
        tiny = replace(
            setup, model=write_llama(Path(place) / "tiny.gguf", quantization="Q8_0"), threads=1, real=False
        )
        findings.add(_cost(tiny, Path(place) / "cost"))
    return findings


def _pair(
    setup: Setup, opened: ExitStack, cache: Path, n_ctx: int, n_slots: int
) -> tuple[OurServer, Server, Prompts]:
    """Start both servers, and send each a short prompt."""
    with Ours(setup, 256) as vocabulary:
        ours = opened.enter_context(OurServer(setup, vocabulary, n_ctx, n_slots, cache))
        theirs = opened.enter_context(Server(setup, vocabulary, n_ctx, n_slots))
    prompts = Prompts(setup)
    for each in (ours, theirs):
        ask(each, prompts.of(SHORT_PROMPT), 8)
    return ours, theirs, prompts


def _rate(replies: Sequence[Reply]) -> float:
    """Return the tokens per second of replies together."""
    began, ended = min(reply.asked for reply in replies), max(reply.ended for reply in replies)
    return sum(reply.n_tokens for reply in replies) / (ended - began)


def _first(replies: Sequence[Reply]) -> float:
    """Return the median time to the first token."""
    return statistics.median(reply.pieces[0].at - reply.asked for reply in replies)


def _clients(setup: Setup, cache: Path) -> Findings:
    n_tokens, n_prompt = setup.of(64, 8), setup.of(64, SHORT_PROMPT)
    findings, lines = Findings(), []
    with ExitStack() as opened:
        ours, theirs, prompts = _pair(setup, opened, cache, N_SLOTS * whole_cells(n_prompt + n_tokens), N_SLOTS)
        points: dict[str, list[tuple[float, float]]] = {ours.name: [], theirs.name: []}
        for n_clients in CLIENTS[: setup.of(len(CLIENTS), 2)]:
            firsts: dict[str, list[float]] = {ours.name: [], theirs.name: []}

            def measure(engine: HttpServer, n: int = n_clients, firsts: dict[str, list[float]] = firsts) -> float:
                replies = ask_together(engine, prompts.many(n, n_prompt), n_tokens)
                firsts[engine.name].append(_first(replies))
                return _rate(replies)

            pair = in_turn(partial(measure, ours), partial(measure, theirs), setup.runs)
            clients = f"{n_clients} client{'s' if n_clients > 1 else ''}"
            commands = (ours.command, theirs.command)
            peer = f"llama-server -np {N_SLOTS}"
            findings.figures += [
                Figure(
                    f"server-rate-{n_clients}",
                    f"{clients} over HTTP, all tokens",
                    peer,
                    "tokens/s",
                    *pair,
                    Target(">=", 1.0),
                    commands,
                ),
                Figure(
                    f"server-first-{n_clients}",
                    f"{clients} over HTTP, first token of {n_prompt} tokens",
                    peer,
                    "s",
                    firsts[ours.name],
                    firsts[theirs.name],
                    None,
                    commands,
                ),
            ]
            for name in points:
                points[name].append((n_clients, statistics.median(firsts[name])))
        lines = [Line(name, values) for name, values in points.items()]
    findings.plots.append(
        Plot(
            "server-first", "Time to the first token over HTTP", "clients", "seconds", lines, log_x=True, log_y=True
        )
    )
    return findings


def _agents(setup: Setup, cache: Path) -> Findings:
    n, n_prefix, n_tail, n_tokens = N_SLOTS, setup.of(1024, 96), 32, setup.of(16, 4)
    with ExitStack() as opened:
        ours, theirs, prompts = _pair(setup, opened, cache, n * whole_cells(n_prefix + n_tail + n_tokens), n)
        rounds = [
            [[*prefix, 5 + at, *prompts.of(n_tail - 1)] for at in range(n)]
            for prefix in prompts.many(setup.runs, n_prefix)
        ]

        def measure(engine: HttpServer, left: list[list[Prompt]]) -> float:
            replies = ask_together(engine, left.pop(), n_tokens)
            return max(reply.ended for reply in replies) - min(reply.asked for reply in replies)

        pair = in_turn(partial(measure, ours, rounds.copy()), partial(measure, theirs, rounds.copy()), setup.runs)
        what = f"{n} agents at once over HTTP, one prefix of {n_prefix} tokens: wall time"
        commands = (ours.command, theirs.command)
        return Findings(
            [Figure("server-agents", what, f"llama-server -np {n}", "s", *pair, Target("<=", 0.5), commands)]
        )


def _restart(setup: Setup, cache: Path) -> Findings:
    """Compare the first token of a known prompt after both servers were stopped and started."""
    n_prompt = setup.of(2000, 300)
    n_ctx, prompt = whole_cells(n_prompt + 64), Prompts(setup).of(n_prompt)
    commands: list[str] = []

    def first(start: Callable[[], HttpServer]) -> float:
        with start() as engine:
            commands.append(engine.command)
            ask(engine, [4, 5, 6, 7], 2)
            return _first([ask(engine, prompt, 1)])

    with Ours(setup, 256) as vocabulary:
        start_ours = partial(OurServer, setup, vocabulary, n_ctx, 1, cache)
        start_theirs = partial(Server, setup, vocabulary, n_ctx, 1)
        with start_ours() as engine:
            ask(engine, prompt, 1)
        pair = in_turn(partial(first, start_ours), partial(first, start_theirs), setup.runs)
    what = f"first token of a known prompt of {n_prompt} tokens over HTTP, after a restart"
    shown = [next(each for each in commands if name in each) for name in ("erllama serve", "llama-server")]
    return Findings([Figure("server-restart", what, "llama-server", "s", *pair, Target("<=", 0.01), shown)])


def _cost(setup: Setup, cache: Path) -> Findings:
    """Compare the time per token of a tiny model, of which HTTP is a large part."""
    n_tokens, findings = setup.of(400, 16), Findings()
    with ExitStack() as opened:
        ours, theirs, prompts = _pair(setup, opened, cache, N_SLOTS * whole_cells(n_tokens + SHORT_PROMPT), N_SLOTS)
        for n_clients in (1, N_SLOTS):

            def measure(engine: HttpServer, n: int = n_clients) -> float:
                return 1e6 / _rate(ask_together(engine, prompts.many(n, SHORT_PROMPT), n_tokens))

            pair = in_turn(partial(measure, ours), partial(measure, theirs), setup.runs)
            clients = f"{n_clients} client{'s' if n_clients > 1 else ''}"
            findings.figures.append(
                Figure(
                    f"server-cost-{n_clients}",
                    f"{clients} over HTTP, a tiny model: time per token",
                    f"llama-server -np {N_SLOTS}",
                    "us",
                    *pair,
                    Target("<=", 1.0),
                    (ours.command, theirs.command),
                )
            )
    return findings


SCENARIOS: dict[str, Callable[[Setup], Findings]] = {"server": server}
