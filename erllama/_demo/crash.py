"""The demonstration of a crash: a model's process is killed twice during a reply, which ends the same.

`erllama demo --crash` calls `run`.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from erllama._model.load import load_model
from erllama._model.model import Model
from erllama._runtime.printing import echo, one_line
from erllama.cache import Cache
from erllama.engine import Completion, TextDelta, ThinkingDelta

_PROMPT = [{"role": "user", "content": "Tell me a story about a fox named Pip."}]
_N_KILLS = 2
_SHOWN = 60  # characters before and after each kill


def run(path: Path, max_tokens: int) -> int:
    """Show an undisturbed reply, and the same reply while its process is killed. Return the exit status."""
    echo(f"model: {one_line(path.name)}, in a process of its own")
    with Cache() as cache, load_model(path, cache=cache, process=True) as model:
        echo(f"\nprocess {model.info.pid} writes a reply")
        expected, pauses = _write(model, max_tokens, kill_at=())
        usual = max(pauses, default=0.0)
        echo("\nthe same request again, and the process is killed twice meanwhile")
        n = len(expected.tokens)
        kill_at = tuple(n * (i + 1) // (_N_KILLS + 1) for i in range(_N_KILLS))
        reply, pauses = _write(model, max_tokens, kill_at=kill_at)
        restarts = model.restarts
    same = reply.tokens == expected.tokens
    longest = sorted(pauses)[-_N_KILLS:]
    echo(f"\nthe model's process was replaced {restarts} times within one reply of {n} tokens")
    echo(
        f"the longest waits for a token: {', '.join(f'{pause * 1e3:.0f} ms' for pause in longest)}; "
        f"undisturbed {usual * 1e3:.0f} ms"
    )
    echo("the same reply" if same else "DIFFERENT REPLY")
    return 0 if same and restarts == _N_KILLS else 1


def _write(model: Model, max_tokens: int, kill_at: tuple[int, ...]) -> tuple[Completion, list[float]]:
    """Write a reply, and kill the process after some tokens. Return the reply and the waits between its tokens."""
    # Another salt each time, so that both replies begin without a cache.
    salt = "killed" if kill_at else "undisturbed"
    text, n_tokens, pauses = "", 0, []
    last = 0.0
    with model.stream_chat(
        _PROMPT, max_tokens=max_tokens, temperature=0.0, reproducible=True, cache_salt=salt
    ) as stream:
        for event in stream:
            if not isinstance(event, TextDelta | ThinkingDelta):
                continue
            now = time.perf_counter()
            pauses += [now - last] if last else []
            last = now
            text += event.text
            before, n_tokens = n_tokens, n_tokens + len(event.tokens)
            if any(before < n <= n_tokens for n in kill_at):
                pid = model.info.pid
                echo(f"  {one_line(text[-_SHOWN:])}")
                echo(f"  --- killed process {pid} after {n_tokens} tokens ---")
                os.kill(pid, signal.SIGKILL)
        reply = stream.result()
    echo(f"  {one_line(text[-_SHOWN:])}")
    return reply, pauses
