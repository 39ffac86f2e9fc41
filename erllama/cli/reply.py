"""One reply in the terminal: streams its text, ends it on Ctrl-C, and formats its statistics."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import erllama
from erllama.cli.console import (
    format_count,
    is_terminal,
    polled_progress_bar,
    rich_console,
    write_dim_escape,
    write_reply,
)

# Shorter prompts are computed before a progress bar would be seen.
_MIN_TOKENS_FOR_BAR = 512


def stream_reply(
    model: erllama.Model, start: Callable[[], erllama.Stream], count_prompt: Callable[[], int]
) -> erllama.Completion:
    """Stream a reply to stdout; show thinking, dimmed, in a terminal only.

    Args:
        start: returns the stream.
        count_prompt: returns the length of the prompt in tokens, for a progress bar of a long prompt.

    Returns:
        the complete reply. Its finish_reason is "cancelled" if Ctrl-C ended it.
    """
    writer = _ReplyWriter()
    with _prompt_progress(model, count_prompt) as remove_bar:
        stream = start()
        with stream, _cancel_on_interrupt(stream):
            for event in stream:
                match event:
                    case erllama.TextDelta() | erllama.ToolCallDelta():
                        remove_bar()
                        writer.write_text(event.text)
                    case erllama.ThinkingDelta():
                        remove_bar()
                        writer.write_thinking(event.text)
                    case erllama.ThinkingEnd():
                        writer.end_thinking()
            remove_bar()
            writer.finish()
            return stream.result()


class _ReplyWriter:
    """Writes the parts of one reply, and keeps track of dimmed text and line ends."""

    def __init__(self) -> None:
        self._shows_thinking = is_terminal() and not rich_console().is_dumb_terminal
        self._is_thinking = False
        self._last = "\n"

    def write_text(self, text: str) -> None:
        self.end_thinking()
        self._write(text)

    def write_thinking(self, text: str) -> None:
        if self._shows_thinking and text:
            if not self._is_thinking:
                self._is_thinking = True
                write_dim_escape(True)
            self._write(text)

    def end_thinking(self) -> None:
        if self._is_thinking:
            self._is_thinking = False
            write_dim_escape(False)
            self._write("\n\n")

    def finish(self) -> None:
        self.end_thinking()
        if self._last != "\n":
            self._write("\n")

    def _write(self, text: str) -> None:
        if text:
            write_reply(text)
            self._last = text[-1]


@contextmanager
def _prompt_progress(model: erllama.Model, count_prompt: Callable[[], int]) -> Iterator[Callable[[], None]]:
    n_prompt = count_prompt() if is_terminal(stderr=True) else 0
    if n_prompt < _MIN_TOKENS_FOR_BAR:
        yield lambda: None
        return

    def tokens_done() -> int:
        metrics = model.metrics
        return metrics.prefilled_tokens + metrics.cached_tokens + metrics.shared_tokens

    before = tokens_done()
    with polled_progress_bar("reading the prompt", lambda: min((tokens_done() - before) / n_prompt, 1.0)) as remove:
        yield remove


@contextmanager
def _cancel_on_interrupt(stream: erllama.Stream) -> Iterator[None]:
    """Cancel the stream on the first Ctrl-C; a second one ends the command."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        stream.cancel()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def prompt_tokens(reply: erllama.Completion) -> int:
    """Return the length of a reply's prompt in tokens."""
    return reply.n_prompt


def tokens_per_second(n_tokens: int, seconds: float) -> float:
    """Return a rate; 0 if there are no tokens or no time."""
    return n_tokens / seconds if n_tokens and seconds > 0 else 0.0


def statistics_line(reply: erllama.Completion) -> str:
    """Return a line such as "42 tokens, 31.0 tok/s, prompt 512 (498 cached, disk), 0.12 s to first token"."""
    timings, cache = reply.timings, reply.cache
    speed = tokens_per_second(timings.decode_tokens, timings.decode)
    cached = f" ({cache.tokens} cached, {cache.tier})" if cache.tokens else " (none cached)"
    parts = [
        format_count(len(reply.tokens), "token"),
        *([f"{speed:.1f} tok/s"] if speed else []),
        f"prompt {prompt_tokens(reply)}{cached}",
        f"{timings.queued + timings.restore + timings.prefill:.2f} s to first token",
    ]
    if reply.finish_reason not in ("stop", "tool_calls"):
        parts.append(reply.finish_reason.replace("_", " "))
    return ", ".join(parts)


def reply_json(model: erllama.Model, reply: erllama.Completion) -> dict[str, object]:
    """Return a reply and its statistics as a JSON object."""
    timings = reply.timings
    fields: dict[str, object] = {
        "model": model.id,
        "text": reply.text,
        "thinking": reply.thinking,
        "finish_reason": reply.finish_reason,
        "stop_sequence": reply.stop_sequence,
        "seed": reply.seed,
        "usage": {
            "prompt_tokens": prompt_tokens(reply),
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
        fields["message"] = reply.message
    return fields
