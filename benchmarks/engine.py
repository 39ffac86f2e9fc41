"""How fast the engine is, beside llama.cpp's own tools: each number a ratio of two things measured in turn.

    python benchmarks/engine.py one --model model.gguf
    python benchmarks/engine.py streams --n 4 --model model.gguf
    python benchmarks/engine.py agents --model model.gguf
    python benchmarks/engine.py stall --model model.gguf
    python benchmarks/engine.py parked --model model.gguf

`one` measures one stream, decode and prefill, against llama-bench; `streams` the decode of several streams
at once, and `agents` requests that begin alike, against llama-server. `stall` tells how long streams wait
while a long prompt is read, `parked` what the cells of finished requests cost those that run.

llama-bench and llama-server come from `scripts/build_llama.sh --peers`, which is run if --peers does not name
its directory: the same source, flags and backend as the library. Both sides get the same model, threads,
context, batch sizes and flash attention; prompts are token ids, no two alike. Models of a size are written
by `python -m erllama.testing.models`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shlex
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol

import numpy as np

import erllama
from erllama.llama_ffi import build_info

N_BATCH, N_UBATCH = 2048, 512  # the defaults of both sides, said to both all the same
SHORT_PROMPT = 16
PEERS = "scripts/build_llama.sh --peers"
SERVER_START_SECONDS = 300

Prompt = list[int]


class Piece(NamedTuple):
    """When a piece of a reply came, on the clock of time.perf_counter, and the tokens that had come with it."""

    at: float
    n_tokens: int


class Reply(NamedTuple):
    """One reply as its caller saw it.

    `n_computed` is the prompt tokens that were computed for it, and `decode_seconds` the time from its
    first token to its last, both as the engine itself tells them.
    """

    asked: float
    pieces: list[Piece]
    n_computed: int
    decode_seconds: float

    @property
    def n_tokens(self) -> int:
        return self.pieces[-1].n_tokens

    @property
    def ended(self) -> float:
        return self.pieces[-1].at


class Engine(Protocol):
    """What runs requests: this library in this process, or a server."""

    name: str
    command: str

    def reply(self, prompt: Prompt, n_tokens: int, pieces: list[Piece], enough: threading.Event) -> Reply | None:
        """A greedy reply of `n_tokens`, its pieces appended as they come; None if `enough` ended it early."""


class Ours:
    """This library."""

    name = "ours"

    def __init__(self, model_path: Path, threads: int, n_ctx: int, **options: object) -> None:
        given: dict[str, object] = {
            "n_ctx": n_ctx,
            "n_threads": threads,
            "n_batch": N_BATCH,
            "n_ubatch": N_UBATCH,
            "flash_attn": True,
        } | options
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
        self.command = f"erllama.load_model({str(model_path)!r}, cache=erllama.Cache(), {shown})"
        self.cache = erllama.Cache()
        try:
            self.model = erllama.load_model(model_path, cache=self.cache, **given)  # type: ignore[arg-type]
        except BaseException:
            self.cache.close()
            raise

    def reply(self, prompt: Prompt, n_tokens: int, pieces: list[Piece], enough: threading.Event) -> Reply | None:
        asked = time.perf_counter()
        n_come = 0
        with self.model.stream(prompt, max_tokens=n_tokens, temperature=0) as stream:
            for event in stream:
                if enough.is_set():
                    return None
                if isinstance(event, erllama.TextDelta):
                    n_come += len(event.tokens)
                    pieces.append(Piece(time.perf_counter(), n_come))
            done = stream.result()
        return Reply(asked, pieces, done.timings.prefill_tokens, done.timings.decode)

    def __enter__(self) -> Ours:
        return self

    def __exit__(self, *_: object) -> None:
        self.model.unload()
        self.cache.close()


class Server:
    """llama-server in a process of its own, ended when left; with the threads and context of `ours`.

    It fails replies that are no UTF-8, which a model of random weights soon makes: tokens that are no text by
    themselves are forbidden it. `ignore_eos` has it look through a list of forbidden tokens anyway.
    """

    name = "llama-server"

    def __init__(self, given: argparse.Namespace, ours: Ours, n_ctx: int, n_slots: int) -> None:
        tools, threads = peers(given.peers), str(given.threads)
        n_vocab = ours.model.n_vocab
        self._forbidden = [[id, False] for id in range(n_vocab) if ours.model.detokenize([id]) == "\ufffd"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        # fmt: off
        arguments = [
            str(tools / "bin" / "llama-server"), "-m", str(given.model), "--host", "127.0.0.1",
            "--port", str(self.port), "-t", threads, "-tb", threads, "-c", str(n_ctx), "-np", str(n_slots),
            "-b", str(N_BATCH), "-ub", str(N_UBATCH), "-fa", "on", *shlex.split(given.server_args),
        ]
        # fmt: on
        self.command = shlex.join(arguments)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + SERVER_START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            try:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except (OSError, http.client.HTTPException):
                pass
            finally:
                connection.close()
            time.sleep(0.2)
        self._log.seek(0)
        raise SystemExit(
            f"llama-server did not start: {self.command}\n{self._log.read()[-3000:].decode(errors='replace')}"
        )

    def reply(self, prompt: Prompt, n_tokens: int, pieces: list[Piece], enough: threading.Event) -> Reply | None:
        asked = time.perf_counter()
        # fmt: off
        body = json.dumps({
            "prompt": prompt, "n_predict": n_tokens, "temperature": 0, "ignore_eos": True,
            "cache_prompt": True, "stream": True, "logit_bias": self._forbidden,
        })
        # fmt: on
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        try:
            connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"llama-server answered {response.status}: {response.read().decode()}")
            came: list[tuple[float, bytes]] = []
            # Only stamped here, and understood below: reading JSON would take time from the server's threads.
            while chunk := response.read1(1 << 16):
                if enough.is_set():
                    return None
                came.append((time.perf_counter(), chunk))
                pieces.append(Piece(came[-1][0], len(came)))
        finally:
            connection.close()
        return self._read(asked, came)

    @staticmethod
    def _read(asked: float, came: list[tuple[float, bytes]]) -> Reply:
        pieces: list[Piece] = []
        line, last = b"", {}
        for at, chunk in came:
            *lines, line = (line + chunk).split(b"\n")
            for text in lines:
                if text.startswith(b"data: "):
                    last = json.loads(text.removeprefix(b"data: "))
                    if "tokens_predicted" not in last:
                        raise RuntimeError(f"llama-server failed: {last}")
                    if not pieces or last["tokens_predicted"] > pieces[-1].n_tokens:  # the last event repeats
                        pieces.append(Piece(at, last["tokens_predicted"]))
        timings = last["timings"]
        return Reply(asked, pieces, timings["prompt_n"], timings["predicted_ms"] / 1e3)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None = None,
        _value: BaseException | None = None,
        _traceback: TracebackType | None = None,
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class Prompts:
    """Prompts of random ids, no two alike, so that nothing is found in a cache but what is meant to be."""

    def __init__(self) -> None:
        self._dice = np.random.default_rng(1)

    def of(self, n_tokens: int) -> Prompt:
        ids: Prompt = self._dice.integers(5, 2000, n_tokens).tolist()
        return ids

    def many(self, n: int, n_tokens: int) -> list[Prompt]:
        return [self.of(n_tokens) for _ in range(n)]


def whole_cells(n_tokens: int) -> int:
    """Cells for a sequence, as many as llama-server gives a slot, which must hold it with one to spare."""
    return (n_tokens // 256 + 1) * 256


def ask(engine: Engine, prompt: Prompt, n_tokens: int) -> Reply:
    found = engine.reply(prompt, n_tokens, [], threading.Event())
    assert found is not None
    return found


def ask_together(engine: Engine, prompts: Sequence[Prompt], n_tokens: int) -> list[Reply]:
    """Replies to prompts that are all asked at one moment."""
    replies: list[Reply | None] = [None] * len(prompts)
    gate = threading.Barrier(len(prompts))

    def one(at: int) -> None:
        gate.wait()
        replies[at] = ask(engine, prompts[at], n_tokens)

    callers = [threading.Thread(target=one, args=(at,)) for at in range(len(prompts))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    found = [reply for reply in replies if reply is not None]
    if len(found) < len(prompts):
        raise SystemExit(f"{engine.name}: {len(prompts) - len(found)} of {len(prompts)} requests failed; see above")
    return found


def in_turn(first: Callable[[], float], second: Callable[[], float], runs: int) -> tuple[list[float], list[float]]:
    """What both give, run by run, who goes first changing each time."""
    ours: list[float] = []
    theirs: list[float] = []
    for run in range(runs):
        order = [(ours, first), (theirs, second)]
        for values, measure in order if run % 2 else order[::-1]:
            values.append(measure())
    return ours, theirs


def spread(values: Sequence[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def report(what: str, unit: str, ours: list[float], theirs: list[float], name: str) -> None:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(f"{what}: {spread(ratios, 3)} of {name}'s, median of {len(ratios)} pairs")
    print(f"  ours {spread(ours)} {unit}; {name} {spread(theirs)} {unit}")


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commands(*shown: str) -> None:
    for line in shown:
        print(f"  $ {line}")


def peers(given: Path | None) -> Path:
    """The directory of llama.cpp's tools; built, if they are not yet, for the backend of the library."""
    if given is not None:
        if not (given / "bin" / "llama-server").exists():
            raise SystemExit(f"--peers {given} holds no bin/llama-server; give what `{PEERS}` printed")
        return given
    script = Path(__file__).resolve().parent.parent / "scripts" / "build_llama.sh"
    command = [str(script), "--peers", "--backend", build_info()["backend"]]
    built = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if built.returncode:
        raise SystemExit(f"{shlex.join(command)} failed: see above")
    found = Path(built.stdout.strip())
    if (source := json.loads((found / "build.json").read_text())["source"]) != build_info()["source"]:
        print(f"note: the library is of {build_info()['source']}, the tools are of {source}")
    return found


