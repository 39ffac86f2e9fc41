"""The families of models, by how they write tool calls: a table, and which row a chat template is of.

`find_tool_format` tells a template's family from its source, which is all there
is to tell by. A row has the texts that whoever streams a reply looks for, and
the syntax as pieces of text, in which `~` stands for white space or none.
`Chat` calls this; how calls are read and constrained is in
`erllama.chat.tool_calls.reader`, and what models think in `erllama.chat.thinking`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from erllama.chat.json_values import suggestion
from erllama.chat.tool_calls.call_grammar import ID, Frame, Parameters, Shape
from erllama.chat.tool_calls.reader import ARGUMENT_KEYS, ToolFormat
from erllama.errors import OptionError


def tool_format(name: str) -> ToolFormat:
    """A family's format by its name.

    Raises:
        OptionError: there is none.
    """
    found = TOOL_FORMATS.get(name) if isinstance(name, str) else None
    if found is None:
        raise OptionError(f"there is no tool format {name!r:.60}{suggestion(str(name), TOOL_FORMATS)}")
    return found


def find_tool_format(template: str) -> ToolFormat | None:
    """The format that a chat template writes tool calls in; None where it knows of no tools."""
    for marks, name in _SIGNS:
        if all(mark in template for mark in marks):
            return TOOL_FORMATS[name]
    return None


# --- The families ------------------------------------------------------------------------------

_LIST = "~,~"
_ARGUMENTS = Shape('{~"name":~"', '",~"arguments":~', "~}")
_JSON_PAYLOAD = ('"arguments":', '"parameters":')


def _bare(before: str, keys: Sequence[str], after: str) -> tuple[Shape, ...]:
    return tuple(Shape(before, f'"~,~"{key}":~', after) for key in keys)


_HARMONY_TYPES = (
    " <|constrain|>json<|message|>",
    "<|constrain|>json<|message|>",
    " json<|message|>",
    "<|message|>",
)
_HARMONY_CHANNELS = ("<|channel|>commentary", "<|channel|>analysis", "<|start|>assistant<|channel|>commentary")
_HARMONY_OPEN = (*(f"{channel} to=functions." for channel in _HARMONY_CHANNELS), "<|start|>assistant to=functions.")
# The family's templates take no other ids.
_MISTRAL_ID = "[a-zA-Z0-9]{9}"
_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")

_ALL = (
    ToolFormat(
        "hermes",
        open=("<tool_call>",),
        close=("</tool_call>",),
        payload_open=_JSON_PAYLOAD,
        shapes=(Shape('<tool_call>~{~"name":~"', '",~"arguments":~', "~}~</tool_call>"),),
        envelope=True,
    ),
    ToolFormat(
        "llama3",
        open=("<|python_tag|>",),
        close=(),
        payload_open=_JSON_PAYLOAD,
        leading=('{"name":', '{"type":"function","name":'),
        frames=(Frame("~", "~;~"), Frame("<|python_tag|>~", "~;~")),
        shapes=(
            *_bare('{~"name"~:~"', ("parameters", "arguments"), "~}"),
            *_bare('{~"type"~:~"function"~,~"name"~:~"', ("parameters", "arguments"), "~}"),
        ),
        envelope=True,
    ),
    ToolFormat(
        "mistral",
        open=("[TOOL_CALLS]",),
        close=(),
        payload_open=_JSON_PAYLOAD,
        frames=(Frame("[TOOL_CALLS]~[~", _LIST, "~]"),),
        shapes=(_ARGUMENTS, Shape('{~"name":~"', '",~"arguments":~', f',~"id":~"{ID}"~}}')),
        envelope=True,
        id=_MISTRAL_ID,
        id_length=9,
    ),
    ToolFormat(
        "mistral-v11",
        open=("[TOOL_CALLS]",),
        close=(),
        payload_open=("[ARGS]",),
        payload_close=("[TOOL_CALLS]",),
        shapes=(Shape("[TOOL_CALLS]", f"[CALL_ID]{ID}[ARGS]"),),
        id=_MISTRAL_ID,
        id_length=9,
        id_form="{id}",
    ),
    ToolFormat(
        "mistral-v13",
        open=("[TOOL_CALLS]",),
        close=(),
        payload_open=("[ARGS]",),
        payload_close=("[TOOL_CALLS]",),
        shapes=(Shape("[TOOL_CALLS]", "[ARGS]"),),
        id_length=9,
    ),
    ToolFormat(
        "deepseek-r1",
        open=_DEEPSEEK[:1],
        close=_DEEPSEEK[1:],
        payload_open=("```json\n",),
        payload_close=("<｜tool▁call▁end｜>",),
        frames=(Frame(_DEEPSEEK[0], "~", _DEEPSEEK[1]),),
        shapes=(Shape("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n", "\n```<｜tool▁call▁end｜>"),),
    ),
    ToolFormat(
        "deepseek-v3.1",
        open=_DEEPSEEK[:1],
        close=_DEEPSEEK[1:],
        payload_open=("<｜tool▁sep｜>",),
        payload_close=("<｜tool▁call▁end｜>",),
        frames=(Frame(_DEEPSEEK[0], "", _DEEPSEEK[1]),),
        shapes=(Shape("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),),
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
        # The token of <|call|> ends the turn, so that often it is not there.
        frames=(Frame(between=None, end="<|call|>"), Frame(between=None)),
        shapes=(
            *(
                Shape(f"{channel} to=functions.", type_)
                for channel in _HARMONY_CHANNELS
                for type_ in _HARMONY_TYPES
            ),
            *(
                Shape(
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
        frames=(Frame("~", None), Frame("~[~", _LIST, "~]")),
        shapes=(
            *_bare('{~"name"~:~"', ARGUMENT_KEYS, "~}"),
            *_bare('{~"type"~:~"function"~,~"name"~:~"', ARGUMENT_KEYS, "~}"),
            *_bare('{~"type"~:~"function"~,~"function"~:~{~"name"~:~"', ARGUMENT_KEYS, "~}~}"),
            *_bare('{~"function"~:~{~"name"~:~"', ARGUMENT_KEYS, "~}~}"),
            *_bare('{~"function"~:~"', ARGUMENT_KEYS, "~}"),
        ),
        envelope=True,
    ),
    ToolFormat(
        "qwen3-coder",
        open=("<tool_call>",),
        close=("</tool_call>",),
        payload_open=("<parameter=",),
        payload_close=("</parameter>",),
        shapes=(Shape("<tool_call>~<function=", ">~", "~</function>~</tool_call>"),),
        arguments=Parameters("<parameter=", ">", "</parameter>~", framed=True),
    ),
    ToolFormat(
        "glm",
        open=("<tool_call>",),
        close=("</tool_call>",),
        payload_open=("<arg_value>",),
        payload_close=("</arg_value>",),
        shapes=(Shape("<tool_call>~", "~", "~</tool_call>"),),
        arguments=Parameters("<arg_key>", "</arg_key>~<arg_value>", "</arg_value>~"),
    ),
    ToolFormat(
        "kimi",
        open=("<|tool_calls_section_begin|>",),
        close=("<|tool_calls_section_end|>",),
        payload_open=("<|tool_call_argument_begin|>",),
        payload_close=("<|tool_call_end|>",),
        frames=(Frame("<|tool_calls_section_begin|>~", "~", "~<|tool_calls_section_end|>"),),
        shapes=(
            Shape("<|tool_call_begin|>~functions.", f":{ID}~<|tool_call_argument_begin|>~", "~<|tool_call_end|>"),
        ),
        id="[0-9]{1,6}",
        id_form="functions.{name}:{id}",
    ),
    ToolFormat(
        "minimax",
        open=("<minimax:tool_call>",),
        close=("</minimax:tool_call>",),
        payload_open=("<parameter name=",),
        payload_close=("</parameter>",),
        frames=(Frame("<minimax:tool_call>~", "~", "~</minimax:tool_call>"),),
        shapes=(Shape('<invoke name="', '">~', "</invoke>"),),
        arguments=Parameters('<parameter name="', '">', "</parameter>~"),
    ),
    ToolFormat(
        "seed",
        open=("<seed:tool_call>",),
        close=("</seed:tool_call>",),
        payload_open=("<parameter=",),
        payload_close=("</parameter>",),
        shapes=(Shape("<seed:tool_call>~<function=", ">~", "</function>~</seed:tool_call>"),),
        arguments=Parameters("<parameter=", ">", "</parameter>~"),
    ),
    ToolFormat(
        "nemotron",
        open=("<TOOLCALL>",),
        close=("</TOOLCALL>",),
        payload_open=_JSON_PAYLOAD,
        frames=(Frame("<TOOLCALL>~[~", _LIST, "~]~</TOOLCALL>"),),
        shapes=(_ARGUMENTS,),
        envelope=True,
    ),
    ToolFormat(
        "command-r",
        open=("<|START_ACTION|>",),
        close=("<|END_ACTION|>",),
        payload_open=_JSON_PAYLOAD,
        skip=("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        frames=(Frame("<|START_ACTION|>~[~", _LIST, "~]~<|END_ACTION|>"),),
        shapes=(Shape('{~"tool_call_id":~"' + ID + '",~"tool_name":~"', '",~"parameters":~', "~}"),),
        envelope=True,
        id="[0-9]{1,6}",
    ),
    ToolFormat(
        "lfm2",
        open=("<|tool_call_start|>",),
        close=("<|tool_call_end|>",),
        payload_open=("(",),
        frames=(Frame("<|tool_call_start|>~[~", ",~", "~]~<|tool_call_end|>"),),
        shapes=(Shape("", "(~", "~)"),),
        arguments="python",
    ),
    ToolFormat(
        "apertus",
        open=("<|tools_prefix|>",),
        close=("<|tools_suffix|>",),
        payload_open=('":',),
        frames=(Frame("<|tools_prefix|>~[~", _LIST, "~]~<|tools_suffix|>"),),
        shapes=(Shape('{"', '":~', "~}"),),
        envelope=True,
    ),
    ToolFormat(
        "granite",
        open=("<|tool_call|>",),
        close=(),
        payload_open=_JSON_PAYLOAD,
        skip=("<response>", "</response>"),
        frames=(Frame("<|tool_call|>~[~", _LIST, "~]"),),
        shapes=(_ARGUMENTS,),
        envelope=True,
    ),
    ToolFormat(
        "functionary",
        open=(">>>",),
        close=(),
        payload_open=("\n",),
        payload_close=(">>>",),
        skip=(">>>all\n",),
        shapes=(Shape(">>>", "\n"),),
    ),
    ToolFormat(
        "gemma4",
        open=("<|tool_call>",),
        close=("<tool_call|>",),
        payload_open=("{",),
        shapes=(Shape("<|tool_call>call:", "{", "}~<tool_call|>"),),
        arguments="gemma",
    ),
)
TOOL_FORMATS: Mapping[str, ToolFormat] = MappingProxyType({format.name: format for format in _ALL})

# Texts that a template's source has, all of them, and the format they tell; the most particular first.
_SIGNS: tuple[tuple[tuple[str, ...], str], ...] = (
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
