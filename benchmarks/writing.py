"""The cost of the cache: bytes written, decoding beside writes, memory.

Cache directories are temporary. TMPDIR chooses the file system to measure.
"""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import erllama
from benchmarks.engines import Prompt, Prompts, load_code, open_model, whole_cells
from benchmarks.measure import Figure, Findings, Line, Plot, Setup, Target, in_turn, spread
from benchmarks.processes import answer, measure_in_process
from erllama.engine.backends.stub import StubBackend

BLOCK = 256  # tokens; the cache's default
REPEAT = 3  # replies within one run
SYSTEM = 700  # tokens at the start of a chat


# --- bytes written ----------------------------------------------------------------------------------------


def turns(setup: Setup) -> Findings:
    """Compare the bytes that a chat writes with those of its distinct tokens. Each turn sends the whole history.

    The model is a stub, since the number of bytes depends only on lengths. Its tokens have 8 bytes of KV, so file
    headers and token ids weigh more than with a real model.
    """
    n_turns, n_input, n_reply = setup.of(20, 6), 90, 120
    chats: list[Chat] = []
    once: list[float] = []

    def chat() -> float:
        chats.append(_chat(n_turns, n_input, n_reply))
        return chats[-1].n_bytes

    def at_once() -> float:
        once.append(_written_once(n_turns * (n_input + n_reply) + SYSTEM))
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
                    f"{SYSTEM} tokens before the first turn, {n_input} of input and {n_reply} of reply in each: "
                    f"{last.lengths[-1]} in the end",
                    "a stub instead of a model, with 8 bytes of KV per token; "
                    "a model has thousands of times as much",
                    f"{last.n_superseded} tails were superseded by the next turn before they were written",
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
    """The writes of a chat.

    Attributes:
        n_bytes: bytes in total, after its end.
        written: bytes up to the end of each turn.
        lengths: tokens of the history after each turn.
        n_superseded: tails that a later turn replaced before they were written.
    """

    n_bytes: float
    written: list[float]
    lengths: list[int]
    n_superseded: int


def _chat(n_turns: int, n_input: int, n_reply: int) -> Chat:
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
            history += [ord("q")] * n_input
            history = list(model.complete(history, max_tokens=n_reply).context_tokens)
            # Full blocks are queued at once; the tail waits for the next turn.
            _wait_for_blocks(cache, (len(history) - 1) // BLOCK)
            written.append(cache.counters()["bytes_written"])
            lengths.append(len(history))
        cache.flush()
        counters = cache.counters()
    written[-1] = counters["bytes_written"]
    return Chat(counters["bytes_written"], written, lengths, int(counters["tails_superseded"]))


def _wait_for_blocks(cache: erllama.Cache, n_blocks: int) -> None:
    deadline = time.monotonic() + 10
    while cache.counters()["blocks_disk"] < n_blocks:
        if time.monotonic() > deadline:
            raise SystemExit(f"{n_blocks} blocks were not written within 10 seconds")
        time.sleep(0.002)


def _written_once(n_tokens: int) -> float:
    """Return the bytes that a history of this many tokens takes on disk."""
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
    """Replies of one process.

    Attributes:
        speed: tokens per second, the median over the replies.
        n_bytes: bytes written to disk in total.
        share: the part of these bytes that was written between the first and the last token of a reply.
    """

    speed: float
    n_bytes: float
    share: float


def behind(setup: Setup) -> Findings:
    """Compare decoding while blocks of prompts and replies are written to disk with decoding alone.

    One model at a time, loaded again for each value. A block becomes full in the middle of each reply. It is packed
    and written while the reply continues.
    """
    n_tokens = setup.of(128, 32)
    n_prompt = setup.of(1024, 512) - n_tokens // 2
    n_ctx, prompts = whole_cells(n_prompt + n_tokens), Prompts(setup)
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
                "decode while blocks are written in the background",
                "decode with a cache that stores nothing",
                "tokens/s",
                *pair,
                Target(">=", 0.97),
                [
                    f"{load_code(setup, cache, n_ctx)}.complete(ids, max_tokens={n_tokens}, temperature=0)"
                    for cache in ("erllama.Cache(disk=root)", "erllama.Cache(ram=0)")
                ],
                [
                    f"prompts of {n_prompt} tokens, replies of {n_tokens}; each value is the median of {REPEAT}",
                    f"{statistics.median(each.n_bytes for each in saving) / 1e6:.1f} MB written for them, "
                    f"{spread(shares, 0)}% of it during the decoding of a reply, the rest before or after",
                ],
            )
        ]
    )