# --- what is measured ---------------------------------------------------------------------


def one(given: argparse.Namespace) -> None:
    """One stream against llama-bench: decode after a short prompt, and prefill of a prompt never seen."""
    tools = peers(given.peers)
    prompts = Prompts()

    def bench(*what: str) -> list[str]:
        # fmt: off
        return [
            str(tools / "bin" / "llama-bench"), "-m", str(given.model), *what, "-fa", "1", "-t", str(given.threads),
            "-b", str(N_BATCH), "-ub", str(N_UBATCH), "-r", "1", "-o", "json",
        ]
        # fmt: on

    def measured(command: list[str]) -> float:
        finished = subprocess.run(command, capture_output=True, check=False)
        if finished.returncode:
            raise SystemExit(f"{shlex.join(command)} failed:\n{finished.stderr[-3000:].decode(errors='replace')}")
        (row,) = json.loads(finished.stdout)
        return float(row["avg_ts"])

    def ours() -> Ours:
        return Ours(given.model, given.threads, SHORT_PROMPT + given.tokens + given.prompt + 256)

    lengths: set[int] = set()
    shown: set[str] = set()

    # Loaded anew for each run, as llama-bench is, and, as there, one short run goes before the one that counts:
    # speed differs by some percent with where memory happens to lie.
    def decode() -> float:
        with ours() as engine:
            shown.add(engine.command)
            engine.model.complete(prompts.of(SHORT_PROMPT), max_tokens=2, temperature=0)
            done = engine.model.complete(prompts.of(SHORT_PROMPT), max_tokens=given.tokens, temperature=0)
            lengths.add(len(done.tokens))
            return float(done.timings.decode_tokens / done.timings.decode)

    def prefill() -> float:
        with ours() as engine:
            engine.model.complete(prompts.of(given.prompt), max_tokens=1, temperature=0)
            done = engine.model.complete(prompts.of(given.prompt), max_tokens=1, temperature=0)
            assert done.timings.prefill_tokens == given.prompt, done.timings
            return float(done.timings.prefill_tokens / done.timings.prefill)

    tg = bench("-p", "0", "-n", str(given.tokens))
    pp = bench("-p", str(given.prompt), "-n", "0")
    report("one stream, decode", "tokens/s", *in_turn(decode, lambda: measured(tg), given.runs), "llama-bench")
    (command,) = shown
    print(f"  tokens of our replies: {sorted(lengths)}, of {given.tokens} asked for")
    commands(f"{command}.complete(ids, max_tokens={given.tokens}, temperature=0)", shlex.join(tg))
    report("prefill", "tokens/s", *in_turn(prefill, lambda: measured(pp), given.runs), "llama-bench")
    commands(f"{command}.complete(ids, max_tokens=1, temperature=0)", shlex.join(pp))


