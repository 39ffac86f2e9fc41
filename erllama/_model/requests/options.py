"""Options of requests, as the methods of `Model` take them, checked for the engine.

The TypedDicts name the options for type checkers; the functions below them make `RequestOptions` and `ChatRequest`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypedDict, cast

from erllama._model.requests.speculation import DraftModel, drafter_factory
from erllama.chat.functions import Tool
from erllama.chat.request import ChatRequest
from erllama.checks import choice, reject_unknown, seconds, shown
from erllama.engine import (
    Drafter,
    Grammar,
    Markers,
    PhaseOptions,
    RequestOptions,
    SamplingOptions,
    SamplingState,
    Step,
    Vocabulary,
)
from erllama.engine.grammar.schemas.json_schema import to_source as schema_source
from erllama.errors import OptionError

# Texts that open a phase and texts that close it: one of each, or several.
MarkerPair = tuple[str | Sequence[str], str | Sequence[str]]


class PrefillOptions(TypedDict, total=False):
    """Options of `Model.prefill`; see `Model.complete`."""

    reproducible: bool
    cache_salt: str | None
    parent_key: bytes | None
    session_id: str | None
    timeout: float | None


class CompletionOptions(PrefillOptions, total=False):
    """Options of `Model.complete` and of its streaming and asyncio forms."""

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    logit_bias: Mapping[int, float] | None
    banned_tokens: Sequence[int]
    repeat_penalty: float
    repeat_last_n: int
    frequency_penalty: float
    presence_penalty: float
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_penalty_last_n: int
    dry_sequence_breakers: Sequence[str]
    top_n_sigma: float
    typical_p: float
    xtc_probability: float
    xtc_threshold: float
    dynatemp_range: float
    dynatemp_exponent: float
    mirostat: int
    mirostat_tau: float
    mirostat_eta: float
    min_keep: int
    samplers: Sequence[str | Step]
    sampling_state: SamplingState | None
    grammar: str | Grammar | None
    json_schema: Mapping[str, object] | bool | str | None
    regex: str | None
    grammar_triggers: Sequence[str | int]
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    logprobs: int | None
    thinking: str | bool | None
    thinking_markers: MarkerPair | None
    thinking_budget_tokens: int | None
    thinking_budget_message: str
    thinking_signing_key: bytes | None
    tool_markers: MarkerPair | None
    tool_payload_markers: MarkerPair | None
    speculative: str | Drafter | DraftModel | None
    speculative_tokens: int


class TemplateOptions(TypedDict, total=False):
    """Options of `Model.apply_chat_template` and `Model.render_chat`; see `Model.chat`."""

    tools: Sequence[Tool] | None
    chat_template: str | Path | None
    template_args: Mapping[str, object] | None
    documents: Sequence[Mapping[str, object]] | None
    continue_final_message: bool
    special_tokens_in_content: bool
    thinking: str | bool | None


class PinOptions(TemplateOptions, total=False):
    """Options of `Model.pin`."""

    name: str | None
    ttl: float | str | None
    cache_salt: str | None
    timeout: float | None


class ToolRunOptions(CompletionOptions, total=False):
    """Options of `Model.run_tools` and of its streaming and asyncio forms."""

    tool_choice: str | Mapping[str, object] | None
    parallel_tool_calls: bool
    tool_format: str | None
    chat_template: str | Path | None
    template_args: Mapping[str, object] | None
    documents: Sequence[Mapping[str, object]] | None
    continue_final_message: bool
    special_tokens_in_content: bool


class ChatOptions(ToolRunOptions, total=False):
    """Options of `Model.chat` and of its streaming and asyncio forms."""

    tools: Sequence[Tool] | None


_PHASE_OPTIONS = (
    "thinking",
    "thinking_markers",
    "thinking_budget_tokens",
    "thinking_budget_message",
    "thinking_signing_key",
    "tool_markers",
    "tool_payload_markers",
)
_SAMPLING = frozenset(SamplingOptions.__dataclass_fields__)
_PREFILL = frozenset(PrefillOptions.__annotations__)
_COMPLETION = frozenset(CompletionOptions.__annotations__) | _PREFILL
_TEMPLATE = frozenset(TemplateOptions.__annotations__)
_CHAT = frozenset(ChatOptions.__annotations__) - _COMPLETION
_PIN = frozenset(PinOptions.__annotations__) - _TEMPLATE


def template_request(messages: object, options: TemplateOptions, where: str) -> ChatRequest:
    """Return the request to render a conversation. `Chats` checks the values when it renders."""
    checked = _known(options, _TEMPLATE, where)
    checked["thinking"] = thinking_choice(checked.get("thinking"))
    return ChatRequest(messages, **checked)  # type: ignore[arg-type]


def pin_options(options: PinOptions, where: str) -> tuple[dict[str, object], TemplateOptions]:
    """Return the options of a pin itself, unchecked, and those that change how its messages are rendered."""
    known = _known(options, _PIN | _TEMPLATE, where)
    own = {name: value for name, value in known.items() if name in _PIN}
    template = {name: value for name, value in known.items() if name in _TEMPLATE and value is not None}
    return own, cast(TemplateOptions, template)


def pin_ttl(value: object) -> float:
    """Return the time to live of a pin in seconds.

    Raises:
        OptionError: it is not a duration of more than 0 seconds.
    """
    found = seconds("ttl", value)
    if not found:
        raise OptionError(f"ttl={value!r}; pass more than 0 seconds, or leave it out")
    return found


def chat_request(
    messages: object, options: ChatOptions, where: str, cache_salt: str | None, vocabulary: Vocabulary
) -> tuple[ChatRequest, RequestOptions]:
    """Return a chat request and the checked options of its completion, without phases.

    Args:
        where: the method's name, for error messages.
        cache_salt: the model's own.
        vocabulary: the model's.
    """
    completion = _known(options, _COMPLETION | _CHAT, where)
    chat: dict[str, object] = {name: completion.pop(name) for name in _CHAT & completion.keys()}
    phases = _pop_phase_options(completion)
    request = ChatRequest(
        messages,
        thinking=thinking_choice(phases["thinking"]),
        thinking_markers=markers("thinking_markers", phases["thinking_markers"]),
        tool_markers=markers("tool_markers", phases["tool_markers"]),
        tool_payload_markers=markers("tool_payload_markers", phases["tool_payload_markers"]),
        thinking_budget=phases["thinking_budget_tokens"],  # type: ignore[arg-type]
        budget_message=phases["thinking_budget_message"] or "",  # type: ignore[arg-type]
        signing_key=phases["thinking_signing_key"],  # type: ignore[arg-type]
        **chat,  # type: ignore[arg-type]
    )
    checked = request_options(completion, where, cache_salt, vocabulary=vocabulary)  # type: ignore[arg-type]
    return request, checked


def prefill_options(options: PrefillOptions, where: str, cache_salt: str | None) -> RequestOptions:
    """Return the checked options of a request that samples no token; arguments as of `request_options`."""
    return _checked({**_known(options, _PREFILL, where), "max_tokens": 0}, cache_salt)


def request_options(
    options: CompletionOptions,
    where: str,
    cache_salt: str | None,
    *,
    find_thinking: Callable[[], Markers | None] = lambda: None,
    vocabulary: Vocabulary | None = None,
) -> RequestOptions:
    """Return the checked options of a completion.

    Args:
        options: as the caller passed them.
        where: the method's name, for error messages.
        cache_salt: the model's own.
        find_thinking: returns the markers of thinking of the model's template; None if it has none.
        vocabulary: the model's; None to leave `speculative` unchecked.
    """
    found = _known(options, _COMPLETION, where)
    schema, pattern = found.pop("json_schema", None), found.pop("regex", None)
    found["grammar"] = _grammar(found.get("grammar"), schema, pattern)
    found["phases"] = _phases(found, find_thinking)
    if vocabulary is not None:
        found["speculative"] = drafter_factory(found.get("speculative"), vocabulary)
    return _checked(found, cache_salt)


def _known(options: Mapping[str, object], known: frozenset[str], where: str) -> dict[str, object]:
    """Return a copy of the options; raise OptionError for an unknown one."""
    reject_unknown({name: value for name, value in options.items() if name not in known}, known, where)
    return dict(options)


def _checked(options: dict[str, object], cache_salt: str | None) -> RequestOptions:
    """Return the engine's options, which check each value."""
    if options.get("cache_salt") is None:
        options["cache_salt"] = cache_salt
    sampling: dict[str, object] = {name: options.pop(name) for name in _SAMPLING & options.keys()}
    options["sampling"] = SamplingOptions(**sampling)  # type: ignore[arg-type]
    return RequestOptions(**options)  # type: ignore[arg-type]