def _decoding(setup: Setup, cache: erllama.Cache, n_ctx: int, asked: Sequence[Prompt], n_tokens: int) -> Decoding:
    def written() -> float:
        return cache.counters()["bytes_written"]

    speeds: list[float] = []
    during = 0.0
    with open_model(setup, cache, n_ctx) as model:
        model.complete(asked[0][:64], max_tokens=8, temperature=0)  # warm-up
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

RAM = "64MiB"  # less than the KV of the conversations with a 135M model, so that the tier is full at the end
TALKS, SLOTS = 10, 4


class Memory(NamedTuple):
    """The memory of one process, in MiB.

    Attributes:
        peak: peak resident memory, including the mapped pages of the model file.
        ram: size of the RAM tier at the end.
        disk: bytes written.
    """

    peak: float
    ram: float
    disk: float


def memory(setup: Setup) -> Findings:
    """Compare the peak memory of ten conversations with a cache in RAM and on disk with that of one token.

    Each value is from a separate process.
    """
    processes: dict[str, list[Memory]] = {"cache": [], "none": [], "one": []}

    def peak(what: str) -> float:
        processes[what].append(Memory(*measure_in_process("writing", setup, what)))
        return processes[what][-1].peak

    pair = in_turn(lambda: peak("cache"), lambda: peak("one"), setup.runs)
    peak("none")
    over = [a - b for a, b in zip(*pair, strict=True)]
    last, n_input, n_reply, n_turns = processes["cache"][-1], *_talk_sizes(setup)
    n_ctx = SLOTS * whole_cells(n_turns * (n_input + n_reply))
    talk = f".complete(history, max_tokens={n_reply}), in {TALKS} threads"

    def loading(cache: str) -> str:
        return load_code(setup, cache, n_ctx, n_seq_max=SLOTS)

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
                    f"{loading(f'erllama.Cache(ram={RAM!r}, disk=root)')}{talk}",
                    f"{loading('erllama.Cache(ram=0)')}.complete([5], max_tokens=1)",
                ),
                [
                    f"{n_turns} turns and {n_turns * (n_input + n_reply)} tokens each in the end; "
                    f"{SLOTS} run at a time, the others wait; each value is from a separate process",
                    f"{spread(over, 1)} MiB more than one token; the same conversations with Cache(ram=0) took "
                    f"{processes['none'][0].peak - statistics.median(pair[1]):.1f} MiB more: "
                    "the memory of the computation",
                    f"the RAM tier's budget is {RAM}, of which it held {last.ram:.1f} MiB in the end; "
                    f"{last.disk:.1f} MiB were written to disk",
                ],
            )
        ]
    )


def _talk_sizes(setup: Setup) -> tuple[int, int, int]:
    """Return the tokens of input per turn, the tokens of each reply, and the number of turns."""
    return setup.of(100, 40), setup.of(32, 8), setup.of(3, 2)


def _measure_memory(setup: Setup, what: str) -> Memory:
    """Run one process of `memory`: conversations with "cache" or "none", or one token for "one"."""
    n_input, n_reply, n_turns = _talk_sizes(setup)
    n_ctx, prompts = SLOTS * whole_cells(n_turns * (n_input + n_reply)), Prompts(setup)
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        tiers = {"ram": RAM, "disk": Path(place) / "kv"} if what == "cache" else {"ram": 0}
        cache = stack.enter_context(erllama.Cache(**tiers))
        model = stack.enter_context(open_model(setup, cache, n_ctx, n_seq_max=SLOTS))

        def talk(inputs: list[Prompt]) -> None:
            history: Prompt = []
            for each in inputs:
                history = [*model.complete([*history, *each], max_tokens=n_reply, temperature=0).context_tokens]

        if what == "one":
            model.complete([5], max_tokens=1)
        else:
            with ThreadPoolExecutor(TALKS) as callers:
                list(callers.map(talk, [prompts.many(n_turns, n_input) for _ in range(TALKS)]))
        cache.flush()
        counters = cache.counters()
        return Memory(_peak_mib(), counters["bytes_ram"] / 2**20, counters["bytes_written"] / 2**20)


def _peak_mib() -> float:
    """Return the peak resident memory of this process, in MiB."""
    try:
        # getrusage would also count the memory of the parent at the start of this process.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (FileNotFoundError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


SCENARIOS: dict[str, Callable[[Setup], Findings]] = {"turns": turns, "behind": behind, "memory": memory}

if __name__ == "__main__":
    answer(_measure_memory)
