"""One turn of a conversation: the request to the engine, and the reply as the caller receives it.

A `Turn` has the prompt's tokens and the request's options. It converts the engine's events and its `Completion`: it
reads tool calls and creates a `ChatCompletion`. Then it remembers the reply's tokens in `History` for later turns.
The façade calls it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from erllama._runtime.log import logger
from erllama._types import Message
from erllama.chat.content_masking import encode_marked
from erllama.chat.conversation import Conversation
from erllama.chat.family import Family
from erllama.chat.history import History
from erllama.chat.results import ChatCompletion, Usage
from erllama.engine import (
    Completion,
    Done,
    Event,
    RequestOptions,
    TextDelta,
    ThinkingDelta,
    ToolCall,
    ToolCallDelta,
    ToolCallEnd,
)
from erllama.errors import ChatError, ToolCallError

log = logger("erllama")

_PROMPT_END = 64  # characters at the end of a prompt in which thinking may begin


class _Span(NamedTuple):
    """One span of tool calls in a reply: its calls, or the error why it is not a call."""

    calls: tuple[ToolCall, ...]
    error: str | None


class Turn:
    """One turn of a conversation. Its events are converted by one thread at a time; the rest is thread-safe.

    Args:
        validated: names of the tools whose arguments are validated after a call is read.
        namespace: root key of the cache entries that the request may share. The turn is remembered under it.
        text: the rendered conversation.

    Attributes:
        prompt: tokens of the conversation, int32, shape (n,).
        options: options of the request.
    """

    def __init__(
        self,
        conversation: Conversation,
        family: Family,
        validated: frozenset[str],
        history: History,
        namespace: bytes,
        text: str,
        prompt: NDArray[np.int32],
        options: RequestOptions,
    ) -> None:
        self.prompt, self.options = prompt, options
        self._conversation, self._family, self._history = conversation, family, history
        self._namespace, self._text, self._validated = namespace, text, validated
        self._lock = threading.Lock()
        self._spans: list[_Span] = []  # the spans read so far, in order
        self._finished: ChatCompletion | None = None
        self._n_spans = 0  # spans in the events converted so far
        self._tokens: list[int] = []  # tokens in the events converted so far

    def convert_event(self, event: Event) -> Event:
        """Return an event of the engine as the caller receives it, with calls read and a `ChatCompletion`."""
        if isinstance(event, Done):
            return Done(self.finish(event.completion))
        if isinstance(event, ToolCallEnd):
            with self._lock:
                calls, error = self._read_span(self._n_spans, event.full)
            self._n_spans += 1
            return replace(event, calls=calls, error=error)
        if isinstance(event, TextDelta | ThinkingDelta | ToolCallDelta):
            self._tokens += event.tokens
        return event

    def abandon(self, *, later: bool = False) -> None:
        """Remember the part of the reply that was read. The caller reads no further.

        Args:
            later: remember it before the next turn, for callers such as `__del__` that must not take a lock.
        """
        if self._finished is None and self._tokens:
            tokens, self._tokens = self._tokens, []

            def remember() -> None:
                self._remember_tokens(self.prompt.tolist(), tokens, cut=True, stop=None)

            if later:
                self._history.defer(remember)
            else:
                remember()

    def finish(self, completion: Completion) -> ChatCompletion:
        """Return the reply, and remember it for later turns. Further calls return the same object."""
        with self._lock:
            if self._finished is None:
                self._finished = self._make_reply(completion)
            return self._finished

    def _make_reply(self, completion: Completion) -> ChatCompletion:
        spans = [self._read_span(i, full) for i, full in enumerate(completion.raw_tool_calls)]
        text, places = _insert_failed_spans(completion, spans)
        calls = [call for span in spans for call in span.calls]
        message = self._conversation.reply_message(
            text,
            completion.thinking,
            list(map(_call_message, calls)),
            within_character=bool(completion.tokens) and self._within_character,
        )
        ended_by_itself = completion.finish_reason == "stop" and not _was_stopped(completion)
        values = {field.name: getattr(completion, field.name) for field in fields(completion)}
        values |= {"text": text, "tool_call_places": places}
        values |= {"finish_reason": "tool_calls" if ended_by_itself and calls else completion.finish_reason}
        n_prompt = completion.n_prompt
        self._remember(completion, message, ended=ended_by_itself, text=text)
        return ChatCompletion(
            **values,
            tool_calls=tuple(calls),
            tool_call_errors=tuple(span.error for span in spans if span.error is not None),
            usage=Usage(n_prompt, completion.cache.tokens, len(completion.tokens)),
            message=message,
        )

    def _read_span(self, i: int, full: bytes) -> _Span:
        """Read the reply's span `i`, unless it was read before. The earlier spans were."""
        if i == len(self._spans):
            try:
                text, tools = full.decode("utf-8", "replace"), self._conversation.tools
                calls = self._family.read_calls(text, tools, self._validated)
                used = {call.id for span in self._spans for call in span.calls}
                self._spans.append(_Span(tuple(_with_unique_ids(calls, used)), None))
            except ToolCallError as error:
                self._spans.append(_Span((), str(error)))
        return self._spans[i]

    # --- Remembering the reply -----------------------------------------------------------------

    def _remember(self, completion: Completion, message: Message, *, ended: bool, text: str) -> None:
        """Remember the reply's tokens, under its text as written and as the template will render it.

        Args:
            ended: the reply ended by itself. A reply that was cut short within thinking or a call is rendered with
                an end that it did not have, so only its text as written is remembered. The same holds for a reply
                that ends within thinking.
            text: the reply's text, including spans that are not calls.
        """
        n_prompt = completion.n_prompt
        prompt = completion.context_tokens[:n_prompt]
        reply, stop = completion.tokens, completion.stop_sequence
        if completion.stop_token is not None:
            reply, stop = reply[:-1] if _was_stopped(completion) else reply, None
        remembered = self._remember_tokens(prompt, reply, cut=not ended, stop=stop)
        if not remembered or not ended:
            return
        if text != completion.text and (
            completion.thinking or message.get("tool_calls") or not self._is_whole_reply(completion, text)
        ):
            return
        reply_text = self._history.spell_out(completion.tokens).decode("utf-8", "replace")
        try:
            if self._family.is_thinking_at_end(self._thinking_context() + reply_text):
                return
            before = self._text.removesuffix("\ufffd") if self._within_character else self._text
            rendered = self._conversation.render_with_reply(message, before)
            if rendered is not None and not self._omits_empty_thinking(reply_text, rendered, completion.thinking):
                self._history.remember(self._namespace, encode_marked(rendered), completion.context_tokens)
        except ChatError:
            pass  # a template may refuse a conversation that ends in this way
        except Exception:
            log.exception("remembering a reply failed; the next turn may compute it again")

    @cached_property
    def _within_character(self) -> bool:
        """Whether the prompt ends within a character, which the reply completes."""
        return bool(self._history.partial_character(self._text, self.prompt[-8:].tolist()))

    def _thinking_context(self) -> str:
        """Return the end of the prompt, in which thinking may begin."""
        final = self._conversation.messages[-1]["content"] if self._conversation.continue_final else ""
        return f"{final}" or self._text[-_PROMPT_END:]

    def _omits_empty_thinking(self, reply_text: str, rendered: str, thinking: str) -> bool:
        """Return whether a reply began with empty thinking that the template does not render."""
        new = rendered[len(self._text) :]
        has_marker = self._family.has_thinking_marker
        return not thinking and has_marker(reply_text) and not has_marker(new)

    def _is_whole_reply(self, completion: Completion, text: str) -> bool:
        """Return whether a text is everything that the model wrote, apart from white space."""
        reply_text = self._history.spell_out(completion.tokens).decode("utf-8", "replace")
        return "".join(reply_text.split()) == "".join(text.split())

    def _remember_tokens(self, prompt: Sequence[int], reply: Sequence[int], *, cut: bool, stop: str | None) -> bool:
        """Remember the reply as written. Return whether all of it is remembered. Errors are logged, not raised."""
        try:
            return self._history.remember_reply(self._namespace, self._text, prompt, reply, cut=cut, stop=stop)
        except Exception:
            log.exception("remembering a reply failed; the next turn computes it again")
            return False


def _insert_failed_spans(completion: Completion, spans: Sequence[_Span]) -> tuple[str, tuple[int, ...]]:
    """Return the reply's text with the spans that are not calls in their places, and the places of all spans."""
    text, at, places = "", 0, []
    for full, place, span in zip(completion.raw_tool_calls, completion.tool_call_places, spans, strict=True):
        text, at = text + completion.text[at:place], place
        places.append(len(text))
        if span.error is not None:
            text += full.decode("utf-8", "replace")
    return text + completion.text[at:], tuple(places)


def _was_stopped(completion: Completion) -> bool:
    """Return whether a stop string or stop token ended the reply. An end token is not among the reply's tokens."""
    if completion.stop_token is not None:
        return completion.tokens[-1:] == (completion.stop_token,)
    return completion.stop_sequence is not None


def _call_message(call: ToolCall) -> Message:
    function = {"name": call.name, "arguments": call.arguments_json}
    return {"id": call.id, "type": "function", "function": function}


def _with_unique_ids(calls: Sequence[ToolCall], used: set[str]) -> list[ToolCall]:
    """Change ids that are used already. Some families number their calls in each span from the start."""
    return [replace(call, id=f"{call.id}-{len(used)}") if call.id in used else call for call in calls]
