"""What the cache costs and gives: finding blocks, a restart, bytes written, decoding beside writes, memory.

Directories of caches are temporary ones: TMPDIR chooses the file system that is measured.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

import erllama
from benchmarks.engines import N_BATCH, N_UBATCH, Prompt, Prompts, whole_cells
from benchmarks.measure import Figure, Findings, Line, Plot, Setup, Target, in_turn, spread
from erllama.cache import Block, SaveReason, namespace_key, token_bytes
from erllama.cache.index import FileStamp, Index
from erllama.engine.backends.stub import StubBackend

BLOCK = 256  # tokens; the cache's default
REPEAT = 3  # repetitions within one run, of what takes little time
LOOKUPS = 20  # in one run
SYSTEM = 700  # tokens that a chat begins with
READS_ONLY = {"min_tokens": 2**30}  # a policy: nothing is saved, so that every start finds the same files
AFTER = 32  # tokens whose decode is timed after a restart
LOOKUP_BOUND_MS = 2.0
LONGEST_COLD_SECONDS = 60.0  # after a prefill that took longer, no longer prompt is drawn
NAMESPACE = namespace_key({"benchmark": 1})


# --- loading and asking ----------------------------------------------------------------------------------


def _options(setup: Setup, n_ctx: int, **more: object) -> dict[str, object]:
    given = {"n_ctx": n_ctx, "n_threads": setup.threads, "n_batch": N_BATCH, "n_ubatch": N_UBATCH}
    return {**given, "flash_attn": True, "n_gpu_layers": setup.gpu_layers, **more}


@contextmanager
def _loaded(setup: Setup, cache: erllama.Cache, n_ctx: int, **more: object) -> Iterator[erllama.Model]:
    """The model, loaded anew, with `more` options; its replies are as long as they are asked to be."""
    options = _options(setup, n_ctx, **more)
    with erllama.load_model(setup.model, cache=cache, **options) as model:  # type: ignore[arg-type]
        vocabulary = model._backend.vocabulary
        vocabulary.is_eog = np.zeros_like(vocabulary.is_eog)  # type: ignore[misc]
        yield model


def _shown(setup: Setup, cache: str, n_ctx: int, **more: object) -> str:
    """How `_loaded` would be written."""
    options = ", ".join(f"{name}={value!r}" for name, value in _options(setup, n_ctx, **more).items())
    return f"erllama.load_model({setup.model.name!r}, cache={cache}, {options})"


def _ask(model: erllama.Model, prompt: Prompt, tier: str | None, n_tokens: int = 1) -> erllama.Completion:
    """A greedy reply to a prompt that is warm in just this tier as a whole, or cold for None."""
    done = model.complete(prompt, max_tokens=n_tokens, temperature=0)
    if (done.cache.kind, done.cache.tier) != ("exact" if tier else "cold", tier):
        raise SystemExit(f"a prompt of {len(prompt)} tokens was to come from {tier}, and was: {done.cache}")
    return done


def _first_token(model: erllama.Model, prompt: Prompt, tier: str | None) -> float:
    """Seconds from placing the request to its first token."""
    timings = _ask(model, prompt, tier).timings
    return timings.restore + timings.prefill


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# --- finding blocks ---------------------------------------------------------------------------------------


def lookup(setup: Setup) -> Findings:
    """A long prompt, all of it stored, among few and among ten times as many blocks; no model.

    The directories hold true indexes of chains of up to 100 blocks beside the prompt's own, and empty files: a
    lookup reads none. Both caches are open all the time.
    """
    n_few, n_many, n_tokens = setup.of(10_000, 1_000), setup.of(100_000, 3_000), setup.of(32_768, 2_048)
    dice = np.random.default_rng(1)
    prompt = dice.integers(0, 100_000, n_tokens)
    notes = [f"a prompt of {n_tokens:,} tokens in blocks of {BLOCK}; each value is the median of {LOOKUPS} lookups"]
    with tempfile.TemporaryDirectory() as place, ExitStack() as opened:

        def among(n_blocks: int) -> Callable[[], float]:
            root = Path(place) / str(n_blocks)
            _fill(root, prompt, n_blocks, dice)
            starts = [_seconds(lambda: erllama.Cache(disk=root, watch=False).close()) for _ in range(REPEAT)]
            notes.append(f"starting a cache with {n_blocks:,} blocks, and closing it: {spread(starts)} s")
            cache = opened.enter_context(erllama.Cache(disk=root, watch=False))

            def look() -> None:
                with cache.lookup(NAMESPACE, prompt) as match:
                    if match.n_tokens != n_tokens:
                        raise SystemExit(f"a lookup found {match.n_tokens} of {n_tokens} tokens")

            look()  # the first one warms it up
            return lambda: 1e3 * statistics.median(_seconds(look) for _ in range(LOOKUPS))

        few, many = among(n_few), among(n_many)
        in_many, in_few = in_turn(many, few, setup.runs)
    shown = "cache.lookup(namespace, ids), cache = erllama.Cache(disk=directory of {:,} blocks)"
    commands = (shown.format(n_many), shown.format(n_few))
    bound = [LOOKUP_BOUND_MS] * setup.runs
    return Findings(
        [
            Figure(
                "lookup",
                f"a lookup among {n_many:,} blocks",
                f"{LOOKUP_BOUND_MS:g} ms",
                "ms",
                in_many,
                bound,
                Target("<=", 1.0),
                commands[:1],
                notes,
            ),
            Figure(
                "lookup-growth",
                f"a lookup among {n_many:,} blocks",
                f"among {n_few:,} blocks",
                "ms",
                in_many,
                in_few,
                Target("<=", 1.5),
                commands,
                notes[:1],
            ),
        ]
    )


def _fill(root: Path, prompt: NDArray[np.int64], n_blocks: int, dice: np.random.Generator) -> None:
    """Make a directory that holds the prompt's blocks and, up to `n_blocks`, others."""
    erllama.Cache(disk=root, watch=False).close()
    blocks = _chain(prompt)
    while len(blocks) < n_blocks:
        blocks += _chain(dice.integers(0, 100_000, 100 * BLOCK))
    index = Index(root / "index.db")
    with index.transaction():
        for block in blocks[:n_blocks]:
            index.put(block, FileStamp(1, 1), 1)
            (root / "blocks" / f"{block.key.hex()}.kvc").touch()
    index.close()


