"""The demonstration: one process reads a prompt, the next one finds it read.

Each step runs in a process of its own, so that nothing but the cache
directory joins them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import platformdirs

import erllama
from erllama._load import load_model
from erllama._model import Model
from erllama.cache import Cache
from erllama.errors import Error

_PARAGRAPH = (
    "You are the keeper of a small lighthouse, and a patient teller of stories. Visitors climb the stairs to ask "
    "about the sea, the weather and the ships that pass. Answer in plain words, keep to what you have seen, and "
    "when you do not know a thing, say so. The lamp is lit at dusk and put out at dawn; between those hours you "
    "write down every vessel, its course and the hour, in a book that nobody has ever asked to read. "
)
_MORE = "A visitor asks: which ship did you see last night, and where was it going?"


@dataclass(frozen=True, slots=True)
class Step:
    """One completion of a worker process, as it reports it."""

    prompt_tokens: int
    text: str
    tokens: list[int]
    kind: str
    tier: str | None
    reused: int
    first_token_seconds: float
    total_seconds: float


def run(model: Path | None, n_tokens: int, max_tokens: int) -> int:
    """Show a cold start, then a warm one in a new process; returns the exit status."""
    random_weights = False
    if model is None:
        model, random_weights = _default_model()
    print(f"model: {model}" + ("  (random weights: its words mean nothing)" if random_weights else ""))
    with tempfile.TemporaryDirectory(prefix="erllama-demo-") as directory:
        arguments = [str(model), directory, str(n_tokens), str(max_tokens)]
        print(f"\nprocess 1 reads a prompt of about {n_tokens} tokens and ends")
        (cold,) = _worker("cold", arguments)
        _show("cold", cold)
        print("\nprocess 2 starts anew, with the same cache directory")
        again, longer = _worker("warm", arguments)
        _show("same prompt", again)
        _show("longer prompt", longer)
        stored = sum(path.stat().st_size for path in Path(directory).rglob("*.kvc"))
    same = "the same reply" if again.tokens == cold.tokens else "ANOTHER REPLY"
    print()
    _compare("first token", cold.first_token_seconds, again.first_token_seconds)
    _compare("whole reply", cold.total_seconds, again.total_seconds)
    print(f"{same}; {stored / 2**20:.1f} MiB on disk")
    return 0 if again.tokens == cold.tokens and longer.reused >= cold.prompt_tokens - 1 else 1


def work(step: str, model: Path, directory: Path, n_tokens: int, max_tokens: int) -> None:
    """What a worker process does: complete, and print one JSON object a completion."""
    # No RAM tier: what is shown comes from the disk, the second time in a process, too.
    with Cache(ram=0, disk=directory) as cache, load_model(model, cache=cache, n_ctx=n_tokens + 512) as loaded:
        prompt = _prompt(loaded, n_tokens)
        prompts = [prompt] if step == "cold" else [prompt, prompt + _MORE]
        for text in prompts:
            began = time.perf_counter()
            reply = loaded.complete(text, max_tokens=max_tokens, seed=1)
            print(
                json.dumps(
                    {
                        "prompt_tokens": len(reply.context_tokens) - len(reply.tokens),
                        "text": reply.text,
                        "tokens": reply.tokens,
                        "kind": reply.cache.kind,
                        "tier": reply.cache.tier,
                        "reused": reply.cache.tokens,
                        "first_token_seconds": reply.timings.restore + reply.timings.prefill,
                        "total_seconds": time.perf_counter() - began,
                    }
                )
            )


def _worker(step: str, arguments: list[str]) -> list[Step]:
    command = [sys.executable, "-m", "erllama", "demo-worker", step, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        reason = finished.stderr.strip().splitlines()
        raise Error(reason[-1].removeprefix("erllama: ") if reason else f"{step} process ended with no reason")
    return [Step(**json.loads(line)) for line in finished.stdout.splitlines()]


def _show(title: str, step: Step) -> None:
    text = step.text if len(step.text) <= 60 else step.text[:57] + "..."
    if step.tier:
        warmth = f"{step.kind} hit from {step.tier}, {step.reused} of {step.prompt_tokens} prompt tokens reused"
    else:
        warmth = f"nothing cached, {step.prompt_tokens} prompt tokens read"
    times = f"first token {step.first_token_seconds * 1e3:.1f} ms, whole reply {step.total_seconds * 1e3:.1f} ms"
    print(f"  {title + ':':15} {warmth}; {times}\n  {'':15} {text!r}")


def _compare(what: str, cold: float, warm: float) -> None:
    print(
        f"same prompt, {what}: {warm * 1e3:.1f} ms instead of {cold * 1e3:.1f} ms, {cold / warm:.1f} times faster"
    )


def _prompt(model: Model, n_tokens: int) -> str:
    """A text of about `n_tokens` tokens for this model."""
    per_paragraph = len(model.tokenize(_PARAGRAPH, add_special=False))
    paragraphs, rest = divmod(n_tokens, per_paragraph)
    return _PARAGRAPH * paragraphs + _PARAGRAPH[: len(_PARAGRAPH) * rest // per_paragraph]


def _default_model() -> tuple[Path, bool]:
    """The model that comes with erllama; else a small one, made once. Whether its weights are random."""
    find: Callable[[], Path] | None = getattr(erllama, "demo_model", None)
    if find is not None:
        return Path(find()), False
    path = Path(platformdirs.user_cache_dir("erllama")) / "models" / "random-small-q8_0.gguf"
    if path.exists():
        return path, True
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise Error(
            "the demonstration makes its own model with the package 'gguf': pip install 'erllama[models]', "
            "or give a model of yours with --model PATH"
        ) from None
    from erllama.testing.models import SMALL, write_llama

    print(f"making a model in {path}")
    return write_llama(path, SMALL, seed=1, quantization="Q8_0"), True