def _pop_phase_options(options: dict[str, object]) -> dict[str, object]:
    """Remove the options of phases from `options` and return them; absent ones are None."""
    found = {name: options.pop(name, None) for name in _PHASE_OPTIONS}
    if found["thinking_budget_message"] and found["thinking_budget_tokens"] is None:
        raise OptionError("thinking_budget_message without thinking_budget_tokens; pass both")
    if found["tool_payload_markers"] is not None and found["tool_markers"] is None:
        raise OptionError("tool_payload_markers without tool_markers; pass both")
    return found


def _phases(options: dict[str, object], find_thinking: Callable[[], Markers | None]) -> PhaseOptions | None:
    """Remove the options of phases from `options` and return them checked; None if the reply has no phases."""
    found = _pop_phase_options(options)
    enabled = thinking_choice(found["thinking"])
    unused = [name for name in _PHASE_OPTIONS if name.startswith("thinking_") and found[name] is not None]
    if unused and not enabled:
        raise OptionError(f'{unused[0]} has no effect unless thinking is enabled; pass thinking="enabled", too')
    thinking = markers("thinking_markers", found["thinking_markers"])
    if enabled and thinking is None:
        thinking = find_thinking()
    calls = markers("tool_markers", found["tool_markers"])
    payload = markers("tool_payload_markers", found["tool_payload_markers"])
    phases = PhaseOptions(
        thinking=thinking if enabled else None,
        calls=calls,
        payload=payload,
        thinking_budget=found["thinking_budget_tokens"],  # type: ignore[arg-type]
        budget_message=found["thinking_budget_message"] or "",  # type: ignore[arg-type]
        signing_key=found["thinking_signing_key"],  # type: ignore[arg-type]
    )
    return phases if phases.thinking is not None or calls is not None else None


