"""Chat formats by their names in llama-cpp-python, as chat templates, and formatters that render them.

A model's own template is right for it, so most programs need none of these. `Llama(chat_format=...)` takes a name
of `CHAT_FORMATS`. Formats without an entry are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from erllama.chat.templates.template import CHATML, ChatTemplate
from erllama.checks import choice
from erllama.errors import OptionError, Unsupported

_Messages = Sequence[Mapping[str, object]]

_LLAMA_2 = """\
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- set ns.system = '<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' -%}
    {%- elif message['role'] == 'user' -%}
        {{- '<s>[INST] ' + ns.system + message['content'] + ' [/INST]' -}}
        {%- set ns.system = '' -%}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ' + message['content'] + ' </s>' -}}
    {%- endif -%}
{%- endfor -%}
"""

_MISTRAL_INSTRUCT = """\
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- '[INST] ' + message['content'] + ' [/INST]' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- message['content'] + '</s>' -}}
    {%- endif -%}
{%- endfor -%}
"""


def _turns(begin: str, end: str, *, roles: Mapping[str, str] | None = None, system: str = "") -> str:
    """Return the template of messages with a role between two texts.

    Args:
        begin: the text before a message, with {role} in it.
        end: the text after a message.
        roles: names of the roles that have messages; None for the usual names.
        system: a system message for conversations without one.
    """
    names = roles or {name: name for name in ("system", "user", "assistant")}
    first = f"{begin.format(role=names['system'])}{system}{end}" if system else ""
    table = ", ".join(f"{name!r}: {begin.format(role=shown)!r}" for name, shown in names.items())
    return (
        f"{{%- set begins = {{{table}}} -%}}"
        f"{{%- if {bool(system)} and messages[0]['role'] != 'system' -%}}{{{{- {first!r} -}}}}{{%- endif -%}}"
        "{%- for message in messages -%}{%- if message['role'] in begins -%}"
        f"{{{{- begins[message['role']] + message['content'] + {end!r} -}}}}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- begins['assistant'] -}}{%- endif -%}"
    )


def _colons(user: str, assistant: str, separator: str, end: str, *, system: str = "") -> str:
    """Return the template of messages that begin with a name and a colon.

    Args:
        user, assistant: the names.
        separator: the text after the system message and after each message of the user.
        end: the text after each message of the assistant.
        system: a system message for conversations without one.
    """
    return (
        f"{{%- set ns = namespace(system={system!r}) -%}}"
        "{%- for message in messages if message['role'] == 'system' -%}"
        "{%- set ns.system = message['content'] -%}{%- endfor -%}"
        f"{{{{- ns.system + {separator!r} -}}}}"
        "{%- for message in messages -%}"
        f"{{%- if message['role'] == 'user' -%}}{{{{- {user + ': '!r} + message['content'] + {separator!r} -}}}}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{{{{- {assistant + ': '!r} + message['content'] + {end!r} -}}}}"
        "{%- endif -%}{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{- {assistant + ':'!r} -}}}}{{%- endif -%}}"
    )


# ChatML, with tools declared and called as Hermes and Qwen models do.
_CHATML_TOOLS = """\
{%- if tools -%}
    {{- '<|im_start|>system\\n' -}}
    {%- if messages[0]['role'] == 'system' -%}{{- messages[0]['content'] + '\\n\\n' -}}{%- endif -%}
    {{- 'You may call these functions:\\n<tools>' -}}
    {%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
    {{- '\\n</tools>\\nTo call one, write a JSON object with its name and arguments within <tool_call> tags:\\n' -}}
    {{- '<tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if not (tools and loop.first and message['role'] == 'system') -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') -}}
    {%- for call in message['tool_calls'] or [] -%}
        {{- '<tool_call>\\n{"name": ' + (call.function.name | tojson) + ', "arguments": ' -}}
        {{- (call.function.arguments | tojson) + '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
_ASSISTANT = "You are a helpful assistant."
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions."
)
_LLAMA_3 = _turns("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>")
_GEMMA_ROLES = {"user": "user", "assistant": "model"}

# Templates by the names of formats.
CHAT_FORMATS: Final[Mapping[str, str]] = {
    "alpaca": _colons("### Instruction", "### Response", "\n\n", "</s>"),
    "chatml": CHATML,
    "chatml-function-calling": _CHATML_TOOLS,
    "gemma": _turns("<start_of_turn>{role}\n", "<end_of_turn>\n", roles=_GEMMA_ROLES),
    "llama-2": _LLAMA_2,
    "llama-3": _LLAMA_3,
    "mistral-instruct": _MISTRAL_INSTRUCT,
    "qwen": _turns("<|im_start|>{role}\n", "<|im_end|>\n", system=_ASSISTANT),
    "vicuna": _colons("USER", "ASSISTANT", " ", "</s>", system=_VICUNA),
    "zephyr": _turns("<|{role}|>\n", "</s>\n"),
}
# Stop strings of formats whose end of a reply is not a token of every model.
STOPS: Final[Mapping[str, tuple[str, ...]]] = {
    "chatml": ("<|im_end|>",),
    "chatml-function-calling": ("<|im_end|>",),
    "gemma": ("<end_of_turn>",),
    "llama-3": ("<|eot_id|>",),
    "qwen": ("<|im_end|>",),
}


def template_of(chat_format: str) -> str:
    """Return the template of a format.

    Raises:
        OptionError: the format has no template here.
    """
    try:
        return CHAT_FORMATS[choice("chat_format", chat_format, tuple(CHAT_FORMATS))]
    except OptionError as error:
        raise OptionError(f"{error}; or leave it out, for the template in the model's file") from None


@dataclass(frozen=True, slots=True)
class ChatFormatterResponse:
    """A rendered conversation.

    Attributes:
        prompt: its text.
        stop: texts that end the reply; None without any.
        added_special: whether the text has its BOS.
    """

    prompt: str
    stop: str | list[str] | None = None
    added_special: bool = False


ChatFormatter = Callable[..., ChatFormatterResponse]


class Jinja2ChatFormatter:
    """Renders conversations with a chat template, in erllama's sandbox."""

    def __init__(self, template: str, eos_token: str, bos_token: str, add_generation_prompt: bool = True) -> None:
        self.template, self.eos_token, self.bos_token = template, eos_token, bos_token
        self.add_generation_prompt = add_generation_prompt
        self._template = ChatTemplate(template, bos_token=bos_token, eos_token=eos_token)

    def __call__(
        self, *, messages: _Messages, tools: Sequence[Mapping[str, object]] | None = None, **variables: object
    ) -> ChatFormatterResponse:
        """Return a conversation as the template renders it; `variables` are further variables of the template."""
        prompt = self._template.render(
            messages,
            tools=tools,
            add_generation_prompt=self.add_generation_prompt,
            **variables,  # type: ignore[arg-type]
        )
        return ChatFormatterResponse(prompt, [self.eos_token], added_special=True)


def hf_tokenizer_config_to_chat_formatter(
    tokenizer_config: Mapping[str, object], add_generation_prompt: bool = True
) -> ChatFormatter:
    """Return the formatter of a model's tokenizer_config.json.

    As in llama-cpp-python, `add_generation_prompt` adds an empty message of the assistant.

    Raises:
        OptionError: the configuration lacks "chat_template", "bos_token" or "eos_token".
    """
    names = ("chat_template", "bos_token", "eos_token")
    texts = {name: tokenizer_config.get(name) for name in names}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise OptionError(f"the tokenizer's configuration has {name}={text!r:.60}; it must be a text")
    template, bos, eos = (str(texts[name]) for name in names)
    formatter = Jinja2ChatFormatter(template, eos, bos, add_generation_prompt=False)

    def format_messages(messages: _Messages, **variables: object) -> ChatFormatterResponse:
        whole = [*messages, {"role": "assistant", "content": ""}] if add_generation_prompt else messages
        prompt = formatter(messages=whole, **variables).prompt  # type: ignore[arg-type]
        return ChatFormatterResponse(prompt, [eos, bos], added_special=True)

    return format_messages


def _formatter(name: str) -> ChatFormatter:
    template = ChatTemplate(CHAT_FORMATS[name], eos_token="</s>", bos_token="<s>")

    def format_messages(messages: _Messages, **_: object) -> ChatFormatterResponse:
        return ChatFormatterResponse(template.render(messages), list(STOPS.get(name, ("</s>",))))

    return format_messages


format_alpaca = _formatter("alpaca")
format_chatml = _formatter("chatml")
format_gemma = _formatter("gemma")
format_llama2 = _formatter("llama-2")
format_llama3 = _formatter("llama-3")
format_mistral_instruct = _formatter("mistral-instruct")
format_qwen = _formatter("qwen")
format_zephyr = _formatter("zephyr")


class _RefusedChatHandler:
    """A chat handler of llama-cpp-python for images. erllama has none."""

    def __init__(self, *_: object, **__: object) -> None:
        raise Unsupported("erllama reads text only: chat handlers for images and audio are not available")

    @classmethod
    def from_pretrained(cls, *_: object, **__: object) -> _RefusedChatHandler:
        """Raise Unsupported."""
        return cls()


Llava15ChatHandler = Llava16ChatHandler = ObsidianChatHandler = MoondreamChatHandler = _RefusedChatHandler
NanoLlavaChatHandler = Llama3VisionAlphaChatHandler = MiniCPMv26ChatHandler = _RefusedChatHandler
Qwen25VLChatHandler = MTMDChatHandler = Gemma4ChatHandler = _RefusedChatHandler
