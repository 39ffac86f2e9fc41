"""One turn of a conversation: what the engine is asked, and what its reply is to the caller."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from erllama._runtime.log import logger
from erllama.chat.content_masking import raw
from erllama.chat.conversation import Conversation, Message
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

_PROMPT_END = 64  # characters of a prompt's end in which a thought may begin


class _Read(NamedTuple):
    """What a tool call was read as."""

    calls: tuple[ToolCall, ...]
    error: str | None


class Turn:
    """One turn. Its events are read by one thread at a time; the rest is thread-safe.

    Args:
        checked: the names of tools whose arguments are validated after a call is read.
        text: the conversation, as its template writes it.
        namespace: the root key of what the request may share, and where the turn is remembered.

    Attributes:
        prompt: the conversation's tokens, int32, shape (n,).
        options: of the request.
    """

    def __init__(
        self,
        conversation: Conversation,
        family: Family,
        checked: frozenset[str],
        history: History,
        namespace: bytes,
        text: str,
        prompt: NDArray[np.int32],
        options: RequestOptions,
    ) -> None:
        self.prompt, self.options = prompt, options
        self._conversation, self._family, self._history = conversation, family, history
        self._namespace, self._text, self._checked = namespace, text, checked
        self._lock = threading.Lock()
        self._read: list[_Read] = []  # the reply's first calls
        self._finished: ChatCompletion | None = None
        self._n_calls = 0  # told in events
        self._tokens: list[int] = []  # told in events

    def event(self, event: Event) -> Event:
        """An event of the engine's, as the caller gets it: calls are read, and the reply is a chat's."""
        if isinstance(event, Done):
            return Done(self.finish(event.completion))
        if isinstance(event, ToolCallEnd):
            with self._lock:
                calls, error = self._call(self._n_calls, event.full)
            self._n_calls += 1
            return replace(event, calls=calls, error=error)
        if isinstance(event, TextDelta | ThinkingDelta | ToolCallDelta):
            self._tokens += event.tokens
        return event

    def abandon(self, *, later: bool = False) -> None:
        """Nobody will read on: what was read is remembered.

        Args:
            later: before the next turn, and not here, where no lock may be taken.
        """
        if self._finished is None and self._tokens:
            tokens, self._tokens = self._tokens, []

            def remember() -> None:
                self._remember_said(self.prompt.tolist(), tokens, cut=True, stop=None)

            if later:
                self._history.defer(remember)
            else:
                remember()

    def finish(self, completion: Completion) -> ChatCompletion:
        """The reply; it is remembered for the turns that follow. The same each time."""
        with self._lock:
            if self._finished is None:
                self._finished = self._reply(completion)
            return self._finished

    def _reply(self, completion: Completion) -> ChatCompletion:
        read = [self._call(i, full) for i, full in enumerate(completion.raw_tool_calls)]
        text, places = _text_in_order(completion, read)
        calls = [call for found, _ in read for call in found]
        message = self._conversation.message(
            text,
            completion.thinking,
            list(map(_as_message, calls)),
            within_character=bool(completion.tokens) and self._within_character,
        )
        ended = completion.finish_reason == "stop" and not _was_stopped(completion)
        given = {field.name: getattr(completion, field.name) for field in fields(completion)}
        given |= {"text": text, "tool_call_places": places}
        given |= {"finish_reason": "tool_calls" if ended and calls else completion.finish_reason}
        n_prompt = len(completion.context_tokens) - len(completion.tokens)
        self._remember(completion, message, ended=ended, text=text)
        return ChatCompletion(
            **given,
            tool_calls=tuple(calls),
            tool_call_errors=tuple(error for _, error in read if error is not None),
            usage=Usage(n_prompt, completion.cache.tokens, len(completion.tokens)),
            message=message,
        )

    def _call(self, i: int, full: bytes) -> _Read:
        """What the reply's call `i` is; those before it were read."""
        if i == len(self._read):
            try:
                said, tools = full.decode("utf-8", "replace"), self._conversation.tools
                found = self._family.read(said, tools, self._checked)
                taken = {call.id for calls, _ in self._read for call in calls}
                self._read.append(_Read(tuple(_with_own_ids(found, taken)), None))
            except ToolCallError as error:
                self._read.append(_Read((), str(error)))
        return self._read[i]

    # --- remembering

    def _remember(self, completion: Completion, message: Message, *, ended: bool, text: str) -> None:
        """What a reply was computed as, for when it comes back as text.

        Args:
            ended: by itself. What was cut short within a thought or a call comes back with an end that it had not;
                so does a thought that the reply ends within.
            text: the reply's, with what looked like a call and is none.
        """
        n_prompt = len(completion.context_tokens) - len(completion.tokens)
        prompt = completion.context_tokens[:n_prompt]
        reply, stop = completion.tokens, completion.stop_sequence
        if completion.stop_token is not None:
            reply, stop = reply[:-1] if _was_stopped(completion) else reply, None
        told = self._remember_said(prompt, reply, cut=not ended, stop=stop)
        if not told or not ended:
            return
        if text != completion.text and (
            completion.thinking or message.get("tool_calls") or not self._says_all(completion, text)
        ):
            return
        said = self._history.written(completion.tokens).decode("utf-8", "replace")
        try:
            if self._family.is_thinking_at_end(self._begun() + said):
                return
            before = self._text.removesuffix("\ufffd") if self._within_character else self._text
            written = self._conversation.as_it_comes_back(message, before)
            if written is not None and not self._leaves_thought_out(said, written, completion.thinking):
                self._history.remember(self._namespace, raw(written), completion.context_tokens)
        except ChatError:
            pass  # a template need not take a conversation that ends so
        except Exception:
            log.exception("remembering a reply failed; the next turn may compute it anew")

    @cached_property
    def _within_character(self) -> bool:
        """Whether the prompt ends within a character, which the reply completes."""
        return bool(self._history.begun(self._text, self.prompt[-8:].tolist()))

    def _begun(self) -> str:
        """What the prompt may have begun a thought with."""
        continued = self._conversation.messages[-1]["content"] if self._conversation.continued else ""
        return f"{continued}" or self._text[-_PROMPT_END:]

    def _leaves_thought_out(self, said: str, written: str, thinking: str) -> bool:
        """Whether a reply began with an empty thought, which the template writes nothing of."""
        new = written[len(self._text) :]
        return not thinking and self._family.mentions_thinking(said) and not self._family.mentions_thinking(new)

    def _says_all(self, completion: Completion, text: str) -> bool:
        """Whether a text is all that the model wrote, white space apart."""
        said = self._history.written(completion.tokens).decode("utf-8", "replace")
        return "".join(said.split()) == "".join(text.split())

    def _remember_said(self, prompt: Sequence[int], reply: Sequence[int], *, cut: bool, stop: str | None) -> bool:
        """Whether all of a reply is now remembered as it was said; no mistake in that fails a reply."""
        try:
            return self._history.remember_reply(self._namespace, self._text, prompt, reply, cut=cut, stop=stop)
        except Exception:
            log.exception("remembering a reply failed; the next turn computes it anew")
            return False


def _text_in_order(completion: Completion, read: Sequence[_Read]) -> tuple[str, tuple[int, ...]]:
    """A reply's text, with what looked like a call and is none in its place; and the places of all calls."""
    text, at, places = "", 0, []
    for full, place, (_, error) in zip(completion.raw_tool_calls, completion.tool_call_places, read, strict=True):
        text, at = text + completion.text[at:place], place
        places.append(len(text))
        if error is not None:
            text += full.decode("utf-8", "replace")
    return text + completion.text[at:], tuple(places)


def _was_stopped(completion: Completion) -> bool:
    """Whether it ended at a stop string or a stop token, and not by itself: an end token is none of its tokens."""
    if completion.stop_token is not None:
        return completion.tokens[-1:] == (completion.stop_token,)
    return completion.stop_sequence is not None


def _as_message(call: ToolCall) -> Message:
    function = {"name": call.name, "arguments": call.arguments_json}
    return {"id": call.id, "type": "function", "function": function}


def _with_own_ids(calls: Sequence[ToolCall], taken: set[str]) -> list[ToolCall]:
    """Some families count their calls in each span anew."""
    return [replace(call, id=f"{call.id}-{len(taken)}") if call.id in taken else call for call in calls]