def _chain(tokens: NDArray[np.int64]) -> list[Block]:
    blocks: list[Block] = []
    for start in range(0, len(tokens), BLOCK):
        parent = blocks[-1].key if blocks else NAMESPACE
        raw = token_bytes(tokens[start : start + BLOCK])
        blocks.append(Block.following(parent, NAMESPACE, start, raw, SaveReason.COLD))
    return blocks


# --- a restart --------------------------------------------------------------------------------------------


class Restart(NamedTuple):
    """One start with a prompt's blocks on disk; seconds.

    Attributes:
        first_token: from placing the request to the first token: looking up, reading, restoring, one decode.
        moving: reading the same block files, and copying them into one buffer.
        decode: of one token at the prompt's end, in the same context a moment later.
        opening: opening the cache and loading the model, which `first_token` does not have in it.
    """

    first_token: float
    moving: float
    decode: float
    opening: float


def restart(setup: Setup) -> Findings:
    """The same prompt after a restart: against its cold prefill, and against what cannot be done without.

    Each measurement opens a cache and loads the model anew. Times are from placing the request to its first
    token; opening and loading, which cold and warm need alike, are not in them. Files are in the page cache.
    """
    n_tokens = setup.of(2048, 300)
    n_ctx, prompt = whole_cells(n_tokens + 64), Prompts().of(n_tokens)
    warms: list[Restart] = []
    colds: list[float] = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "kv"
        with erllama.Cache(disk=root) as cache, _loaded(setup, cache, n_ctx) as model:
            model.prefill(prompt)
        files = sorted((root / "blocks").iterdir())
        n_bytes = sum(path.stat().st_size for path in files)

        def warm() -> float:
            each = [_restarted(setup, root, n_ctx, prompt, files) for _ in range(REPEAT)]
            warms.append(Restart(*(statistics.median(values) for values in zip(*each, strict=True))))
            return 60 / warms[-1].first_token

        def cold() -> float:
            with erllama.Cache() as cache, _loaded(setup, cache, n_ctx) as model:
                colds.append(_first_token(model, prompt, None))
            return 60 / colds[-1]

        pair = in_turn(warm, cold, setup.runs)
    shown = _shown(setup, "erllama.Cache(disk=root, ram=0)", n_ctx, policy=READS_ONLY)
    commands = [
        f"{shown}.complete(ids, max_tokens={1 + AFTER}, temperature=0)",
        f"{_shown(setup, 'erllama.Cache()', n_ctx)}.complete(ids, max_tokens=1, temperature=0)",
    ]
    firsts = [1e3 * warm.first_token for warm in warms]
    against_cold = Figure(
        "restart",
        f"a prompt of {n_tokens} tokens after a restart",
        "its cold prefill",
        "prompts/min",
        *pair,
        Target(">=", 100),
        commands,
        [
            f"{setup.model.name}; to the first token {spread(colds)} s cold, {spread(firsts)} ms warm",
            "each measurement in a cache opened anew and a model loaded anew, which is not timed: "
            f"{spread([warm.opening for warm in warms])} s where warm; a warm value is the median of {REPEAT}",
            "cold has an empty cache in RAM, into which blocks are saved as the prompt is read",
        ],
    )
    moved = f"{n_bytes / 1e6:.1f} MB in {len(files)} files"
    return Findings([against_cold, _against_floor(n_tokens, warms, moved, commands[0])], [_cold_and_warm(setup)])


