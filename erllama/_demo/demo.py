"""The demonstration: a process computes a system prompt, and the next one restores it from the cache.

`erllama demo` calls `run`. Each step runs in a separate process, so the processes share only the cache directory.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import textwrap
import time
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from erllama._model.load import load_model
from erllama._model.model import Model
from erllama._runtime.printing import echo, one_line
from erllama._runtime.processes import erllama_command
from erllama.cache import Cache
from erllama.errors import Error

_SENTENCES = (
    "You are the keeper of a small lighthouse, and a patient teller of stories.",
    "Visitors climb the stairs to ask about the sea, the weather and the ships that pass.",
    "Answer in plain words, keep to what you have seen, and when you do not know a thing, say so.",
    "The lamp is lit at dusk and put out at dawn; between those hours you write down every vessel, its course and "
    "the hour, in a book that nobody has ever asked to read.",
    "When somebody asks for a story, tell one that has an end.",
    "Be polite, even when a visitor is in a hurry.",
    "The ladder is in the cellar.",
    "Use short sentences and common words.",
    "The library opens at 9 and closes at 17.",
    "In winter there are few visitors, and the evenings are long.",
    "A map costs 14 coins.",
    "Most visitors come by boat and stay for an hour.",
    "Mia looks after the garden.",
    "Tea is served in the kitchen all day.",
    "Lost things are kept for a month and then given away.",
)
_STORY = "Tell me a story about a fox named Pip."
_QUESTION = "Where is the ladder?"


@dataclass(frozen=True, slots=True)
class Step:
    """One reply, as a worker process reports it."""

    question: str
    text: str
    tokens: list[int]
    prompt_tokens: int
    hit_kind: str
    tier: str | None
    reused_tokens: int
    first_token_seconds: float
    total_seconds: float


def run(model: Path, n_tokens: int, max_tokens: int) -> int:
    """Show a cold reply, then the same reply from the cache in a new process. Return the exit status."""
    echo(f"model: {one_line(model.name)}")
    with tempfile.TemporaryDirectory(prefix="erllama-demo-") as directory:
        arguments = [str(model), directory, str(n_tokens), str(max_tokens)]
        echo(f"\nprocess 1 reads a system prompt of about {n_tokens} tokens, answers, and ends")
        (cold,) = _run_worker("cold", arguments)
        _show(cold)
        echo("\nprocess 2 starts with the same cache directory")
        again, later = _run_worker("warm", arguments)
        _show(again)
        _show(later)
        stored = sum(path.stat().st_size for path in Path(directory).rglob("*.kvc"))
    same = again.tokens == cold.tokens
    echo()
    _compare("first token", cold.first_token_seconds, again.first_token_seconds)
    _compare("whole reply", cold.total_seconds, again.total_seconds)
    echo(f"{'the same reply' if same else 'DIFFERENT REPLY'}; {stored / 2**20:.1f} MiB on disk")
    return 0 if same and min(again.reused_tokens, later.reused_tokens) >= cold.prompt_tokens - 1 else 1


def work(step: str, path: Path, directory: Path, n_tokens: int, max_tokens: int) -> None:
    """Run one worker process: generate its replies and print each as a JSON object."""
    n_ctx = n_tokens + 2 * max_tokens + 512
    # No RAM tier, so that stored blocks are read from the disk every time, even the second time in a process.
    with Cache(ram=0, disk=directory) as cache, load_model(path, cache=cache, n_ctx=n_ctx) as model:
        messages: list[dict[str, object]] = [{"role": "system", "content": _system_prompt(model, n_tokens)}]
        for question in (_STORY,) if step == "cold" else (_STORY, _QUESTION):
            messages.append({"role": "user", "content": question})
            start = time.perf_counter()
            reply = model.chat(messages, max_tokens=max_tokens, temperature=0.0)
            messages.append(reply.message)
            echo(
                json.dumps(
                    {
                        "question": question,
                        "text": reply.text or reply.thinking,
                        "tokens": reply.tokens,
                        "prompt_tokens": reply.usage.prompt,
                        "hit_kind": reply.cache.kind,
                        "tier": reply.cache.tier,
                        "reused_tokens": reply.usage.cached,
                        "first_token_seconds": reply.timings.restore + reply.timings.prefill,
                        "total_seconds": time.perf_counter() - start,
                    }
                )
            )


def _run_worker(step: str, arguments: list[str]) -> list[Step]:
    command = erllama_command("demo-worker", step, *arguments)
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        lines = finished.stderr.strip().splitlines()
        message = lines[-1].removeprefix("erllama: ") if lines else f"the {step} process failed without a message"
        raise Error(message)
    return [Step(**json.loads(line)) for line in finished.stdout.splitlines()]


def _show(step: Step) -> None:
    echo(f"  > {step.question}")
    echo(textwrap.fill(one_line(step.text), 100, initial_indent="    ", subsequent_indent="    "))
    times = f"first token {step.first_token_seconds * 1e3:.1f} ms, whole reply {step.total_seconds * 1e3:.1f} ms"
    if step.tier:
        reused = f"{step.reused_tokens} of {step.prompt_tokens} prompt tokens reused"
        echo(f"  {step.hit_kind} hit from {step.tier}, {reused}; {times}")
    else:
        echo(f"  no cache hit, {step.prompt_tokens} prompt tokens computed; {times}")


def _compare(what: str, cold: float, warm: float) -> None:
    echo(f"{what}: {warm * 1e3:.1f} ms instead of {cold * 1e3:.1f} ms, {cold / warm:.1f} times faster")


def _system_prompt(model: Model, n_tokens: int) -> str:
    """Return a system prompt of about `n_tokens` tokens for this model, with repeated sentences if it is long."""
    text, n_left = "", n_tokens
    for sentence in cycle(_SENTENCES):
        n_left -= len(model.tokenize(f" {sentence}", add_special=False))
        if text and n_left < 0:
            return text
        text = f"{text} {sentence}".strip()
    raise AssertionError("unreachable: cycle() does not end")
