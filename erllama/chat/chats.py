"""What a model needs to hold conversations: its templates, its family's markers, and what it said before.

Made once for a model, at its first chat. `turn` makes of a conversation a
request that the engine can run; the `Turn` makes of the engine's reply what the
caller gets. Nothing here knows how requests are run.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from erllama.cache import Cache
from erllama.chat.call_formats import ToolFormat
from erllama.chat.formats import find_tool_format, tool_format
from erllama.chat.history import History
from erllama.chat.messages import normalized_messages
from erllama.chat.quirks import as_template_takes, with_arguments_as_text
from erllama.chat.results import ChatCompletion, Usage
from erllama.chat.templates import CHATML, ChatTemplate
from erllama.chat.thinking import find_thinking
from erllama.chat.tools import ToolChoice, normalized_tools, tool_choice_of
from erllama.engine import (
    Backend,
    Completion,
    Event,
    Grammar,
    Markers,
    PhaseOptions,
    RequestOptions,
    ToolCall,
    ToolCallEnd,
    Vocabulary,
)
from erllama.engine.phases import Script
from erllama.errors import ChatError, GrammarError, OptionError, TemplateError, ToolCallError, boolean

log = logging.getLogger("erllama")

Message = dict[str, object]

# Stands for a reply's text where it is asked what a template writes after one.
_ANY_REPLY = "0b5f9d0e reply 7c41"


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What a caller asks of a chat, beside the options of every request.

    Attributes:
        messages, tools: as OpenAI's or Anthropic's clients write them.
        tool_choice: "auto", "none", "required", or a tool's name, or those clients' forms of it.
        parallel_tool_calls: whether one reply may call several tools.
        tool_format: the name of how the model writes calls; None to go by its template.
        chat_template: a template's text, the name of one of the model's, or a file's path; None for the model's.
        template_args: what the template gets beside the conversation.
        documents: what the template gets as documents.
        continue_final_message: go on with the last message, which is the assistant's.
        thinking: True, False, or None for what the template does of itself.
        thinking_markers, tool_markers, tool_payload_markers: what to go by instead of the template's own.
        thinking_budget, budget_message, signing_key: as of PhaseOptions.
    """

    messages: object
    tools: object = None
    tool_choice: object = None
    parallel_tool_calls: bool = True
    tool_format: str | None = None
    chat_template: str | Path | None = None
    template_args: Mapping[str, object] | None = None
    documents: Sequence[Mapping[str, object]] | None = None
    continue_final_message: bool = False
    thinking: bool | None = None
    thinking_markers: Markers | None = None
    tool_markers: Markers | None = None
    tool_payload_markers: Markers | None = None
    thinking_budget: int | None = None
    budget_message: str = ""
    signing_key: bytes | None = None