def _against_floor(n_tokens: int, warms: Sequence[Restart], moved: str, command: str) -> Figure:
    moving, decode = [1e3 * warm.moving for warm in warms], [1e3 * warm.decode for warm in warms]
    return Figure(
        "restart-floor",
        f"a prompt of {n_tokens} tokens after a restart, to its first token",
        "reading and copying its files, and one decode",
        "ms",
        [1e3 * warm.first_token for warm in warms],
        [sum(parts) for parts in zip(moving, decode, strict=True)],
        Target("<=", 1.5),
        [command],
        [
            f"reading {moved} from the page cache, and copying them into one buffer in memory: "
            f"{spread(moving)} ms; one decode at the prompt's end: {spread(decode)} ms",
            "ours is the first request after loading, and checks every byte's checksum; theirs decodes with a "
            f"context that has been used, the mean of {AFTER} tokens",
        ],
    )


def _restarted(setup: Setup, root: Path, n_ctx: int, prompt: Prompt, files: Sequence[Path]) -> Restart:
    began = time.perf_counter()
    with erllama.Cache(disk=root, ram=0) as cache, _loaded(setup, cache, n_ctx, policy=READS_ONLY) as model:
        opening = time.perf_counter() - began
        done = _ask(model, prompt, "disk", 1 + AFTER)
    timings = done.timings
    buffer = np.ones(sum(path.stat().st_size for path in files), np.uint8)  # written to: its pages are there

    def move() -> None:
        at = 0
        for path in files:
            content = np.frombuffer(path.read_bytes(), np.uint8)
            buffer[at : at + len(content)] = content
            at += len(content)

    return Restart(
        timings.restore + timings.prefill, _seconds(move), timings.decode / timings.decode_tokens, opening
    )


def _cold_and_warm(setup: Setup) -> Plot:
    """Time to the first token by the prompt's length: one cold prefill, and the median of some warm ones."""
    lengths = [64 * 2**at for at in range(setup.of(7, 2))]
    n_ctx, prompts = whole_cells(lengths[-1] + 64), Prompts()
    asked: list[Prompt] = []
    cold: list[tuple[float, float]] = []
    from_ram: list[tuple[float, float]] = []

    def warm(model: erllama.Model, prompt: Prompt, tier: str) -> tuple[float, float]:
        times = []
        for _ in range(REPEAT):
            model.evict()  # nothing is left in its context
            times.append(_first_token(model, prompt, tier))
        return len(prompt), statistics.median(times)

    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "kv"
        with erllama.Cache(disk=root) as cache, _loaded(setup, cache, n_ctx) as model:
            _ask(model, [4, *prompts.of(63)], None)  # warms it up
            for at, length in enumerate(lengths):
                asked.append([5 + at, *prompts.of(length - 1)])  # no two begin alike
                cold.append((length, _first_token(model, asked[-1], None)))
                from_ram.append(warm(model, asked[-1], "ram"))
                if cold[-1][1] > LONGEST_COLD_SECONDS:
                    break
        with erllama.Cache(disk=root, ram=0) as cache, _loaded(setup, cache, n_ctx) as model:
            _ask(model, [3, *prompts.of(63)], None)
            from_disk = [warm(model, prompt, "disk") for prompt in asked]
    lines = [Line("cold", cold), Line("warm, from disk", from_disk), Line("warm, from RAM", from_ram)]
    title = f"Time to the first token, cold and warm ({setup.model.stem})"
    return Plot("cold-and-warm", title, "tokens of the prompt", "seconds", lines, log_x=True, log_y=True)


