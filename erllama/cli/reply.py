"""One reply in the terminal: streams its text, ends it on Ctrl-C, and formats its statistics."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Protocol, TypeVar

import erllama
from erllama._runtime.printing import one_line
from erllama.cli.console import (
    format_count,
    is_terminal,
    polled_progress_bar,
    print_dimmed,
    rich_console,
    write_dim_escape,
    write_reply,
)

# Shorter prompts are computed before a progress bar would be seen.
_MIN_TOKENS_FOR_BAR = 512
_MOST_OF_RESULT = 200  # characters of a tool's result that are shown

# Names of the tiers in memory; the other tiers are shown by their own names, such as "disk".
_PLACES = {"live": "live cells", "ram": "RAM", "ram_file": "RAM"}

ResultT = TypeVar("ResultT", covariant=True)


class Cancellable(Protocol):
    """A stream or a run that Ctrl-C ends."""

    def cancel(self) -> None: ...


class ReplyStream(Cancellable, Protocol[ResultT]):
    """What `stream_reply` reads: an `erllama.Stream`, or a `ToolStream`."""

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None, /
    ) -> object: ...

    def __iter__(self) -> Iterator[object]: ...

    def result(self) -> ResultT: ...


class Writer(Protocol):
    """Writes the parts of replies to a terminal or a pipe."""

    def write_text(self, text: str) -> None: ...

    def write_call(self, text: str) -> None:
        """Write a part of a tool call, as the model writes it."""

    def write_thinking(self, text: str) -> None: ...

    def end_thinking(self) -> None: ...

    def finish(self) -> None:
        """End a reply. Another one may follow."""


def stream_reply(
    model: erllama.Model,
    start: Callable[[], ReplyStream[ResultT]],
    count_prompt: Callable[[], int],
    writer: Writer | None = None,
    on_reply: Callable[[erllama.Completion], None] = lambda reply: None,
) -> ResultT:
    """Stream a reply to stdout, or the replies of a run of tools.

    Args:
        start: returns the stream.
        count_prompt: returns the length of the prompt in tokens, for a progress bar of a long prompt.
        writer: writes the reply. By default as plain text, with the thinking, dimmed, in a terminal only.
        on_reply: called with each complete reply.

    Returns:
        the result of the stream. The finish_reason of its reply is "cancelled" if Ctrl-C ended it.
    """
    writer = writer or PlainWriter()
    with _prompt_progress(model, count_prompt) as remove_bar:
        stream = start()
        with stream, _cancel_on_interrupt(stream):
            try:
                for event in stream:
                    remove_bar()
                    _write_event(writer, event)
                    if isinstance(event, erllama.Done):
                        on_reply(event.completion)
            finally:
                remove_bar()
                writer.finish()
            return stream.result()


def _write_event(writer: Writer, event: object) -> None:
    match event:
        case erllama.TextDelta():
            writer.write_text(event.text)
        case erllama.ToolCallDelta():
            writer.write_call(event.text)
        case erllama.ThinkingDelta():
            writer.write_thinking(event.text)
        case erllama.ThinkingEnd():
            writer.end_thinking()
        case erllama.Done():
            writer.finish()
        case erllama.ToolResult():
            print_dimmed(f"{one_line(event.call.name)}: {_shortened(one_line(event.content))}")


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_OF_RESULT else f"{text[:_MOST_OF_RESULT]}… ({len(text):,} characters)"


class PlainWriter:
    """Writes replies as plain text, and keeps track of dimmed text and line ends."""

    def __init__(self) -> None:
        self._shows_thinking = is_terminal() and not rich_console().is_dumb_terminal
        self._is_thinking = False
        self._last = "\n"

    def write_text(self, text: str) -> None:
        self.end_thinking()
        self._write(text)

    def write_call(self, text: str) -> None:
        self.write_text(text)

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
def _cancel_on_interrupt(stream: Cancellable) -> Iterator[None]:
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
    """Return "42 tokens, 31.0 tok/s, 498 of 512 prompt tokens from disk, 0.12 s to first token"."""
    timings, cache = reply.timings, reply.cache
    speed = tokens_per_second(timings.decode_tokens, timings.decode)
    prompt = format_count(prompt_tokens(reply), "prompt token")
    if cache.tokens:
        prompt = f"{cache.tokens:,} of {prompt} from {_PLACES.get(cache.tier or '', cache.tier)}"
    parts = [
        format_count(len(reply.tokens), "token"),
        *([f"{speed:.1f} tok/s"] if speed else []),
        prompt if cache.tokens else f"{prompt}, none cached",
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