class Rates(NamedTuple):
    """Tokens a second of several streams together.

    Attributes:
        while_all: counted while every stream decodes: from the moment the last of them has its first token
            to the moment the first of them has its last.
        whole: all tokens, over the time from the requests to the last token of all.
        by_own_clock: the sum of what the engine itself says of each stream, first token to last.
    """

    while_all: float
    whole: float
    by_own_clock: float


def rates(replies: Sequence[Reply]) -> Rates:
    opens = max(reply.pieces[0].at for reply in replies)
    closes = min(reply.ended for reply in replies)
    if closes <= opens:
        raise SystemExit("one stream ended before another began: they never all ran at once; ask for more --tokens")
    n_within = sum(
        max((p.n_tokens for p in reply.pieces if p.at <= closes), default=0)
        - max((p.n_tokens for p in reply.pieces if p.at <= opens), default=0)
        for reply in replies
    )
    wall = max(reply.ended for reply in replies) - min(reply.asked for reply in replies)
    return Rates(
        n_within / (closes - opens),
        sum(reply.n_tokens for reply in replies) / wall,
        sum((reply.n_tokens - reply.pieces[0].n_tokens) / reply.decode_seconds for reply in replies),
    )


def streams(given: argparse.Namespace) -> None:
    """Decode of several streams at once, all tokens together, against llama-server."""
    n_ctx = given.n * whole_cells(SHORT_PROMPT + given.tokens)
    prompts = Prompts()
    lengths: dict[str, set[int]] = {}
    found: dict[str, list[Rates]] = {}

    def measure(engine: Engine, asked: list[list[Prompt]]) -> float:
        replies = ask_together(engine, asked.pop(), given.tokens)
        lengths.setdefault(engine.name, set()).update(reply.n_tokens for reply in replies)
        found.setdefault(engine.name, []).append(rates(replies))
        return found[engine.name][-1].while_all

    with (
        Ours(given.model, given.threads, n_ctx, n_seq_max=given.n) as ours,
        Server(given, ours, n_ctx, given.n) as server,
    ):
        same = [prompts.many(given.n, SHORT_PROMPT) for _ in range(given.runs + 1)]
        ours_ask, theirs_ask = same.copy(), same.copy()
        measure(ours, ours_ask)  # the first run of each warms it up
        measure(server, theirs_ask)
        found.clear()
        pairs = in_turn(lambda: measure(ours, ours_ask), lambda: measure(server, theirs_ask), given.runs)
        report(f"{given.n} streams, decode, while all of them decode", "tokens/s", *pairs, server.name)
        for what, field in (("whole requests", "whole"), ("by own clocks", "by_own_clock")):
            a, b = ([getattr(rate, field) for rate in found[engine.name]] for engine in (ours, server))
            report(f"{given.n} streams, {what}", "tokens/s", a, b, server.name)
        for name, found_lengths in lengths.items():
            print(f"  tokens of each reply of {name}: {sorted(found_lengths)}, of {given.tokens} asked for")
        commands(
            f"{ours.command}.stream(ids, max_tokens={given.tokens}, temperature=0), in {given.n} threads",
            server.command,
        )