# --- bytes written ----------------------------------------------------------------------------------------


def turns(setup: Setup) -> Findings:
    """Bytes written in a chat, each turn of which sends the whole history, against those of its distinct tokens.

    The model is a stub: what is written depends on lengths alone. A token of it has 8 bytes of KV, so that the
    headers of files and their token ids count for more than they would with a real model.
    """
    n_turns, n_said, n_reply = setup.of(20, 6), 90, 120
    chats: list[Chat] = []
    once: list[float] = []

    def chat() -> float:
        chats.append(_chat(n_turns, n_said, n_reply))
        return chats[-1].n_bytes

    def at_once() -> float:
        once.append(_written_once(n_turns * (n_said + n_reply) + SYSTEM))
        return once[-1]

    ours, theirs = in_turn(chat, at_once, setup.runs)
    last = chats[-1]
    each_token = once[-1] / last.lengths[-1] / 1024
    distinct = [(turn, length * each_token) for turn, length in enumerate(last.lengths, 1)]
    whole = [(turn, sum(last.lengths[:turn]) * each_token) for turn in range(1, n_turns + 1)]
    return Findings(
        [
            Figure(
                "turns",
                f"a chat of {n_turns} turns: bytes written to disk",
                "its distinct tokens, written once",
                "KiB",
                [n_bytes / 1024 for n_bytes in ours],
                [n_bytes / 1024 for n_bytes in theirs],
                Target("<=", 1.05),
                (
                    f"model.complete(history, max_tokens={n_reply}), {n_turns} times; erllama.Cache(disk=root)",
                    "model.prefill(history), once; erllama.Cache(disk=another)",
                ),
                [
                    f"{SYSTEM} tokens before the first turn, {n_said} said and {n_reply} replied in each: "
                    f"{last.lengths[-1]} in the end",
                    "a stub instead of a model, with 8 bytes of KV a token; a model has thousands of times that",
                    f"{last.n_overtaken} tails were overtaken by the next turn before they were written",
                ],
            )
        ],
        [
            Plot(
                "bytes-over-turns",
                "A chat: bytes written to disk, all turns up to one (stub, 8 bytes of KV a token)",
                "turn",
                "KiB",
                [
                    Line("whole states saved each turn (computed)", whole),
                    Line("erllama", [(turn, n / 1024) for turn, n in enumerate(last.written, 1)]),
                    Line("the distinct tokens", distinct),
                ],
            )
        ],
    )


class Chat(NamedTuple):
    """What a chat wrote.

    Attributes:
        n_bytes: in all, after its end.
        written: bytes, up to the end of each turn.
        lengths: tokens of the history after each turn.
        n_overtaken: tails that needed not be written.
    """

    n_bytes: float
    written: list[float]
    lengths: list[int]
    n_overtaken: int