class Chats:
    """The conversations of one model. Thread-safe.

    Args:
        namespace: the root key of what a request with a salt may share.
    """

    def __init__(self, backend: Backend, cache: Cache, namespace: Callable[[str | None], bytes]) -> None:
        vocabulary: Vocabulary = backend.vocabulary
        self._templates: Mapping[str, str] = getattr(backend, "chat_templates", {})
        self._special: Mapping[str, str] = getattr(vocabulary, "special_texts", {})
        self._namespace, self._cache = namespace, cache
        self._lock = threading.Lock()
        self._warned = False
        self._compiled = lru_cache(maxsize=16)(self._compile)
        self.vocabulary = vocabulary
        self.script = Script(vocabulary)

    @cached_property
    def history(self) -> History:
        return History(self.vocabulary, self._cache)

    # --- templates

    def template(self, given: object = None, *, tools: bool = False) -> ChatTemplate:
        """The template of a conversation.

        Raises:
            TemplateError: it does not parse.
            OptionError: it is no template, nor the name of one.
        """
        if isinstance(given, Path):
            try:
                return self._compiled(given.expanduser().read_text("utf-8"))
            except (OSError, UnicodeDecodeError, RuntimeError) as error:
                raise OptionError(f"chat_template={str(given)!r} cannot be read: {error}") from None
        if isinstance(given, str) and given:
            return self._compiled(self._templates.get(given, given))
        if given is not None:
            raise OptionError(f"chat_template={given!r}; give a template's text, its name, or a pathlib.Path")
        return self._compiled(self._own(tools))

    def _own(self, tools: bool) -> str:
        if tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" in self._templates:
            return self._templates["default"]
        with self._lock:
            warned, self._warned = self._warned, True
        if not warned:
            log.warning("the model has no chat template; ChatML is used, which it may not know: give chat_template")
        return CHATML

    def _compile(self, source: str) -> ChatTemplate:
        names = dict(self._special)
        return ChatTemplate(
            source,
            bos_token=names.pop("bos_token", ""),
            eos_token=names.pop("eos_token", ""),
            special_tokens=names,
        )

    @cached_property
    def thinking_markers(self) -> Markers | None:
        """Those that the model's template knows of."""
        return find_thinking(self.template().source) if self._templates else None

    def render(self, request: ChatRequest, *, add_generation_prompt: bool = True) -> str:
        """A conversation as the template writes it."""
        tools = normalized_tools(request.tools) if request.tools is not None else []
        return self._rendered(request, normalized_messages(request.messages), tools, add_generation_prompt)

    def _rendered(
        self, request: ChatRequest, messages: list[Message], tools: list[Message], add_generation_prompt: bool
    ) -> str:
        template = self.template(request.chat_template, tools=bool(tools))
        if tools and not template.uses("tools"):
            raise ChatError("the chat template has no place for tools; give chat_template= with one that has")
        messages = as_template_takes(messages, template.source)
        args: dict[str, object] = {}
        for name in ("enable_thinking", "thinking"):
            if request.thinking is not None and template.uses(name):
                args[name] = request.thinking
        if not isinstance(request.template_args, Mapping | None):
            raise OptionError(f"template_args={request.template_args!r:.80}; give a mapping")
        args |= request.template_args or {}

        def rendered(messages: list[Message]) -> str:
            return template.render(
                messages,
                tools=tools or None,
                documents=request.documents,
                add_generation_prompt=add_generation_prompt and not request.continue_final_message,
                continue_final_message=request.continue_final_message,
                **args,
            )

        try:
            return rendered(messages)
        except TemplateError:
            # Some templates take the arguments of calls as JSON text.
            as_text = with_arguments_as_text(messages)
            if as_text == messages:
                raise
            with suppress(TemplateError):
                return rendered(as_text)
            raise

    # --- turns

    def turn(self, request: ChatRequest, options: RequestOptions) -> Turn:
        """A request for the next message of a conversation.

        Args:
            options: of the request, without phases.

        Raises:
            ChatError: the conversation or its tools are none, or the template refuses them.
            OptionError: an option is ill-typed, or contradicts another.
        """
        boolean("continue_final_message", request.continue_final_message)
        messages = normalized_messages(request.messages)
        tools = normalized_tools(request.tools) if request.tools is not None else []
        choice = tool_choice_of(request.tool_choice, tools)
        if request.continue_final_message and messages[-1]["role"] != "assistant":
            raise ChatError("continue_final_message goes on with the assistant's message", index=len(messages) - 1)
        text = self._rendered(request, messages, tools, True)
        source = self.template(request.chat_template, tools=bool(tools)).source
        family = _Family.of(request, source, bool(tools) and choice.kind != "none")
        options = replace(options, phases=self._phases(request, family, tools, choice, messages, text, options))
        if request.thinking is False and family.thinking is not None:
            options = self._without_thinking(options, family.thinking)
        namespace = self._namespace(options.cache_salt)
        prompt = self.history.tokens(namespace, text, as_text=options.reproducible)
        return Turn(self, request, messages, tools, family, text, prompt, options, namespace)

    def _phases(
        self,
        request: ChatRequest,
        family: _Family,
        tools: list[Message],
        choice: ToolChoice,
        messages: list[Message],
        text: str,
        options: RequestOptions,
    ) -> PhaseOptions | None:
        grammar, budget = None, request.thinking_budget
        boolean("parallel_tool_calls", request.parallel_tool_calls)
        if family.format is not None and not family.own_markers:
            grammar = self._call_grammar(family.format, tools, choice, parallel=request.parallel_tool_calls)
        if choice.kind == "required" and grammar is None:
            raise OptionError("tool_choice requires a call, and tool_markers do not tell how one is written")
        if choice.kind == "required" and options.grammar is not None:
            raise OptionError("a grammar for a reply that must be a tool call; leave one of them out")
        if request.thinking is False and family.thinking is not None:
            budget = 0
        if family.thinking is None and family.format is None and not family.skip and budget is None:
            return None
        begins = None
        if request.continue_final_message and family.thinking is not None:
            begins = _is_open(text[-len(str(messages[-1]["content"])) - 200 :], family.thinking)
        return PhaseOptions(
            thinking=family.thinking,
            calls=family.calls,
            payload=family.payload,
            leading=family.leading,
            skip=family.skip,
            call_grammar=grammar,
            calls_only=choice.kind == "required",
            begins=begins,
            opened=next((marker for marker in family.opens if text.endswith(marker)), ""),
            thinking_budget=budget,
            budget_message=request.budget_message,
            signing_key=request.signing_key,
        )

    def _call_grammar(
        self, format: ToolFormat, tools: list[Message], choice: ToolChoice, *, parallel: bool
    ) -> Grammar | None:
        try:
            return _lark(format.grammar(tools, name=choice.name, parallel=parallel, literal=self._literal))
        except GrammarError:
            if choice.kind == "required":
                raise
            # Some schemas cannot be kept to in some families' ways: the calls are then the model's own.
            log.info("calls are not kept to the tools' schemas", exc_info=True)
            return None

    def _without_thinking(self, options: RequestOptions, thinking: Markers) -> RequestOptions:
        """Tokens that open thinking are ruled out."""
        banned = [ids[0] for text in thinking.open if len(ids := self.script.tokens_of(text)) == 1]
        sampling = options.sampling
        return replace(options, sampling=replace(sampling, banned_tokens=(*sampling.banned_tokens, *banned)))

    def _literal(self, text: str) -> str:
        """A text, special tokens written out, in Lark."""
        parts = self.script.runs(self.script.of_marker(text))
        return " ".join(
            f"<[{part}]>" if isinstance(part, int) else _quoted(part.decode("utf-8", "replace")) for part in parts
        )

    # --- remembering

    def remember(self, turn: Turn, completion: Completion, message: Message) -> None:
        """What a reply was computed as, for when it comes back as text."""
        namespace = turn.namespace
        n_said, said = self._said(completion)
        if not self._is_told_by_text(completion.tokens[:n_said], said):
            return
        n_prompt = len(completion.context_tokens) - len(completion.tokens)
        tokens = np.array(completion.context_tokens[: n_prompt + n_said], np.int32)
        self.history.remember(namespace, turn.text.encode() + said, tokens)
        # What was cut short lacks its end, and what was thought may be left out: those come back as said, or not.
        if completion.finish_reason != "stop" or completion.stop_sequence is not None or completion.thinking:
            return
        try:
            written = self._as_it_comes_back(turn, completion, message)
        except ChatError:  # a template need not take a conversation that ends so
            return
        if written is not None:
            self.history.remember(namespace, written.encode(), tokens)

    def _is_told_by_text(self, tokens: Sequence[int], said: bytes) -> bool:
        """Whether no other conversation can have this text: it is whole, and spells no special token out."""
        try:
            said.decode()
        except UnicodeDecodeError:
            return False
        read = self.vocabulary.tokenize(said, add_special=False, parse_special=True).tolist()
        special = [token for token in tokens if not self.vocabulary.piece(token)]
        return bool(said) and special == [token for token in read if not self.vocabulary.piece(token)]

    def _said(self, completion: Completion) -> tuple[int, bytes]:
        """How many tokens of a reply were said, and what they say: those of a stop string were not."""
        pieces = [self.script.written(self.script.of_token(token)) for token in completion.tokens]
        if completion.stop_sequence is None:
            return len(pieces), b"".join(pieces)
        end = b"".join(pieces).rfind(completion.stop_sequence.encode())
        n = n_bytes = 0
        while n < len(pieces) and n_bytes + len(pieces[n]) <= end:
            n_bytes += len(pieces[n])
            n += 1
        return n, b"".join(pieces[:n])

    def _as_it_comes_back(self, turn: Turn, completion: Completion, message: Message) -> str | None:
        """A conversation up to the end of a reply's text, as the template writes it in later turns.

        None where that is not what was computed: where the template writes the prompt otherwise, or leaves out
        what the model thought.
        """
        request = replace(turn.request, continue_final_message=False)
        before = turn.messages
        if turn.request.continue_final_message:
            before, first = before[:-1], before[-1]
            message = {**message, "content": f"{first['content']}{message['content']}"}
        whole = self._rendered(request, normalized_messages([*before, message]), turn.tools, False)
        sample: Message = {"role": "assistant", "content": _ANY_REPLY}
        _, found, end = self._rendered(request, [*before, sample], turn.tools, False).rpartition(_ANY_REPLY)
        if not found or not whole.startswith(turn.text) or not whole.endswith(end):
            return None
        written = whole[: len(whole) - len(end)]
        if completion.thinking and completion.thinking not in written[len(turn.text) :]:
            return None
        return written if len(written) > len(turn.text) else None


