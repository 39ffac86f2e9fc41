"""What a model needs to hold conversations: its templates, its family's markers, and what it said before.

Made once for a model, at its first chat. `turn` makes of a conversation a
request that the engine can run; the `Turn` makes of the engine's reply what the
caller gets. Nothing here knows how requests are run.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

from erllama._runtime.log import logger
from erllama.cache import Cache
from erllama.chat.content_masking import without_marks
from erllama.chat.conversation import Conversation
from erllama.chat.family import CallGrammar, Family
from erllama.chat.history import History
from erllama.chat.messages import normalized_messages
from erllama.chat.templates.template import CHATML, ChatTemplate
from erllama.chat.thinking import find_thinking
from erllama.chat.tool_calls.tools import ToolChoice, check_schemas, normalized_tools, strict_names, tool_choice_of
from erllama.chat.turn import Turn
from erllama.engine import Backend, Grammar, Markers, PhaseOptions, RequestOptions, Vocabulary
from erllama.engine.output.phases import Script
from erllama.engine.requests.prompts import PromptTokenizer
from erllama.errors import ChatError, OptionError, PromptTooLong, boolean

log = logger("erllama")

# What a template gets under names that are not the caller's to give.
_OF_CONVERSATION = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")


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
        special_tokens_in_content: whether the content of messages that are not the assistant's may spell them out.
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
    special_tokens_in_content: bool = True
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
        self._call_grammar = lru_cache(maxsize=64)(self._make_call_grammar)
        self.vocabulary = vocabulary
        self._backend = backend
        self.script = Script(vocabulary)

    @cached_property
    def history(self) -> History:
        return History(self.vocabulary, self._cache)

    @property
    def _n_ctx(self) -> int:
        return self._backend.limits.n_ctx

    # --- templates

    def template(self, given: object = None, *, tools: bool = False) -> ChatTemplate:
        """The template of a conversation.

        Raises:
            TemplateError: it does not parse.
            OptionError: it is no template, nor the name of one, or the file of one that can be read.
        """
        if isinstance(given, Path):
            try:
                return self._compiled(given.expanduser().read_text("utf-8"))
            except (OSError, ValueError, RuntimeError) as error:  # no UTF-8, no path, no home
                raise OptionError(f"chat_template={str(given)!r} cannot be read: {error}") from None
        if isinstance(given, str) and given in self._templates:
            return self._compiled(self._templates[given])
        if isinstance(given, str) and "{" in given:
            return self._compiled(given)
        if given is not None:
            names = ", ".join(map(repr, self._templates)) or "none"
            raise OptionError(
                f"chat_template={given!r:.80} is no template, nor the name of one of the model's ({names}); "
                "give a template's text, such a name, or the pathlib.Path of a file"
            )
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
        return without_marks(self.render_marked(request, add_generation_prompt=add_generation_prompt))

    def render_marked(self, request: ChatRequest, *, add_generation_prompt: bool) -> str:
        """A conversation as the template writes it, as `history` takes it."""
        return self._conversation(request).text(add_generation_prompt=add_generation_prompt)

    def _conversation(self, request: ChatRequest) -> Conversation:
        boolean("continue_final_message", request.continue_final_message)
        messages = normalized_messages(request.messages)
        tools = normalized_tools(request.tools)
        if request.continue_final_message and messages[-1]["role"] != "assistant":
            raise ChatError("continue_final_message goes on with the assistant's message", index=len(messages) - 1)
        if request.continue_final_message and messages[-1].get("tool_calls"):
            raise ChatError(
                "continue_final_message goes on with a text, and this message ends with tool calls; leave them out",
                index=len(messages) - 1,
            )
        _check_template_args(request.template_args)
        template = self.template(request.chat_template, tools=bool(tools))
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

    # --- turns

    def turn(self, request: ChatRequest, options: RequestOptions) -> Turn:
        """A request for the next message of a conversation.

        Args:
            options: of the request, without phases.

        Raises:
            ChatError: the conversation or its tools are none, or the template refuses them.
            OptionError: an option is ill-typed, or contradicts another.
        """
        conversation = self._conversation(request)
        choice = tool_choice_of(request.tool_choice, conversation.tools)
        text = conversation.text()
        conversation = conversation.as_written(text)
        PromptTokenizer(self.vocabulary).check_length(text, n_ctx=self._n_ctx)
        namespace = self._namespace(options.cache_salt)
        prompt = self.history.tokens(namespace, text, as_text=options.reproducible)
        if len(prompt) > self._n_ctx:  # before the schemas of all tools are compiled
            raise PromptTooLong(
                f"the conversation has {len(prompt)} tokens and the context holds {self._n_ctx}; "
                "shorten it, or load the model with a larger n_ctx"
            )
        check_schemas(conversation.tools, strict_names(request.tools))
        family = _family(request, conversation, choice)
        calls = self._calls(request, family, choice, conversation)
        phases = self._phases(request, family, choice, calls.grammar, conversation, text, options)
        options = replace(options, phases=phases)
        if request.thinking is False and family.thinking is not None:
            options = self._without_thinking(options, family.thinking)
        return Turn(conversation, family, calls.checked, self.history, namespace, text, prompt, options)

    def _calls(
        self, request: ChatRequest, family: Family, choice: ToolChoice, conversation: Conversation
    ) -> CallGrammar:
        """What keeps calls to the tools' schemas."""
        boolean("parallel_tool_calls", request.parallel_tool_calls)
        if not family.calling:
            return CallGrammar(None, frozenset())
        tools, strict = json.dumps(conversation.tools), strict_names(request.tools)
        return self._call_grammar(family, tools, choice, request.parallel_tool_calls, strict)

    def _phases(
        self,
        request: ChatRequest,
        family: Family,
        choice: ToolChoice,
        grammar: Grammar | None,
        conversation: Conversation,
        text: str,
        options: RequestOptions,
    ) -> PhaseOptions | None:
        if choice.kind == "required" and grammar is None:
            raise OptionError("tool_choice requires a call, and tool_markers do not tell how one is written")
        if choice.kind == "required" and options.grammar is not None:
            raise OptionError("a grammar for a reply that must be a tool call; leave one of them out")
        budget = request.thinking_budget
        if request.thinking is False:
            if budget is not None or request.budget_message:
                raise OptionError("a budget of thinking, which is disabled; leave one of them out")
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
            begins=begins,
            opened=next((marker for marker in family.opens if text.endswith(marker)), ""),
            thinking_budget=budget,
            budget_message=request.budget_message,
            signing_key=request.signing_key,
        )

    def _make_call_grammar(
        self, family: Family, tools: str, choice: ToolChoice, parallel: bool, strict: frozenset[str]
    ) -> CallGrammar:
        """What calls must be of. The tools of a chat come with each turn; so does what is made of them."""
        return family.grammar(json.loads(tools), choice, self.script, parallel=parallel, strict=strict)

    def _without_thinking(self, options: RequestOptions, thinking: Markers) -> RequestOptions:
        """Tokens that open thinking are ruled out."""
        banned = [ids[0] for text in thinking.open if len(ids := self.script.tokens_of(text)) == 1]
        sampling = options.sampling
        return replace(options, sampling=replace(sampling, banned_tokens=(*sampling.banned_tokens, *banned)))


def _check_template_args(given: object) -> None:
    if not isinstance(given, Mapping | None):
        raise OptionError(f"template_args={given!r:.80}; give a mapping")
    for name in given or ():
        if not isinstance(name, str):
            raise OptionError(f"template_args has {name!r:.80}; give the names of the template's variables")
        if name in _OF_CONVERSATION:
            raise OptionError(f"template_args has {name!r}, which is of the conversation; give it as an argument")


def _family(request: ChatRequest, conversation: Conversation, choice: ToolChoice) -> Family:
    """How the model writes what is no text, as far as it may."""
    for name in ("tool_format", "tool_markers"):
        if getattr(request, name) is not None and request.tools is None:
            raise OptionError(f"{name} without tools; give tools, which may be an empty list")
    return Family.of(
        conversation.template.source,
        calling=bool(conversation.tools) and choice.kind != "none",
        format=request.tool_format,
        thinking=request.thinking_markers,
        calls=request.tool_markers,
        payload=request.tool_payload_markers,
    )
