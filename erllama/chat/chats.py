"""Chats of one model: from a chat request to a turn that the engine can run.

This is the entry point of the package. `Chats.prepare_turn` normalizes messages and tools (`messages`,
`tool_calls.tools`), renders them (`conversation`, `templates`), finds the tokens (`history`), and sets the engine's
options by the model's family (`family`). The result is a `Turn`, which converts the engine's reply into a
`ChatCompletion`. The façade creates one `Chats` for each model, and runs the requests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, lru_cache

from erllama.cache import Cache
from erllama.chat.content_masking import remove_marks
from erllama.chat.conversation import Conversation
from erllama.chat.family import Family
from erllama.chat.history import History
from erllama.chat.messages import normalize_messages
from erllama.chat.model_templates import ModelTemplates
from erllama.chat.request import ChatRequest
from erllama.chat.tool_calls.constrained_calls import CallConstraint
from erllama.chat.tool_calls.tools import (
    ToolChoice,
    check_schemas,
    find_strict_tools,
    normalize_tools,
    parse_tool_choice,
)
from erllama.chat.turn import Turn
from erllama.checks import boolean
from erllama.engine import Backend, Grammar, Markers, PhaseOptions, RequestOptions, Vocabulary
from erllama.engine.output.token_codec import TokenCodec
from erllama.engine.requests.prompts import PromptTokenizer
from erllama.errors import ChatError, OptionError, PromptTooLong

# Template variables that are set by separate arguments.
_RESERVED_ARGS = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")


class Chats:
    """Prepares the turns of one model's conversations. Thread-safe.

    Args:
        namespace: returns the root key of the cache entries that a request with a cache salt may share.

    Attributes:
        templates: the model's chat templates.
    """

    def __init__(self, backend: Backend, cache: Cache, namespace: Callable[[str | None], bytes]) -> None:
        vocabulary: Vocabulary = backend.vocabulary
        self.templates = ModelTemplates(
            getattr(backend, "chat_templates", {}), getattr(vocabulary, "special_texts", {})
        )
        self._namespace, self._cache = namespace, cache
        self._cached_constraint = lru_cache(maxsize=64)(self._make_constraint)
        self.vocabulary = vocabulary
        self._backend = backend
        self._codec = TokenCodec(vocabulary)

    @cached_property
    def history(self) -> History:
        """The tokens of earlier turns."""
        return History(self.vocabulary, self._cache)

    @property
    def thinking_markers(self) -> Markers | None:
        """The markers of thinking in the model's default template; None if it has none."""
        return self.templates.thinking_markers

    # --- Rendering -----------------------------------------------------------------------------

    def render(self, request: ChatRequest, *, add_generation_prompt: bool = True) -> str:
        """Return a conversation as the template renders it."""
        return remove_marks(self.render_marked(request, add_generation_prompt=add_generation_prompt))

    def render_marked(self, request: ChatRequest, *, add_generation_prompt: bool) -> str:
        """Return a rendered conversation with the marks that `History.tokens` reads."""
        return self._make_conversation(request).render(add_generation_prompt=add_generation_prompt)

    def _make_conversation(self, request: ChatRequest) -> Conversation:
        boolean("continue_final_message", request.continue_final_message)
        messages = normalize_messages(request.messages)
        tools = normalize_tools(request.tools)
        if request.continue_final_message and messages[-1]["role"] != "assistant":
            raise ChatError(
                "continue_final_message requires that the last message is the assistant's", index=len(messages) - 1
            )
        if request.continue_final_message and messages[-1].get("tool_calls"):
            raise ChatError(
                "continue_final_message continues text, and the last message ends with tool calls; remove them",
                index=len(messages) - 1,
            )
        _check_template_args(request.template_args)
        template = self.templates.choose(request.chat_template, tools=bool(tools))
        args: dict[str, object] = {}
        for name in ("enable_thinking", "thinking"):
            if request.thinking is not None and template.uses(name):
                args[name] = request.thinking
        args |= request.template_args or {}
        special = None
        if not boolean("special_tokens_in_content", request.special_tokens_in_content):
            special = self.history.special
        return Conversation(
            template, messages, tools, request.documents, args, request.continue_final_message, special
        )

    # --- Turns ---------------------------------------------------------------------------------

    def prepare_turn(self, request: ChatRequest, options: RequestOptions) -> Turn:
        """Return the turn of a request: its prompt and the options to run it with.

        Args:
            options: options of the request, without phases.

        Raises:
            ChatError: the messages or tools are invalid, or the template refuses them.
            OptionError: an option has the wrong type, or contradicts another.
            PromptTooLong: the conversation does not fit the context.
        """
        conversation = self._make_conversation(request)
        choice = parse_tool_choice(request.tool_choice, conversation.tools)
        text = conversation.render()
        conversation = conversation.with_stripped_content(text)
        n_ctx = self._backend.limits.n_ctx
        PromptTokenizer(self.vocabulary).check_length(text, n_ctx=n_ctx)
        namespace = self._namespace(options.cache_salt)
        prompt = self.history.tokens(namespace, text, as_text=options.reproducible)
        if len(prompt) > n_ctx:  # checked before the schemas of all tools are compiled
            raise PromptTooLong(
                f"the conversation has {len(prompt)} tokens and the context holds {n_ctx}; "
                "shorten it, or load the model with a larger n_ctx",
                n_tokens=len(prompt),
                n_ctx=n_ctx,
            )
        check_schemas(conversation.tools, find_strict_tools(request.tools))
        family = _find_family(request, conversation, choice)
        constraint = self._constrain_calls(request, family, choice, conversation)
        phases = self._phase_options(request, family, choice, constraint.grammar, conversation, text, options)
        options = replace(options, phases=phases)
        if request.thinking is False and family.thinking is not None:
            options = self._ban_thinking(options, family.thinking)
        return Turn(conversation, family, constraint.validated, self.history, namespace, text, prompt, options)

    def _constrain_calls(
        self, request: ChatRequest, family: Family, choice: ToolChoice, conversation: Conversation
    ) -> CallConstraint:
        boolean("parallel_tool_calls", request.parallel_tool_calls)
        if not family.may_call:
            return CallConstraint(None, frozenset())
        tools, strict = json.dumps(conversation.tools), find_strict_tools(request.tools)
        return self._cached_constraint(family, tools, choice, request.parallel_tool_calls, strict)

    def _make_constraint(
        self, family: Family, tools: str, choice: ToolChoice, parallel: bool, strict: frozenset[str]
    ) -> CallConstraint:
        """Return the constraint of calls. It is cached, since each turn of a chat has the same tools."""
        return family.constrain_calls(json.loads(tools), choice, self._codec, parallel=parallel, strict=strict)

    def _phase_options(
        self,
        request: ChatRequest,
        family: Family,
        choice: ToolChoice,
        grammar: Grammar | None,
        conversation: Conversation,
        text: str,
        options: RequestOptions,
    ) -> PhaseOptions | None:
        """Return how the engine separates the reply into text, thinking and calls; None if it need not."""
        if choice.kind == "required" and grammar is None:
            raise OptionError("tool_choice requires a call, and tool_markers do not define a grammar for one")
        if choice.kind == "required" and options.grammar is not None:
            raise OptionError(
                "a reply that must be a tool call cannot have a grammar; remove grammar or tool_choice"
            )
        budget = request.thinking_budget
        if request.thinking is False:
            if budget is not None or request.budget_message:
                raise OptionError("thinking is disabled and has a budget; remove one of them")
            budget = 0 if family.thinking is not None else None
        if family.thinking is None and family.format is None and not family.skip and budget is None:
            return None
        begins = None
        if request.continue_final_message and family.thinking is not None:
            begins = family.is_thinking_at_end(text[-len(str(conversation.messages[-1]["content"])) - 200 :])
        return PhaseOptions(
            thinking=family.thinking,
            calls=family.calls,
            payload=family.payload,
            quotes=family.quotes,
            leading=family.leading,
            skip=family.skip,
            call_grammar=grammar,
            calls_only=choice.kind == "required",
            starts_in_thinking=begins,
            open_marker=next((marker for marker in family.opens if text.endswith(marker)), ""),
            thinking_budget=budget,
            budget_message=request.budget_message,
            signing_key=request.signing_key,
        )

    def _ban_thinking(self, options: RequestOptions, thinking: Markers) -> RequestOptions:
        """Ban the tokens that begin thinking."""
        banned = [ids[0] for text in thinking.open if len(ids := self._codec.tokenize(text)) == 1]
        sampling = options.sampling
        return replace(options, sampling=replace(sampling, banned_tokens=(*sampling.banned_tokens, *banned)))


def _check_template_args(args: object) -> None:
    if not isinstance(args, Mapping | None):
        raise OptionError(f"template_args={args!r:.80}; expected a mapping")
    for name in args or ():
        if not isinstance(name, str):
            raise OptionError(f"template_args has the key {name!r:.80}; expected names of the template's variables")
        if name in _RESERVED_ARGS:
            raise OptionError(f"template_args has {name!r}, which is a separate argument; pass it as that argument")


def _find_family(request: ChatRequest, conversation: Conversation, choice: ToolChoice) -> Family:
    for name in ("tool_format", "tool_markers"):
        if getattr(request, name) is not None and request.tools is None:
            raise OptionError(f"{name} without tools; pass tools, which may be an empty list")
    return Family.from_template(
        conversation.template.source,
        may_call=bool(conversation.tools) and choice.kind != "none",
        format=request.tool_format,
        thinking=request.thinking_markers,
        calls=request.tool_markers,
        payload=request.tool_payload_markers,
    )