@dataclass(frozen=True, slots=True)
class _Family:
    """How a model's replies are written.

    Attributes:
        format: how calls are read; None where no tools may be called.
        calls, payload, leading: how they are found.
        own_markers: calls are found by the caller's markers, which are no part of what `format` reads.
        thinking: between which it thinks.
        skip: what belongs to nothing.
        opens: what a prompt may end with that is the beginning of a reply's markers.
    """

    format: ToolFormat | None
    calls: Markers | None
    payload: Markers | None
    leading: tuple[str, ...]
    own_markers: bool
    thinking: Markers | None
    skip: tuple[str, ...]
    opens: tuple[str, ...]

    @classmethod
    def of(cls, request: ChatRequest, template: str, calling: bool) -> _Family:
        thinking = request.thinking_markers or find_thinking(template)
        known = find_tool_format(template)
        asked = None if request.tool_format is None else tool_format(request.tool_format)
        skip, opens = (known.skip, known.open) if known is not None else ((), ())
        if not calling:
            return cls(None, None, None, (), False, thinking, skip, opens)
        own = request.tool_markers
        if own is not None:
            payload = request.tool_payload_markers
            return cls(asked or tool_format("json"), own, payload, (), True, thinking, skip, opens)
        format = asked or known or tool_format("json")
        calls = Markers(format.open, format.close) if format.open else None
        payload = Markers(format.payload_open, format.payload_close) if format.payload_open else None
        return cls(format, calls, payload, format.leading, False, thinking, format.skip, format.open)

    def read(self, full: str, tools: Sequence[Message]) -> Sequence[ToolCall]:
        """The calls of what was written as one."""
        assert self.format is not None
        if self.own_markers and self.calls is not None:
            full = full.removeprefix(next(filter(full.startswith, self.calls.open), ""))
            full = full.removesuffix(next(filter(full.endswith, self.calls.close), ""))
        return self.format.parse(full, tools)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation: what the engine is asked, and what its reply is to the caller.

    Attributes:
        text: the conversation, as the template writes it.
        prompt: its tokens, int32, shape (n,).
        options: of the request.
        namespace: the root key of what it may share, and where it is remembered.
    """

    chats: Chats
    request: ChatRequest
    messages: list[Message]
    tools: list[Message]
    family: _Family
    text: str
    prompt: NDArray[np.int32]
    options: RequestOptions
    namespace: bytes

    def event(self, event: Event) -> Event:
        """An event of the engine's, with what a tool call means."""
        if isinstance(event, ToolCallEnd):
            calls, error = self._read(event.full)
            return replace(event, calls=calls, error=error)
        return event

    def finish(self, completion: Completion) -> ChatCompletion:
        """The reply; it is remembered for the turns that follow."""
        text = completion.text
        calls: list[ToolCall] = []
        errors: list[str] = []
        for full in completion.raw_tool_calls:
            found, error = self._read(full)
            calls += _with_own_ids(found, {call.id for call in calls})
            if error is not None:
                errors.append(error)
                text += full.decode("utf-8", "replace")
        message = _message(text, completion.thinking, calls)
        ended = completion.finish_reason == "stop" and completion.stop_sequence is None
        given = {field.name: getattr(completion, field.name) for field in fields(completion)}
        given |= {"text": text, "finish_reason": "tool_calls" if ended and calls else completion.finish_reason}
        prompt = len(completion.context_tokens) - len(completion.tokens)
        reply = ChatCompletion(
            **given,
            tool_calls=tuple(calls),
            tool_call_errors=tuple(errors),
            usage=Usage(prompt, completion.cache.tokens, len(completion.tokens)),
            message=message,
        )
        if not errors:  # such a text is put together otherwise
            self.chats.remember(self, completion, message)
        return reply

    def _read(self, full: bytes) -> tuple[tuple[ToolCall, ...], str | None]:
        try:
            return tuple(self.family.read(full.decode("utf-8", "replace"), self.tools)), None
        except ToolCallError as error:
            return (), str(error)


@lru_cache(maxsize=128)
def _lark(source: str) -> Grammar:
    """Grammars are checked when they are made, which takes a while; the tools of a chat stay the same."""
    return Grammar.lark(source)


def _message(text: str, thinking: str, calls: Sequence[ToolCall]) -> Message:
    message: Message = {"role": "assistant", "content": text}
    if thinking:
        message["reasoning_content"] = thinking
    if calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments_json}}
            for call in calls
        ]
    return message


def _with_own_ids(calls: Sequence[ToolCall], taken: set[str]) -> list[ToolCall]:
    """Some families count their calls in each span anew."""
    return [replace(call, id=f"{call.id}-{len(taken)}") if call.id in taken else call for call in calls]


def _is_open(text: str, markers: Markers) -> bool:
    """Whether a phase has begun in a text, and not ended."""
    opened = max(text.rfind(marker) for marker in markers.open)
    return opened > max((text.rfind(marker) for marker in markers.close), default=-1)


def _quoted(text: str) -> str:
    """A string of Lark's."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(escapes.get(character, character) for character in text) + '"'


__all__ = ["ChatRequest", "Chats", "TemplateError", "Turn"]