def _chat(n_turns: int, n_said: int, n_reply: int) -> Chat:
    history = [ord("s")] * SYSTEM
    written: list[float] = []
    lengths: list[int] = []
    backend = StubBackend(n_ctx=32_768, eog_bias=-100)
    with (
        tempfile.TemporaryDirectory() as place,
        erllama.Cache(disk=Path(place) / "kv") as cache,
        erllama.load_backend(backend, cache=cache) as model,
    ):
        for _ in range(n_turns):
            history += [ord("q")] * n_said
            history = list(model.complete(history, max_tokens=n_reply).context_tokens)
            # Full blocks are written at once, but behind; the tail waits for the next turn.
            _wait_for_blocks(cache, (len(history) - 1) // BLOCK)
            written.append(cache.counters()["bytes_written"])
            lengths.append(len(history))
        cache.flush()
        counters = cache.counters()
    written[-1] = counters["bytes_written"]
    return Chat(counters["bytes_written"], written, lengths, int(counters["tails_overtaken"]))


def _wait_for_blocks(cache: erllama.Cache, n_blocks: int) -> None:
    deadline = time.monotonic() + 10
    while cache.counters()["blocks_disk"] < n_blocks:
        if time.monotonic() > deadline:
            raise SystemExit(f"{n_blocks} blocks were not written within 10 seconds")
        time.sleep(0.002)


def _written_once(n_tokens: int) -> float:
    """Bytes that a history of so many tokens takes on disk."""
    with (
        tempfile.TemporaryDirectory() as place,
        erllama.Cache(disk=Path(place) / "once") as cache,
        erllama.load_backend(StubBackend(n_ctx=32_768), cache=cache) as model,
    ):
        model.prefill([ord("q")] * n_tokens)
        cache.flush()
        return cache.counters()["bytes_written"]


# --- decoding beside writes -------------------------------------------------------------------------------


class Decoding(NamedTuple):
    """Some replies in one process.

    Attributes:
        speed: tokens a second, the median of the replies'.
        n_bytes: written to disk in all.
        share: of those bytes, what was written between a reply's first token and its last.
    """

    speed: float
    n_bytes: float
    share: float


def behind(setup: Setup) -> Findings:
    """Decode of replies while the blocks of their prompts, and their own, go to disk; against decode alone.

    One model at a time, loaded anew for each value. A block fills in the middle of each reply, and is packed and
    written while that goes on.
    """
    n_tokens = setup.of(128, 32)
    n_prompt = setup.of(1024, 512) - n_tokens // 2
    n_ctx, prompts = whole_cells(n_prompt + n_tokens), Prompts()
    asked = prompts.many(REPEAT + 1, n_prompt)
    saving: list[Decoding] = []

    def ours() -> float:
        with tempfile.TemporaryDirectory() as place, erllama.Cache(disk=Path(place) / "kv") as cache:
            saving.append(_decoding(setup, cache, n_ctx, asked, n_tokens))
        return saving[-1].speed

    def theirs() -> float:
        with erllama.Cache(ram=0) as cache:
            return _decoding(setup, cache, n_ctx, asked, n_tokens).speed

    pair = in_turn(ours, theirs, setup.runs)
    shares = [100 * each.share for each in saving]
    return Findings(
        [
            Figure(
                "behind",
                "decode while saves are written behind",
                "decode with a cache that stores nothing",
                "tokens/s",
                *pair,
                Target(">=", 0.97),
                [
                    f"{_shown(setup, cache, n_ctx)}.complete(ids, max_tokens={n_tokens}, temperature=0)"
                    for cache in ("erllama.Cache(disk=root)", "erllama.Cache(ram=0)")
                ],
                [
                    f"prompts of {n_prompt} tokens, replies of {n_tokens}; each value is the median of {REPEAT}",
                    f"{statistics.median(each.n_bytes for each in saving) / 1e6:.1f} MB written for them, "
                    f"{spread(shares, 0)}% of it while a reply was decoded, the rest before or after",
                ],
            )
        ]
    )


def _decoding(setup: Setup, cache: erllama.Cache, n_ctx: int, asked: Sequence[Prompt], n_tokens: int) -> Decoding:
    def written() -> float:
        return cache.counters()["bytes_written"]

    speeds: list[float] = []
    during = 0.0
    with _loaded(setup, cache, n_ctx) as model:
        model.complete(asked[0][:64], max_tokens=8, temperature=0)  # warms it up
        cache.flush()
        before = written()
        for prompt in asked[1:]:
            with model.stream(prompt, max_tokens=n_tokens, temperature=0) as stream:
                next(iter(stream))
                at_first_token = written()
                timings = stream.result().timings
            during += written() - at_first_token
            speeds.append(timings.decode_tokens / timings.decode)
        cache.flush()
        n_bytes = written() - before
    return Decoding(statistics.median(speeds), n_bytes, during / n_bytes if n_bytes else 0.0)


# --- memory -----------------------------------------------------------------------------------------------

RAM = "64MiB"  # less than the conversations' KV is with a model of 135M: the tier is full in the end
TALKS, PLACES = 10, 4


class Memory(NamedTuple):
    """What one process took; MiB.

    Attributes:
        peak: most resident memory at any time, the mapped pages of the model's file among it.
        ram: held by the RAM tier in the end.
        disk: written.
    """

    peak: float
    ram: float
    disk: float


def memory(setup: Setup) -> Findings:
    """Peak resident memory of ten conversations at once with a cache in RAM and on disk, over that of one token.

    Each value is of a process of its own.
    """
    processes: dict[str, list[Memory]] = {"cache": [], "none": [], "one": []}

    def peak(what: str) -> float:
        processes[what].append(_memory_of(setup, what))
        return processes[what][-1].peak

    pair = in_turn(lambda: peak("cache"), lambda: peak("one"), setup.runs)
    peak("none")
    over = [a - b for a, b in zip(*pair, strict=True)]
    held, n_said, n_reply, n_turns = processes["cache"][-1], *_talk_sizes(setup)
    n_ctx = PLACES * whole_cells(n_turns * (n_said + n_reply))
    talk = f".complete(history, max_tokens={n_reply}), in {TALKS} threads"
    return Findings(
        [
            Figure(
                "memory",
                f"{TALKS} conversations at once, peak resident memory",
                "one token, no cache",
                "MiB",
                *pair,
                None,
                (
                    f"{_shown(setup, f'erllama.Cache(ram={RAM!r}, disk=root)', n_ctx, n_seq_max=PLACES)}{talk}",
                    f"{_shown(setup, 'erllama.Cache(ram=0)', n_ctx, n_seq_max=PLACES)}.complete([5], max_tokens=1)",
                ),
                [
                    f"{n_turns} turns and {n_turns * (n_said + n_reply)} tokens each in the end; "
                    f"{PLACES} run at once, the others wait; each value is of a process of its own",
                    f"{spread(over, 1)} MiB more than one token; the same conversations with Cache(ram=0) took "
                    f"{processes['none'][0].peak - statistics.median(pair[1]):.1f} MiB more: that is computing",
                    f"the RAM tier's budget is {RAM}, of which it held {held.ram:.1f} MiB in the end; "
                    f"{held.disk:.1f} MiB were written to disk",
                ],
            )
        ]
    )


def _talk_sizes(setup: Setup) -> tuple[int, int, int]:
    """Tokens said in a turn, tokens replied, and turns."""
    return setup.of(100, 40), setup.of(32, 8), setup.of(3, 2)


def _memory_of(setup: Setup, what: str) -> Memory:
    nowhere = dict.fromkeys(("peers", "llama_cpp_python", "vocabulary"))
    given = {**asdict(setup), "model": str(setup.model.resolve()), **nowhere}
    command = [sys.executable, "-m", "benchmarks.storage", json.dumps([given, what])]
    root = Path(__file__).resolve().parent.parent
    finished = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=root)
    return Memory(*json.loads(finished.stdout))


