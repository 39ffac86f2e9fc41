"""Comparison with llama-cpp-python in a separate environment, whose Python `--llama-cpp-python` names.

llama-cpp-python has its own libllama, of another release and with other flags: the benchmark compares what people
install. That Python also runs this file, which then imports no module of this project.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.measure import Findings, Setup


def serve(options: dict[str, object], cache_bytes: int) -> None:
    """Answer requests, one line of JSON each: {"prompt": ids, "n": tokens} with {"seconds", "tokens"}."""
    from llama_cpp import Llama, LlamaRAMCache, __version__

    model = Llama(**options, verbose=False)  # type: ignore[arg-type]
    model.set_cache(LlamaRAMCache(capacity_bytes=cache_bytes))
    print(json.dumps({"version": __version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.perf_counter()
        done = model.create_completion(asked["prompt"], max_tokens=asked["n"], temperature=0)
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "tokens": done["usage"]["completion_tokens"]}), flush=True)  # type: ignore[index]


class Peer:
    """llama-cpp-python in a separate process, with its cache in RAM."""

    def __init__(self, setup: Setup, n_ctx: int) -> None:
        from benchmarks.engines import N_BATCH, N_UBATCH
        from benchmarks.measure import AbsentError

        python = setup.llama_cpp_python
        if python is None:
            raise AbsentError("llama-cpp-python: give --llama-cpp-python the Python of an environment that has it")
        options = {
            "model_path": str(setup.model),
            "n_ctx": n_ctx,
            "n_threads": setup.threads,
            "n_threads_batch": setup.threads,
            "n_batch": N_BATCH,
            "n_ubatch": N_UBATCH,
            "flash_attn": True,
            "n_gpu_layers": setup.gpu_layers,
        }
        configuration = json.dumps([options, 2 << 30])
        self._process = subprocess.Popen(
            [str(python), __file__, configuration],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        shown = ", ".join(
            f"{name}={value!r}" for name, value in {**options, "model_path": setup.model.name}.items()
        )
        try:
            version = self._answer()["version"]
        except (ValueError, KeyError) as error:
            self.close()
            shown = shlex.join([str(python), "-c", "import llama_cpp"])
            raise AbsentError(f"llama-cpp-python: it did not start; does `{shown}` work?") from error
        self.command = f"llama_cpp.Llama({shown}), {version}, with LlamaRAMCache(2 << 30)"

    def seconds(self, prompt: list[int], n_tokens: int) -> float:
        """Return the seconds of a greedy reply.

        Raises:
            PeerError: the process ended.
        """
        from benchmarks.measure import PeerError

        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"prompt": prompt, "n": n_tokens}) + "\n")
            self._process.stdin.flush()
            return float(self._answer()["seconds"])
        except (OSError, ValueError, KeyError) as error:
            raise PeerError(f"llama-cpp-python ended during a reply; exit status {self._process.poll()}") from error

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        answer: dict[str, float] = json.loads(self._process.stdout.readline())
        return answer

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the process."""
        self._process.kill()
        self._process.communicate()


def conversations(setup: Setup) -> Findings:
    """Compare conversations that take turns, one request at a time. Each turn sends the whole history."""
    from benchmarks.engines import Ours, Prompts, ask, whole_cells
    from benchmarks.measure import Figure, Findings, in_turn

    n_talks, n_turns = 4, setup.of(3, 2)
    n_first, n_more, n_tokens = setup.of(400, 40), setup.of(40, 8), setup.of(16, 4)
    n_ctx = whole_cells(n_first + n_turns * (n_more + n_tokens))
    prompts = Prompts(setup)
    rounds = [
        (prompts.many(n_talks, n_first), [prompts.many(n_talks, n_more) for _ in range(n_turns)])
        for _ in range(setup.runs)
    ]

    def talk(reply: Callable[[list[int]], float], run: int) -> float:
        firsts, turns = rounds[run]
        histories = [list(first) for first in firsts]
        for history in histories:
            reply(history)
        total = 0.0
        for turn in turns:
            for history, new_tokens in zip(histories, turn, strict=True):
                history += new_tokens
                total += reply(history)
        return total

    with Peer(setup, n_ctx) as peer, Ours(setup, n_ctx, n_seq_max=1) as ours:

        def of_ours(prompt: list[int]) -> float:
            reply = ask(ours, prompt, n_tokens)
            return reply.ended - reply.asked

        left = {"erllama": setup.runs, "peer": setup.runs}

        def next_run(name: str, reply: Callable[[list[int]], float]) -> float:
            left[name] -= 1
            return talk(reply, left[name])

        pair = in_turn(
            lambda: next_run("erllama", of_ours),
            lambda: next_run("peer", lambda prompt: peer.seconds(prompt, n_tokens)),
            setup.runs,
        )
        return Findings(
            [
                Figure(
                    "llama-cpp-python",
                    f"{n_talks} conversations in turn, {n_turns} more turns each: wall time",
                    "llama-cpp-python, LlamaRAMCache",
                    "s",
                    *pair,
                    None,
                    (f"{ours.command}.stream(history, max_tokens={n_tokens}, temperature=0)", peer.command),
                    ["first turns are cold on both sides and do not count"],
                )
            ]
        )


SCENARIOS: dict[str, Callable[[Setup], Findings]] = {"llama-cpp-python": conversations}

if __name__ == "__main__":
    serve(*json.loads(sys.argv[1]))