def agents(given: argparse.Namespace) -> None:
    """Requests that come at once with one long prefix and tails of their own, against llama-server."""
    n_ctx = given.n * whole_cells(given.prefix + given.tail + given.tokens)
    prompts = Prompts()
    computed: dict[str, list[int]] = {}

    def measure(engine: Engine, asked: list[list[Prompt]]) -> float:
        replies = ask_together(engine, asked.pop(), given.tokens)
        computed.setdefault(engine.name, []).append(sum(reply.n_computed for reply in replies))
        return max(reply.ended for reply in replies) - min(reply.asked for reply in replies)

    def round_of() -> list[Prompt]:
        prefix = prompts.of(given.prefix)
        return [[*prefix, 5 + at, *prompts.of(given.tail - 1)] for at in range(given.n)]

    with (
        Ours(given.model, given.threads, n_ctx, n_seq_max=given.n) as ours,
        Server(given, ours, n_ctx, given.n) as server,
    ):
        for engine in (ours, server):
            ask(engine, prompts.of(SHORT_PROMPT), 4)  # warms it up
        same = [round_of() for _ in range(given.runs)]
        ours_ask, theirs_ask = same.copy(), same.copy()
        pairs = in_turn(lambda: measure(ours, ours_ask), lambda: measure(server, theirs_ask), given.runs)
        report(f"{given.n} agents, one prefix of {given.prefix} tokens, wall time", "s", *pairs, server.name)
        least = given.prefix + given.n * given.tail
        for name, counts in computed.items():
            print(f"  prompt tokens computed by {name}: {sorted(set(counts))}; the least possible is {least}")
        commands(
            f"{ours.command}.stream(ids, max_tokens={given.tokens}, temperature=0), in {given.n} threads",
            server.command,
        )


