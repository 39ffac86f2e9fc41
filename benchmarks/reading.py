"""The benefit of the cache: fast lookups among many blocks, and warm prompts after a restart.

Cache directories are temporary. TMPDIR chooses the file system to measure.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

import erllama
from benchmarks.engines import Prompt, Prompts, load_code, open_model, whole_cells
from benchmarks.measure import Figure, Findings, Line, Plot, Setup, Target, in_turn, spread
from erllama.cache import Block, SaveReason, namespace_key, token_bytes
from erllama.cache.tiers.sqlite_index import FileStamp, Index
from erllama.testing.models import write_llama

BLOCK = 256  # tokens; the cache's default
REPEAT = 3  # repetitions of short measurements within one run
LOOKUPS = 20  # lookups in one run
READS_ONLY = {"min_tokens": 2**30}  # a policy that saves no blocks, so that every start finds the same files
AFTER = 32  # tokens to decode after a restart, for the time of one decode
LOOKUP_BOUND_MS = 2.0
FIXED_MS = 0.2  # for each restored block, beside its bytes
LONGEST_COLD_SECONDS = 60.0  # after a prefill that took longer, the plot ends
NAMESPACE = namespace_key({"benchmark": 1})


# --- finding blocks ---------------------------------------------------------------------------------------


def lookup(setup: Setup) -> Findings:
    """Look up a long stored prompt among few blocks and among ten times as many. Needs no model.

    The directories have real indexes, with chains of up to 100 blocks beside those of the prompt, and empty files,
    since a lookup reads none. Both caches stay open.
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
            notes.append(f"opening a cache with {n_blocks:,} blocks, and closing it: {spread(starts)} s")
            cache = opened.enter_context(erllama.Cache(disk=root, watch=False))

            def look() -> None:
                with cache.lookup(NAMESPACE, prompt) as match:
                    if match.n_tokens != n_tokens:
                        raise SystemExit(f"a lookup found {match.n_tokens} of {n_tokens} tokens")

            look()  # warm-up
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
    """Fill a directory with the blocks of the prompt, and with others up to `n_blocks`."""
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
    return Block.chain(token_bytes(tokens), NAMESPACE, BLOCK, SaveReason.COLD)


# --- a restart --------------------------------------------------------------------------------------------


class Restart(NamedTuple):
    """One start with the blocks of a prompt on disk; times in seconds.

    Attributes:
        n_reused: tokens of the prompt that were restored.
        first_token: from the request to the first token: lookup, reads, restore, one decode.
        moving: reading the same block files and copying them into one buffer.
        decode: decoding one token at the end of the prompt, in the same context afterwards.
        opening: opening the cache and loading the model, which `first_token` does not include.
    """

    n_reused: float
    first_token: float
    moving: float
    decode: float
    opening: float


def restart(setup: Setup) -> Findings:
    """Compare a prompt after a restart with its cold prefill, and with the minimum of necessary work.

    Each measurement opens a cache and loads the model again. Times are from the request to its first token, without
    opening and loading, which are the same when cold and warm. The files are in the page cache.
    """
    n_tokens = setup.of(2048, 300)
    n_ctx, prompt = whole_cells(n_tokens + 64), Prompts(setup).of(n_tokens)
    warms: list[Restart] = []
    colds: list[float] = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "kv"
        with erllama.Cache(disk=root) as cache, open_model(setup, cache, n_ctx) as model:
            model.prefill(prompt)
        files = sorted((root / "blocks").iterdir())
        n_bytes = sum(path.stat().st_size for path in files)

        def warm() -> float:
            each = [_restarted(setup, root, n_ctx, prompt, files) for _ in range(REPEAT)]
            warms.append(Restart(*(statistics.median(values) for values in zip(*each, strict=True))))
            return 60 / warms[-1].first_token

        def cold() -> float:
            with erllama.Cache() as cache, open_model(setup, cache, n_ctx) as model:
                colds.append(_first_token(model, prompt, None))
            return 60 / colds[-1]

        pair = in_turn(warm, cold, setup.runs)
    shown = load_code(setup, "erllama.Cache(disk=root, ram=0)", n_ctx, policy=READS_ONLY)
    commands = [
        f"{shown}.complete(ids, max_tokens={1 + AFTER}, temperature=0)",
        f"{load_code(setup, 'erllama.Cache()', n_ctx)}.complete(ids, max_tokens=1, temperature=0)",
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
            "each measurement opens a cache and loads a model again, which is not timed: "
            f"{spread([warm.opening for warm in warms])} s when warm; a warm value is the median of {REPEAT}",
            "the cold run has an empty cache in RAM and saves blocks to it while it computes the prompt",
            f"restored: {warms[-1].n_reused:.0f} tokens; computed: {n_tokens - warms[-1].n_reused:.0f}",
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
            "erllama's time is that of the first request after loading, with the checksums of all bytes; "
            f"the decode is the mean of {AFTER} tokens in a context that is already in use",
        ],
    )