def thinking_choice(thinking: object) -> bool | None:
    """Return whether thinking is enabled; None if the caller left it open."""
    if thinking is None or isinstance(thinking, bool):
        return thinking
    return choice("thinking", thinking, ("enabled", "disabled")) == "enabled"


def markers(name: str, pair: object) -> Markers | None:
    """Return a pair of markers as the engine takes them; None for None."""
    if pair is None:
        return None
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise OptionError(f"{name}={shown(pair)}; pass a pair: the opening and the closing marker")
    open, close = ((texts,) if isinstance(texts, str) else texts for texts in pair)
    return Markers(open, close)


def _grammar(grammar: object, json_schema: object, regex: object) -> object:
    """Return the grammar of a reply; None if the caller passed none."""
    options = {"grammar": grammar, "json_schema": json_schema, "regex": regex}
    named = [name for name, value in options.items() if value is not None]
    if len(named) > 1:
        raise OptionError(f"{' and '.join(named)} together; a reply follows one grammar: pass one of them")
    if json_schema is not None:
        if not isinstance(json_schema, Mapping | str | bool):
            raise OptionError(f"json_schema={shown(json_schema)}; pass a schema as a mapping, or as JSON text")
        return _compiled(Grammar.json_schema, schema_source(json_schema))
    if regex is not None:
        if not isinstance(regex, str):
            raise OptionError(f"regex={shown(regex)}; pass a pattern as text")
        return _compiled(Grammar.regex, regex)
    return _compiled(Grammar.gbnf, grammar) if isinstance(grammar, str) else grammar


@lru_cache(maxsize=128)
def _compiled(make: Callable[[str], Grammar], source: str) -> Grammar:
    """Return a grammar. Cached, because checking one is slow and callers pass the same source many times."""
    return make(source)
