"""One reply in the terminal: its text as it comes, Ctrl-C that ends it and keeps what came, what it cost."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import erllama
from erllama.cli.console import dim, is_terminal, terminal, watching, write_reply

# Prompts shorter than this are read before a bar would be seen.
_LONG_PROMPT = 512


def show(
    model: erllama.Model, begin: Callable[[], erllama.Stream], count_prompt: Callable[[], int]
) -> erllama.Completion:
    """Write a reply to stdout as it comes; thoughts, dimmed, only to a terminal.

    Args:
        begin: makes the stream.
        count_prompt: tells the tokens of the prompt, for a bar while a long one is read.

    Returns:
        the whole reply; one that Ctrl-C ended has the finish_reason "cancelled".
    """
    screen = _Screen()
    with _prompt_bar(model, count_prompt) as stop:
        stream = begin()
        with stream, _interruptible(stream):
            for event in stream:
                match event:
                    case erllama.TextDelta() | erllama.ToolCallDelta():
                        stop()
                        screen.say(event.text)
                    case erllama.ThinkingDelta():
                        stop()
                        screen.think(event.text)
                    case erllama.ThinkingEnd():
                        screen.end_thought()
            stop()
            screen.finish()
            return stream.result()


class _Screen:
    """What of a reply is on the screen."""

    def __init__(self) -> None:
        self._watched = is_terminal() and not terminal().is_dumb_terminal
        self._thinking = False
        self._last = "\n"

    def say(self, text: str) -> None:
        self.end_thought()
        self._write(text)

    def think(self, text: str) -> None:
        if self._watched and text:
            if not self._thinking:
                self._thinking = True
                dim(True)
            self._write(text)

    def end_thought(self) -> None:
        if self._thinking:
            self._thinking = False
            dim(False)
            self._write("\n\n")

    def finish(self) -> None:
        self.end_thought()
        if self._last != "\n":
            self._write("\n")

    def _write(self, text: str) -> None:
        if text:
            write_reply(text)
            self._last = text[-1]


@contextmanager
def _prompt_bar(model: erllama.Model, count_prompt: Callable[[], int]) -> Iterator[Callable[[], None]]:
    n_prompt = count_prompt() if is_terminal(stderr=True) else 0
    if n_prompt < _LONG_PROMPT:
        yield lambda: None
        return

    def read() -> int:
        counts = model.metrics
        return counts.prefilled_tokens + counts.cached_tokens + counts.shared_tokens

    before = read()
    with watching("reading the prompt", lambda: min((read() - before) / n_prompt, 1.0)) as stop:
        yield stop


@contextmanager
def _interruptible(stream: erllama.Stream) -> Iterator[None]:
    """Ctrl-C ends the reply, which then still has its end; a second one, what we do."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        stream.cancel()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def n_prompt_tokens(reply: erllama.Completion) -> int:
    """Tokens of a reply's prompt."""
    return len(reply.context_tokens) - len(reply.tokens)


def tokens_per_second(n_tokens: int, seconds: float) -> float:
    """A rate; 0 where there is nothing to tell it by."""
    return n_tokens / seconds if n_tokens and seconds > 0 else 0.0


def cost(reply: erllama.Completion) -> str:
    """A line such as "42 tokens, 31.0 tok/s, prompt 512 (498 cached, disk), 0.12 s to first token"."""
    timings, cache = reply.timings, reply.cache
    speed = tokens_per_second(timings.decode_tokens, timings.decode)
    warm = f" ({cache.tokens} cached, {cache.tier})" if cache.tokens else " (none cached)"
    parts = [
        f"{len(reply.tokens)} token{'' if len(reply.tokens) == 1 else 's'}",
        *([f"{speed:.1f} tok/s"] if speed else []),
        f"prompt {n_prompt_tokens(reply)}{warm}",
        f"{timings.queued + timings.restore + timings.prefill:.2f} s to first token",
    ]
    if reply.finish_reason not in ("stop", "tool_calls"):
        parts.append(reply.finish_reason.replace("_", " "))
    return ", ".join(parts)


def as_json(model: erllama.Model, reply: erllama.Completion) -> dict[str, object]:
    """A reply for programs."""
    timings = reply.timings
    found: dict[str, object] = {
        "model": model.id,
        "text": reply.text,
        "thinking": reply.thinking,
        "finish_reason": reply.finish_reason,
        "stop_sequence": reply.stop_sequence,
        "seed": reply.seed,
        "usage": {
            "prompt_tokens": n_prompt_tokens(reply),
            "cached_tokens": reply.cache.tokens,
            "completion_tokens": len(reply.tokens),
        },
        "cache": {"kind": reply.cache.kind, "tier": reply.cache.tier, "tokens": reply.cache.tokens},
        "timings": {
            "queued_seconds": round(timings.queued, 6),
            "restore_seconds": round(timings.restore, 6),
            "prefill_seconds": round(timings.prefill, 6),
            "decode_seconds": round(timings.decode, 6),
            "prefill_tokens_per_second": round(tokens_per_second(timings.prefill_tokens, timings.prefill), 2),
            "decode_tokens_per_second": round(tokens_per_second(timings.decode_tokens, timings.decode), 2),
        },
    }
    if isinstance(reply, erllama.ChatCompletion):
        found["message"] = reply.message
    return found