def _restarted(setup: Setup, root: Path, n_ctx: int, prompt: Prompt, files: Sequence[Path]) -> Restart:
    began = time.perf_counter()
    with erllama.Cache(disk=root, ram=0) as cache, open_model(setup, cache, n_ctx, policy=READS_ONLY) as model:
        opening = time.perf_counter() - began
        done = _ask(model, prompt, "disk", 1 + AFTER)
    timings = done.timings
    move = _copying(files)
    return Restart(
        done.cache.tokens,
        timings.restore + timings.prefill,
        _seconds(move),
        timings.decode / timings.decode_tokens,
        opening,
    )


def _copying(files: Sequence[Path]) -> Callable[[], None]:
    """Return a function that reads files and copies them into one buffer."""
    # Written once, so that its pages are allocated.
    buffer = np.ones(sum(path.stat().st_size for path in files), np.uint8)

    def move() -> None:
        at = 0
        for path in files:
            content = np.frombuffer(path.read_bytes(), np.uint8)
            buffer[at : at + len(content)] = content
            at += len(content)

    return move


def _cold_and_warm(setup: Setup) -> Plot:
    """Plot the time to the first token by prompt length: one cold prefill, the median of warm requests."""
    lengths = [64 * 2**at for at in range(setup.of(7, 2))]
    n_ctx, prompts = whole_cells(lengths[-1] + 64), Prompts(setup)
    asked: list[Prompt] = []
    cold: list[tuple[float, float]] = []
    from_ram: list[tuple[float, float]] = []

    def warm(model: erllama.Model, prompt: Prompt, tier: str) -> tuple[float, float]:
        times = []
        for _ in range(REPEAT):
            model.evict()  # empties the context
            times.append(_first_token(model, prompt, tier))
        return len(prompt), statistics.median(times)

    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "kv"
        with erllama.Cache(disk=root) as cache, open_model(setup, cache, n_ctx) as model:
            _ask(model, [4, *prompts.of(63)], None)  # warm-up
            for at, length in enumerate(lengths):
                asked.append([5 + at, *prompts.of(length - 1)])  # no common prefixes
                cold.append((length, _first_token(model, asked[-1], None)))
                from_ram.append(warm(model, asked[-1], "ram"))
                if cold[-1][1] > LONGEST_COLD_SECONDS:
                    break
        with erllama.Cache(disk=root, ram=0) as cache, open_model(setup, cache, n_ctx) as model:
            _ask(model, [3, *prompts.of(63)], None)
            from_disk = [warm(model, prompt, "disk") for prompt in asked]
    lines = [Line("cold", cold), Line("warm, from disk", from_disk), Line("warm, from RAM", from_ram)]
    title = f"Time to the first token, cold and warm ({setup.model.stem})"
    return Plot("cold-and-warm", title, "tokens of the prompt", "seconds", lines, log_x=True, log_y=True)


# --- many small blocks --------------------------------------------------------------------------------------