class Stall(NamedTuple):
    """What streams went through while a prompt was read; seconds.

    Attributes:
        longest: the longest wait of any stream for its next token.
        steady: the median wait before the prompt came.
        prefill: from asking with the prompt to its first token.
    """

    longest: float
    steady: float
    prefill: float


def waits(pieces: Iterable[Piece], after: float, before: float) -> list[float]:
    """Waits for a token that fell, in part, between two moments; a piece of several tokens took several waits."""
    each = list(pieces)
    return [
        (here.at - last.at) / max(1, here.n_tokens - last.n_tokens)
        for last, here in pairwise(each)
        if here.at > after and last.at < before
    ]


def stall_of(engine: Engine, prompts: Prompts, n_streams: int, n_prompt: int) -> Stall:
    enough = threading.Event()
    every: list[list[Piece]] = [[] for _ in range(n_streams)]
    callers = [
        threading.Thread(target=engine.reply, args=(prompts.of(SHORT_PROMPT), 1024, pieces, enough))
        for pieces in every
    ]
    for caller in callers:
        caller.start()
    try:
        while min(len(pieces) for pieces in every) < 24:
            if not any(caller.is_alive() for caller in callers):
                raise SystemExit(f"{engine.name}: the streams ended before the prompt came")
            time.sleep(0.01)
        running = max(pieces[0].at for pieces in every)
        asked = time.perf_counter()
        read = ask(engine, prompts.of(n_prompt), 1).pieces[0].at
        time.sleep(0.1)
        if any(pieces[-1].at < asked for pieces in every):
            time.sleep(2)  # whoever was held up the whole time gets its next token now
    finally:
        enough.set()
        for caller in callers:
            caller.join()
    longest = max(wait for pieces in every for wait in waits(pieces, asked, read))
    steady = statistics.median(wait for pieces in every for wait in waits(pieces, running, asked))
    return Stall(longest, steady, read - asked)


def stall(given: argparse.Namespace) -> None:
    """The longest wait of streams for a token while a long prompt is read, for several sizes of chunk.

    What is expected is the time of one chunk, from the time of the same prompt read alone, and of the tick
    that it shares with the streams. The last chunks of a prompt cost more than the average one.
    """
    n_streams, n_ctx = 3, 4 * whole_cells(given.prompt + 256)
    prompts = Prompts()
    chunks = [int(size) for size in given.chunks.split(",")]
    with ExitStack() as stack:
        engines: list[tuple[int, Engine]] = []
        for chunk in chunks:
            options = {"n_seq_max": n_streams + 1, "prefill_chunk_size": chunk}
            ours = stack.enter_context(Ours(given.model, given.threads, n_ctx, **options))
            engines.append((chunk, ours))
        server = Server(given, ours, n_ctx, n_streams + 1)
        # The server fills a batch with the prompt, and its streams wait for the whole batch.
        engines.append((min(N_BATCH, given.prompt), stack.enter_context(server)))
        found: list[list[Stall]] = [[] for _ in engines]
        alone: list[list[float]] = [[] for _ in engines]
        for _ in range(given.runs):
            for at, (_, engine) in enumerate(engines):
                ask(engine, prompts.of(SHORT_PROMPT), 4)
                reply = ask(engine, prompts.of(given.prompt), 1)
                alone[at].append(reply.pieces[0].at - reply.asked)
                found[at].append(stall_of(engine, prompts, n_streams, given.prompt))
        for (chunk, engine), stalls, seconds in zip(engines, found, alone, strict=True):
            expected = [
                each * chunk / given.prompt + stalled.steady for each, stalled in zip(seconds, stalls, strict=True)
            ]
            longest = [stalled.longest for stalled in stalls]
            ratio = statistics.median(longest) / statistics.median(expected)
            size = f"prefill_chunk_size={chunk}" if isinstance(engine, Ours) else f"batches of {chunk}"
            print(f"{engine.name}, {size}: longest wait {ratio:.2f} of what {chunk} tokens of prefill take")
            print(
                f"  longest wait {spread([s * 1e3 for s in longest], 1)} ms; "
                f"expected {spread([s * 1e3 for s in expected], 1)} ms; "
                f"before the prompt came {spread([s.steady * 1e3 for s in stalls], 1)} ms"
            )
            print(
                f"  first token of {given.prompt} tokens: {spread([s.prefill for s in stalls])} s beside "
                f"{n_streams} streams, {spread(seconds)} s alone"
            )
            commands(engine.command)


