"""The tool-call formats of model families: a table, and which format a chat template uses.

`find_tool_format` recognizes a format by texts in a template's source, the only evidence available.
`erllama.chat.family` calls it. `syntax` describes what a row means, and `erllama.chat.thinking` has the markers of
thinking.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from erllama.chat.suggestions import suggest_name
from erllama.chat.tool_calls.reader import ARGUMENT_KEYS
from erllama.chat.tool_calls.syntax import ID, CallSyntax, ListedArguments, SpanSyntax, ToolFormat
from erllama.errors import OptionError


def get_tool_format(name: str) -> ToolFormat:
    """Return the format with a name.

    Raises:
        OptionError: no format has this name.
    """
    format = TOOL_FORMATS.get(name) if isinstance(name, str) else None
    if format is None:
        raise OptionError(f"there is no tool format {name!r:.60}{suggest_name(str(name), TOOL_FORMATS)}")
    return format


def find_tool_format(template: str) -> ToolFormat | None:
    """Return the format in which a chat template writes tool calls; None if it does not write any."""
    for texts, name in _SIGNATURES:
        if all(text in template for text in texts):
            return TOOL_FORMATS[name]
    return None


# --- The formats -------------------------------------------------------------------------------

_COMMA = "~,~"
_ARGUMENTS = CallSyntax('{~"name":~"', '",~"arguments":~', "~}")
_JSON_PAYLOAD = ('"arguments":', '"parameters":')


def _json_objects(before: str, keys: Sequence[str], after: str) -> tuple[CallSyntax, ...]:
    return tuple(CallSyntax(before, f'"~,~"{key}":~', after) for key in keys)


_HARMONY_TYPES = (
    " <|constrain|>json<|message|>",
    "<|constrain|>json<|message|>",
    " json<|message|>",
    "<|message|>",
)
_HARMONY_CHANNELS = ("<|channel|>commentary", "<|channel|>analysis", "<|start|>assistant<|channel|>commentary")
_HARMONY_OPEN = (*(f"{channel} to=functions." for channel in _HARMONY_CHANNELS), "<|start|>assistant to=functions.")
# The family's templates accept only such ids.
_MISTRAL_ID = "[a-zA-Z0-9]{9}"
_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")

_ALL = (
    ToolFormat(
        "hermes",
        open=("<tool_call>",),
        close=("</tool_call>",),
        payload_open=_JSON_PAYLOAD,
        calls=(CallSyntax('<tool_call>~{~"name":~"', '",~"arguments":~', "~}~</tool_call>"),),
        json_calls=True,
    ),
    ToolFormat(
        "llama3",
        open=("<|python_tag|>",),
        close=(),
        payload_open=_JSON_PAYLOAD,
        leading=('{"name":', '{"type":"function","name":'),
        spans=(SpanSyntax("~", "~;~"), SpanSyntax("<|python_tag|>~", "~;~")),
        calls=(
            *_json_objects('{~"name"~:~"', ("parameters", "arguments"), "~}"),
            *_json_objects('{~"type"~:~"function"~,~"name"~:~"', ("parameters", "arguments"), "~}"),
        ),
        json_calls=True,
    ),
    ToolFormat(
        "mistral",
        open=("[TOOL_CALLS]",),
        close=(),
        payload_open=_JSON_PAYLOAD,
        spans=(SpanSyntax("[TOOL_CALLS]~[~", _COMMA, "~]"),),
        calls=(_ARGUMENTS, CallSyntax('{~"name":~"', '",~"arguments":~', f',~"id":~"{ID}"~}}')),
        json_calls=True,
        id_pattern=_MISTRAL_ID,
        id_length=9,
    ),
    ToolFormat(
        "mistral-v11",
        open=("[TOOL_CALLS]",),
        close=(),
        payload_open=("[ARGS]",),
        payload_close=("[TOOL_CALLS]",),
        calls=(CallSyntax("[TOOL_CALLS]", f"[CALL_ID]{ID}[ARGS]"),),
        id_pattern=_MISTRAL_ID,
        id_length=9,
        id_template="{id}",
    ),
    ToolFormat(
        "mistral-v13",
        open=("[TOOL_CALLS]",),
        close=(),
        payload_open=("[ARGS]",),
        payload_close=("[TOOL_CALLS]",),
        calls=(CallSyntax("[TOOL_CALLS]", "[ARGS]"),),
        id_length=9,
    ),
    ToolFormat(
        "deepseek-r1",
        open=_DEEPSEEK[:1],
        close=_DEEPSEEK[1:],
        payload_open=("```json\n",),
        payload_close=("<｜tool▁call▁end｜>",),
        spans=(SpanSyntax(_DEEPSEEK[0], "~", _DEEPSEEK[1]),),
        calls=(
            CallSyntax("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n", "\n```<｜tool▁call▁end｜>"),
        ),
    ),
    ToolFormat(
        "deepseek-v3.1",
        open=_DEEPSEEK[:1],
        close=_DEEPSEEK[1:],
        payload_open=("<｜tool▁sep｜>",),
        payload_close=("<｜tool▁call▁end｜>",),
        spans=(SpanSyntax(_DEEPSEEK[0], "", _DEEPSEEK[1]),),
        calls=(CallSyntax("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),),
    ),
    ToolFormat(
        "gpt-oss",
        open=_HARMONY_OPEN,
        close=("<|call|>",),
        payload_open=("<|message|>",),
        payload_close=("<|call|>",),
        leading=("to=functions.",),
        skip=(
            "<|start|>assistant<|channel|>final<|message|>",
            "<|start|>assistant<|channel|>commentary<|message|>",
            "<|start|>assistant",
            "<|channel|>final<|message|>",
            "<|channel|>commentary<|message|>",
            "<|end|>",
            "<|return|>",
        ),
        # The token of <|call|> ends the turn, so it is often missing.
        spans=(SpanSyntax(between=None, end="<|call|>"), SpanSyntax(between=None)),
        calls=(
            *(
                CallSyntax(f"{channel} to=functions.", type_)
                for channel in _HARMONY_CHANNELS
                for type_ in _HARMONY_TYPES
            ),
            *(
                CallSyntax(
                    f"{start} to=functions." if start != "~" else "~to=functions.", f"<|channel|>commentary{type_}"
                )
                for start in ("<|start|>assistant", "~")
                for type_ in _HARMONY_TYPES
            ),
        ),
    ),
    ToolFormat(
        "json",
        open=(),
        close=(),
        payload_open=_JSON_PAYLOAD,
        leading=(
            *(
                f"{list_}{object_}"
                for list_ in ("", "[")
                for object_ in ('{"name":', '{"type":"function",', '{"function":')
            ),
        ),
        spans=(SpanSyntax("~", None), SpanSyntax("~[~", _COMMA, "~]")),
        calls=(
            *_json_objects('{~"name"~:~"', ARGUMENT_KEYS, "~}"),
            *_json_objects('{~"type"~:~"function"~,~"name"~:~"', ARGUMENT_KEYS, "~}"),
            *_json_objects('{~"type"~:~"function"~,~"function"~:~{~"name"~:~"', ARGUMENT_KEYS, "~}~}"),
            *_json_objects('{~"function"~:~{~"name"~:~"', ARGUMENT_KEYS, "~}~}"),
            *_json_objects('{~"function"~:~"', ARGUMENT_KEYS, "~}"),
        ),
        json_calls=True,
    ),
    ToolFormat(
        "qwen3-coder",
        open=("<tool_call>",),
        close=("</tool_call>",),
        payload_open=("<parameter=",),
        payload_close=("</parameter>",),
        calls=(CallSyntax("<tool_call>~<function=", ">~", "~</function>~</tool_call>"),),
        arguments=ListedArguments("<parameter=", ">", "</parameter>~", on_own_lines=True),
    ),
    ToolFormat(
        "glm",
        open=("<tool_call>",),
        close=("</tool_call>",),
        payload_open=("<arg_value>",),
        payload_close=("</arg_value>",),
        calls=(CallSyntax("<tool_call>~", "~", "~</tool_call>"),),
        arguments=ListedArguments("<arg_key>", "</arg_key>~<arg_value>", "</arg_value>~"),
    ),
    ToolFormat(
        "kimi",
        open=("<|tool_calls_section_begin|>",),
        close=("<|tool_calls_section_end|>",),
        payload_open=("<|tool_call_argument_begin|>",),
        payload_close=("<|tool_call_end|>",),
        spans=(SpanSyntax("<|tool_calls_section_begin|>~", "~", "~<|tool_calls_section_end|>"),),
        calls=(
            CallSyntax(
                "<|tool_call_begin|>~functions.", f":{ID}~<|tool_call_argument_begin|>~", "~<|tool_call_end|>"
            ),
        ),
        id_pattern="[0-9]{1,6}",
        id_template="functions.{name}:{id}",
    ),
    ToolFormat(
        "minimax",
        open=("<minimax:tool_call>",),
        close=("</minimax:tool_call>",),
        payload_open=("<parameter name=",),
        payload_close=("</parameter>",),
        spans=(SpanSyntax("<minimax:tool_call>~", "~", "~</minimax:tool_call>"),),
        calls=(CallSyntax('<invoke name="', '">~', "</invoke>"),),
        arguments=ListedArguments('<parameter name="', '">', "</parameter>~"),
    ),
    ToolFormat(
        "seed",
        open=("<seed:tool_call>",),
        close=("</seed:tool_call>",),
        payload_open=("<parameter=",),
        payload_close=("</parameter>",),
        calls=(CallSyntax("<seed:tool_call>~<function=", ">~", "</function>~</seed:tool_call>"),),
        arguments=ListedArguments("<parameter=", ">", "</parameter>~"),
    ),
    ToolFormat(
        "nemotron",
        open=("<TOOLCALL>",),
        close=("</TOOLCALL>",),
        payload_open=_JSON_PAYLOAD,
        spans=(SpanSyntax("<TOOLCALL>~[~", _COMMA, "~]~</TOOLCALL>"),),
        calls=(_ARGUMENTS,),
        json_calls=True,
    ),
    ToolFormat(
        "command-r",
        open=("<|START_ACTION|>",),
        close=("<|END_ACTION|>",),
        payload_open=_JSON_PAYLOAD,
        skip=("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        spans=(SpanSyntax("<|START_ACTION|>~[~", _COMMA, "~]~<|END_ACTION|>"),),
        calls=(CallSyntax('{~"tool_call_id":~"' + ID + '",~"tool_name":~"', '",~"parameters":~', "~}"),),
        json_calls=True,
        id_pattern="[0-9]{1,6}",
    ),
    ToolFormat(
        "lfm2",
        open=("<|tool_call_start|>",),
        close=("<|tool_call_end|>",),
        payload_open=("(",),
        spans=(SpanSyntax("<|tool_call_start|>~[~", ",~", "~]~<|tool_call_end|>"),),
        calls=(CallSyntax("", "(~", "~)"),),
        arguments="python",
    ),
    ToolFormat(
        "apertus",
        open=("<|tools_prefix|>",),
        close=("<|tools_suffix|>",),
        payload_open=('":',),
        spans=(SpanSyntax("<|tools_prefix|>~[~", _COMMA, "~]~<|tools_suffix|>"),),
        calls=(CallSyntax('{"', '":~', "~}"),),
        json_calls=True,
    ),
    ToolFormat(
        "granite",
        open=("<|tool_call|>",),
        close=(),
        payload_open=_JSON_PAYLOAD,
        skip=("<response>", "</response>"),
        spans=(SpanSyntax("<|tool_call|>~[~", _COMMA, "~]"),),
        calls=(_ARGUMENTS,),
        json_calls=True,
    ),
    ToolFormat(
        "functionary",
        open=(">>>",),
        close=(),
        payload_open=("\n",),
        payload_close=(">>>",),
        skip=(">>>all\n",),
        calls=(CallSyntax(">>>", "\n"),),
    ),
    ToolFormat(
        "gemma4",
        open=("<|tool_call>",),
        close=("<tool_call|>",),
        payload_open=("{",),
        calls=(CallSyntax("<|tool_call>call:", "{", "}~<tool_call|>"),),
        arguments="gemma",
    ),
)
TOOL_FORMATS: Mapping[str, ToolFormat] = MappingProxyType({format.name: format for format in _ALL})

# Texts that must all be in a template's source, and the format that they identify; the most specific first.
_SIGNATURES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<|channel|>", "to=", "functions."), "gpt-oss"),
    (("<|tool_call>call:",), "gemma4"),
    (("<|tools_prefix|>",), "apertus"),
    (("<|START_ACTION|>",), "command-r"),
    (("<|tool_calls_section_begin|>",), "kimi"),
    (("<minimax:tool_call>",), "minimax"),
    (("<seed:tool_call>",), "seed"),
    (("<TOOLCALL>",), "nemotron"),
    (("<｜tool▁calls▁begin｜>", "```json"), "deepseek-r1"),
    (("<｜tool▁calls▁begin｜>",), "deepseek-v3.1"),
    (("[TOOL_CALLS]", "[CALL_ID]"), "mistral-v11"),
    (("[TOOL_CALLS]", "[ARGS]"), "mistral-v13"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<tool_call>", "<function="), "qwen3-coder"),
    (("<tool_call>", "<arg_key>"), "glm"),
    (("<tool_call>",), "hermes"),
    (("<|tool_list_start|>",), "lfm2"),
    (("<|tool_call_start|>",), "lfm2"),
    (("<|tool_call|>",), "granite"),
    ((">>>${recipient}",), "functionary"),
    ((">>>", "recipient"), "functionary"),
    (("<|python_tag|>",), "llama3"),
    (("<|start_header_id|>", "ipython"), "llama3"),
    (("tools", "tool_calls"), "json"),
)