def restore(setup: Setup) -> Findings:
    """Restore a long prompt of a tiny model, in many small blocks: the fixed cost of a block exceeds its bytes'.

    Uses a generated model of its own, with one thread. The files are in the page cache.
    """
    n_tokens = setup.of(31_000, 600)
    n_ctx, prompt = whole_cells(n_tokens + 64), Prompts().of(n_tokens)
    found = Findings()
    with tempfile.TemporaryDirectory() as place:
        model_file = write_llama(Path(place) / "tiny.gguf", quantization="Q8_0")
        tiny, root = replace(setup, model=model_file, threads=1), Path(place) / "kv"
        with erllama.Cache(disk=root) as cache, open_model(tiny, cache, n_ctx) as model:
            model.prefill(prompt)
        for tier, ram in (("disk", 0), ("ram", 2**30)):
            found.figures.append(_restored_from(tier, ram, tiny, root, n_ctx, prompt))
    return found


def _restored_from(tier: str, ram: int, setup: Setup, root: Path, n_ctx: int, prompt: Prompt) -> Figure:
    files = sorted((root / "blocks").iterdir())
    move, fixed = _copying(files), FIXED_MS * len(files)
    moving: list[float] = []

    def least() -> float:
        moving.append(1e3 * statistics.median(_seconds(move) for _ in range(REPEAT)))
        return moving[-1] + fixed

    cache = erllama.Cache(disk=root, ram=ram)
    with cache, open_model(setup, cache, n_ctx, policy=READS_ONLY) as model:

        def ours() -> float:
            times = []
            for _ in range(REPEAT):
                model.evict()  # empties the context
                times.append(1e3 * _ask(model, prompt, tier).timings.restore)
            return statistics.median(times)

        _ask(model, prompt, "disk")  # warm-up; with RAM, it also promotes the blocks
        pair = in_turn(ours, least, setup.runs)
    each = [1e3 * (a - b) / len(files) for a, b in zip(pair[0], moving, strict=True)]
    return Figure(
        f"restore-{tier}",
        f"{len(prompt):,} tokens in {len(files)} small blocks, restored from {'disk' if tier == 'disk' else 'RAM'}",
        f"reading and copying the files, and {FIXED_MS:g} ms for each",
        "ms",
        *pair,
        Target("<=", 1.0),
        [
            load_code(setup, f"erllama.Cache(disk=root, ram={ram})", n_ctx, policy=READS_ONLY)
            + ".complete(ids, max_tokens=1)"
        ],
        [
            f"reading and copying takes {spread(moving)} ms; ours takes {spread(each)} us more for each block",
            f"a generated model of 2 layers, one thread; each value is the median of {REPEAT}",
        ],
    )


# --- requests ----------------------------------------------------------------------------------------------


def _ask(model: erllama.Model, prompt: Prompt, tier: str | None, n_tokens: int = 1) -> erllama.Completion:
    """Return a greedy reply to a prompt that is in this tier as far as the model can resume, or cold for None.

    Memory that can be cut resumes before the last token; a window or a recurrent state at the end of a block.
    """
    done = model.complete(prompt, max_tokens=n_tokens, temperature=0)
    hit, last = done.cache, len(prompt) - 1
    least = last if model._backend.limits.can_trim else last // BLOCK * BLOCK
    resumed = hit.tokens >= least and (hit.tier == tier or hit.tokens == 0)
    if not (resumed if tier else hit.kind == "cold"):
        raise SystemExit(f"expected a prompt of {len(prompt)} tokens from {tier}, got {hit}")
    return done


def _first_token(model: erllama.Model, prompt: Prompt, tier: str | None) -> float:
    """Return the seconds from a request to its first token."""
    timings = _ask(model, prompt, tier).timings
    return timings.restore + timings.prefill


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


SCENARIOS: dict[str, Callable[[Setup], Findings]] = {"lookup": lookup, "restart": restart, "restore": restore}