def _measure_memory(given: str) -> None:
    """What the processes of `memory` do: "cache" and "none" talk, with a cache and without; "one" is one token."""
    options, what = json.loads(given)
    setup = Setup(**{**options, "model": Path(options["model"])})
    n_said, n_reply, n_turns = _talk_sizes(setup)
    n_ctx, prompts = PLACES * whole_cells(n_turns * (n_said + n_reply)), Prompts()
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        kept = {"ram": RAM, "disk": Path(place) / "kv"} if what == "cache" else {"ram": 0}
        cache = stack.enter_context(erllama.Cache(**kept))
        model = stack.enter_context(_loaded(setup, cache, n_ctx, n_seq_max=PLACES))

        def talk(said: list[Prompt]) -> None:
            history: Prompt = []
            for each in said:
                history = [*model.complete([*history, *each], max_tokens=n_reply, temperature=0).context_tokens]

        if what == "one":
            model.complete([5], max_tokens=1)
        else:
            with ThreadPoolExecutor(TALKS) as callers:
                list(callers.map(talk, [prompts.many(n_turns, n_said) for _ in range(TALKS)]))
        cache.flush()
        counters = cache.counters()
        print(json.dumps([_peak_mib(), counters["bytes_ram"] / 2**20, counters["bytes_written"] / 2**20]))


def _peak_mib() -> float:
    """Most resident memory that this process had, in MiB."""
    try:
        # getrusage also counts what the parent had when it started this process.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (FileNotFoundError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


SCENARIOS: dict[str, Callable[[Setup], Findings]] = {
    "lookup": lookup,
    "restart": restart,
    "turns": turns,
    "behind": behind,
    "memory": memory,
}

if __name__ == "__main__":
    _measure_memory(sys.argv[1])