def parked(given: argparse.Namespace) -> None:
    """What cells of finished requests, kept for those to come, cost streams that decode beside them."""
    n_streams, n_parked_requests = 4, 4
    prompts = Prompts()
    sizes = [int(size) for size in given.cells.split(",")]
    n_ctx = max(sizes) + n_streams * (SHORT_PROMPT + given.tokens) + 512
    kinds = [(flash_attn, size) for flash_attn in (True, False) for size in sizes]
    found: list[list[float]] = [[] for _ in kinds]
    shown: list[str] = ["" for _ in kinds]
    for run in range(given.runs):
        order = list(enumerate(kinds))
        for at, (flash_attn, size) in order if run % 2 else order[::-1]:
            # One model at a time: the threads of several in one process slow one another down.
            options = {"flash_attn": flash_attn, "parked_cells": size, "n_seq_max": n_streams + n_parked_requests}
            with Ours(given.model, given.threads, n_ctx, **options) as engine:
                shown[at] = engine.command
                ask_together(engine, prompts.many(n_streams, SHORT_PROMPT), 8)
                engine.model.evict()
                for _ in range(n_parked_requests if size else 0):
                    ask(engine, prompts.of(size // n_parked_requests - 2), 1)
                replies = ask_together(engine, prompts.many(n_streams, SHORT_PROMPT), given.tokens)
                found[at].append(rates(replies).while_all)
    fastest = statistics.median(found[sizes.index(min(sizes))])
    for (flash_attn, size), speeds, command in zip(kinds, found, shown, strict=True):
        print(
            f"{n_streams} streams beside {size} parked cells, flash attention {'on' if flash_attn else 'off'}: "
            f"{statistics.median(speeds) / fastest:.3f} of {min(sizes)} cells with it on; "
            f"{spread(speeds)} tokens/s"
        )
        commands(command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", type=Path, required=True, help="a GGUF file")
    common.add_argument("--threads", type=int, default=processors(), help="of both sides; all if left out")
    common.add_argument("--runs", type=int, default=5)
    common.add_argument("--peers", type=Path, help=f"what `{PEERS}` printed; it is run if this is left out")
    common.add_argument("--server-args", default="", help='more for llama-server, as "--kv-unified"')
    kinds = parser.add_subparsers(dest="what", required=True)

    def kind(measure: Callable[[argparse.Namespace], None], **numbers: int | str) -> None:
        text = measure.__doc__ or ""
        sub = kinds.add_parser(measure.__name__, parents=[common], help=text.splitlines()[0], description=text)
        for name, value in numbers.items():
            sub.add_argument(f"--{name}", type=type(value), default=value, help=f"default {value}")
        sub.set_defaults(measure=measure)

    kind(one, tokens=128, prompt=512)
    kind(streams, n=4, tokens=128)
    kind(agents, n=8, prefix=1024, tail=32, tokens=16)
    kind(stall, prompt=2048, chunks="64,128,512")
    kind(parked, tokens=64, cells="0,1000,2500")
    given = parser.parse_args()
    print(f"erllama {erllama.__version__}, {build_info()}, {os.cpu_count()} processors, {given.threads} threads")
    given.measure(given)


if __name__ == "__main__":
    main()
