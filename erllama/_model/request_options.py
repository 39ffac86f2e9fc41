"""The options of a request, as the methods of a model take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from erllama._model.speculation import drafters
from erllama.chat.request import ChatRequest
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
from erllama.errors import OptionError, choice, reject_unknown, shown

if TYPE_CHECKING:
    from erllama._model.model import Model

# Texts that open and that close a phase: one each, or several.
MarkerPair = tuple[str | Sequence[str], str | Sequence[str]]


class PrefillOptions(TypedDict, total=False):
    """Options of `Model.prefill`; see `Model.complete`."""

    reproducible: bool
    cache_salt: str | None
    parent_key: bytes | None
    session_id: str | None
    timeout: float | None


class CompletionOptions(PrefillOptions, total=False):
    """Options of `Model.complete`, and of all that streams and waits."""

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
    speculative: str | Drafter | Model | None
    speculative_tokens: int


class TemplateOptions(TypedDict, total=False):
    """Options of `Model.apply_chat_template`, and of all chats; see `Model.chat`."""

    tools: Sequence[Mapping[str, object]] | None
    chat_template: str | Path | None
    template_args: Mapping[str, object] | None
    documents: Sequence[Mapping[str, object]] | None
    continue_final_message: bool
    special_tokens_in_content: bool
    thinking: str | bool | None


class ChatOptions(CompletionOptions, total=False):
    """Options of `Model.chat`, and of all chats that stream and wait."""

    tools: Sequence[Mapping[str, object]] | None
    tool_choice: str | Mapping[str, object] | None
    parallel_tool_calls: bool
    tool_format: str | None
    chat_template: str | Path | None
    template_args: Mapping[str, object] | None
    documents: Sequence[Mapping[str, object]] | None
    continue_final_message: bool
    special_tokens_in_content: bool


_PHASES = (
    "thinking",
    "thinking_markers",
    "thinking_budget_tokens",
    "thinking_budget_message",
    "thinking_signing_key",
    "tool_markers",
    "tool_payload_markers",
)
_SAMPLING = frozenset(SamplingOptions.__dataclass_fields__)
_COMPLETION = frozenset(CompletionOptions.__annotations__) | frozenset(PrefillOptions.__annotations__)
_PREFILL = frozenset(PrefillOptions.__annotations__)


_TEMPLATE = frozenset(TemplateOptions.__annotations__)
_CHAT = frozenset(ChatOptions.__annotations__) - _COMPLETION


def template_request(messages: object, given: TemplateOptions, where: str) -> ChatRequest:
    """A conversation to be rendered; checked where it is."""
    options: dict[str, object] = dict(given)
    reject_unknown({name: value for name, value in options.items() if name not in _TEMPLATE}, _TEMPLATE, where)
    options["thinking"] = thinking_choice(options.get("thinking"))
    return ChatRequest(messages, **options)  # type: ignore[arg-type]


def chat_request(
    messages: object, given: ChatOptions, where: str, cache_salt: str | None, vocabulary: Vocabulary
) -> tuple[ChatRequest, RequestOptions]:
    """A chat as it was asked for, and the checked options of its request, without phases."""
    options: dict[str, object] = dict(given)
    known = _COMPLETION | _CHAT
    reject_unknown({name: value for name, value in options.items() if name not in known}, known, where)
    chat: dict[str, object] = {name: options.pop(name) for name in _CHAT & options.keys()}
    phases = _of_phases(options)
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
    checked = request_options(options, where, cache_salt, vocabulary=vocabulary)  # type: ignore[arg-type]
    return request, checked


def request_options(
    given: CompletionOptions | PrefillOptions,
    where: str,
    cache_salt: str | None,
    *,
    prefill: bool = False,
    find_thinking: Callable[[], Markers | None] = lambda: None,
    vocabulary: Vocabulary | None = None,
) -> RequestOptions:
    """The checked options of one call.

    Args:
        given: as the caller wrote them.
        where: the name of the method, for errors.
        cache_salt: the model's own.
        prefill: only those that make sense where nothing is sampled.
        find_thinking: the model's own markers of thinking, where it has some.
        vocabulary: the model's.
    """
    options: dict[str, object] = dict(given)
    known = _PREFILL if prefill else _COMPLETION
    reject_unknown({name: value for name, value in options.items() if name not in known}, known, where)
    if prefill:
        options["max_tokens"] = 0
    if options.get("cache_salt") is None:
        options["cache_salt"] = cache_salt
    if not prefill:
        schema, pattern = options.pop("json_schema", None), options.pop("regex", None)
        options["grammar"] = _grammar(options.get("grammar"), schema, pattern)
        options["phases"] = _phases(options, find_thinking)
        if vocabulary is not None:
            options["speculative"] = drafters(options.get("speculative"), vocabulary)
    sampling: dict[str, object] = {name: options.pop(name) for name in _SAMPLING & options.keys()}
    # Checked there, value by value.
    options["sampling"] = SamplingOptions(**sampling)  # type: ignore[arg-type]
    return RequestOptions(**options)  # type: ignore[arg-type]


def _of_phases(options: dict[str, object]) -> dict[str, object]:
    """Takes the options of phases out of the others."""
    given = {name: options.pop(name, None) for name in _PHASES}
    if given["thinking_budget_message"] and given["thinking_budget_tokens"] is None:
        raise OptionError("thinking_budget_message without thinking_budget_tokens; give both")
    if given["tool_payload_markers"] is not None and given["tool_markers"] is None:
        raise OptionError("tool_payload_markers without tool_markers; give both")
    return given


def _phases(options: dict[str, object], find_thinking: Callable[[], Markers | None]) -> PhaseOptions | None:
    """How phases are told apart; takes its options out of the others. None where they are not to be told."""
    given = _of_phases(options)
    enabled = thinking_choice(given["thinking"])
    idle = [name for name in _PHASES if name.startswith("thinking_") and given[name] is not None]
    if idle and not enabled:
        raise OptionError(f'{idle[0]} where thinking is not told apart; give thinking="enabled", too')
    thinking = markers("thinking_markers", given["thinking_markers"])
    if enabled and thinking is None:
        thinking = find_thinking()
    calls = markers("tool_markers", given["tool_markers"])
    payload = markers("tool_payload_markers", given["tool_payload_markers"])
    phases = PhaseOptions(
        thinking=thinking if enabled else None,
        calls=calls,
        payload=payload,
        thinking_budget=given["thinking_budget_tokens"],  # type: ignore[arg-type]
        budget_message=given["thinking_budget_message"] or "",  # type: ignore[arg-type]
        signing_key=given["thinking_signing_key"],  # type: ignore[arg-type]
    )
    return phases if phases.thinking is not None or calls is not None else None


def thinking_choice(given: object) -> bool | None:
    """Whether thinking is wanted; None where that is left open."""
    if given is None or isinstance(given, bool):
        return given
    return choice("thinking", given, ("enabled", "disabled")) == "enabled"


def markers(name: str, given: object) -> Markers | None:
    """A pair of markers, or of several, as the engine takes them."""
    if given is None:
        return None
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise OptionError(f"{name}={shown(given)}; give a pair: what opens, and what closes")
    open, close = ((texts,) if isinstance(texts, str) else texts for texts in given)
    return Markers(open, close)


def _grammar(grammar: object, json_schema: object, regex: object) -> object:
    """The one grammar that was asked for; None where none was."""
    given = {"grammar": grammar, "json_schema": json_schema, "regex": regex}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise OptionError(f"{' and '.join(named)} together; a reply is kept to one grammar: give one of them")
    if json_schema is not None:
        if not isinstance(json_schema, Mapping | str | bool):
            raise OptionError(f"json_schema={shown(json_schema)}; give a schema as a mapping, or as JSON in a text")
        return _made(Grammar.json_schema, schema_source(json_schema))
    if regex is not None:
        if not isinstance(regex, str):
            raise OptionError(f"regex={shown(regex)}; give a pattern as text")
        return _made(Grammar.regex, regex)
    return _made(Grammar.gbnf, grammar) if isinstance(grammar, str) else grammar


@lru_cache(maxsize=128)
def _made(make: Callable[[str], Grammar], source: str) -> Grammar:
    """Grammars are checked when they are made, which takes a while; callers send the same again and again."""
    return make(source)
