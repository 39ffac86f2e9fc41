"""Chat templates: render a conversation as the text that a model reads.

A `ChatTemplate` renders the templates of model files as Hugging Face transformers does, to the byte. A template may
be hostile, but `render` always returns a text or raises a `TemplateError` (see `machine`). `render` copies its
arguments into plain data first, so a template cannot reach or change the caller's objects.
`erllama.chat.conversation` and `render_chat_template` use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import FunctionType, TracebackType
from typing import Final, cast

import jinja2.exceptions
from jinja2.runtime import Context
from jinja2.utils import missing

from erllama.chat.templates.compiler import FILENAME, MAX_SOURCE, TemplateCode, compile_template
from erllama.chat.templates.continuation import THINKING_KEYS, FinalText
from erllama.chat.templates.filters import TABLES
from erllama.chat.templates.limits import MAX_TEXT, LimitExceeded
from erllama.chat.templates.machine import Machine
from erllama.chat.templates.methods import FUNCTIONS
from erllama.chat.templates.plain_data import PlainDataCopier
from erllama.errors import OptionError, TemplateError

CHATML: Final = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- elif message['content'] -%}
        {{- message['content'] | selectattr('text', 'defined') | map(attribute='text') | join -}}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# Characters of an error message: a template may raise an error with all of its input.
MAX_MESSAGE: Final = 10_000
_RESERVED: Final = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")


class ChatTemplate:
    """A chat template, compiled once. Several threads may render it at the same time.

    Args:
        source: the template's text, in jinja2's language.
        bos_token, eos_token: values of the variables with these names.
        special_tokens: further variables, such as {"pad_token": "<pad>"}.

    Raises:
        TemplateError: the template does not parse, or exceeds a limit; `line` is the line number.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        if not isinstance(source, str):
            raise OptionError(f"a chat template must be a str, not {type(source).__name__}")
        self.source = source
        self._tokens = {**(special_tokens or {}), "bos_token": bos_token, "eos_token": eos_token}
        for name, token in self._tokens.items():
            if not isinstance(name, str) or not isinstance(token, str):
                raise OptionError(f"a special token must be a str, not {type(token).__name__} ({name!r})")
            if name in FUNCTIONS or name in _RESERVED:
                raise OptionError(
                    f"a special token cannot have the name {name!r}, which templates use for something else"
                )
        self._code = _compile(source)

    def __repr__(self) -> str:
        return f"<ChatTemplate of {len(self.source):,} characters>"

    def uses(self, name: str) -> bool:
        """Return whether the template reads a variable of this name, such as "tools" or "enable_thinking"."""
        return name in self._code.reads

    def render(
        self,
        messages: Sequence[Mapping[str, object]] | None = None,
        /,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        **template_args: object,
    ) -> str:
        """Return the text of a conversation.

        Args:
            messages: the conversation. Each message is a mapping of JSON values with a "role". A message's thinking
                may have the key "reasoning_content", "thinking" or "reasoning"; templates see the first two.
            tools: JSON schemas of functions.
            documents: documents that the template cites.
            add_generation_prompt: end with the beginning of a reply.
            continue_final_message: end right after the "content" of the last message instead, or after the text
                under the key with this name.
            template_args: further variables of the template: JSON values.

        Raises:
            TemplateError: the template refuses the conversation, fails on it or exceeds a limit.
            ChatError: a message, tool or document is not a JSON value, or the last message cannot be continued.
            OptionError: a variable is not a JSON value, is misspelt or clashes with another name.
        """
        if "messages" in template_args:
            if messages is not None:
                raise OptionError("messages were passed twice")
            messages = cast("Sequence[Mapping[str, object]]", template_args.pop("messages"))
        self._check_arguments(template_args)
        copier = PlainDataCopier()
        variables: dict[str, object] = {
            **self._tokens,
            **{name: copier.copy_argument(name, value) for name, value in template_args.items()},
        }
        variables["messages"] = chat = [_with_thinking_keys(m) for m in copier.copy_mappings("message", messages)]
        variables["tools"] = None if tools is None else copier.copy_mappings("tool", tools)
        variables["documents"] = None if documents is None else copier.copy_mappings("document", documents)
        variables["add_generation_prompt"] = bool(add_generation_prompt) and not continue_final_message
        if not continue_final_message:
            return self._run(variables, copier.characters)
        field = continue_final_message if isinstance(continue_final_message, str) else "content"
        final = FinalText(chat, field, self.source)
        final.mark(final.text)
        rendered = self._run(variables, copier.characters)
        if final.is_stripped(rendered) and final.text != final.text.rstrip():
            # Without the mark, the template would strip the white space before it.
            final.mark(final.text.rstrip())
            rendered = self._run(variables, copier.characters)
        return final.cut(rendered)

    def _check_arguments(self, args: Mapping[str, object]) -> None:
        for name in args:
            if name in FUNCTIONS:
                raise OptionError(f"{name!r} clashes with the template function of that name")
            if name in self._code.reads or name in self._tokens:
                continue
            near = get_close_matches(name, {*_RESERVED, *self._code.reads}, n=1, cutoff=0.88)
            if near:
                raise OptionError(
                    f"render has no option {name!r}, and the template does not read it; did you mean {near[0]!r}?"
                )

    def _run(self, variables: dict[str, object], input_characters: int) -> str:
        failure: tuple[str, int | None, bool]
        try:
            machine = Machine(TABLES, input_characters)
            return _join_output(machine, self._start(machine, variables))
        except Exception as error:
            is_limit = isinstance(error, LimitExceeded)
            failure = _error_text(error), _template_line(error.__traceback__, self._code), is_limit
        # Raised outside of the handler, so that the error does not keep the template's values alive.
        raise TemplateError(failure[0], line=failure[1], exceeds_limit=failure[2])

    def _start(self, machine: Machine, variables: dict[str, object]) -> Iterator[str]:
        names = {
            **self._code.names,
            "LoopContext": machine.make_loop,
            "Macro": machine.make_macro,
            "str": machine.to_text,
            "str_join": machine.concatenate,
        }
        root = FunctionType(self._code.root, names, "root", (missing, machine))
        context = Context(machine, {**FUNCTIONS, **variables}, None, {})  # type: ignore[arg-type]
        return cast("Iterator[str]", root(context))


def render_chat_template(
    template: str | Path,
    messages: Sequence[Mapping[str, object]],
    tools: Sequence[Mapping[str, object]] | None = None,
    add_generation_prompt: bool = True,
    **template_args: object,
) -> str:
    """Return the text of a conversation under a template; see `ChatTemplate.render`.

    Args:
        template: the text of a template, or the Path of a file that holds one.

    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(template, Path):
        template = _read_source(template)
    render: Callable[..., str] = ChatTemplate(template).render
    return render(messages, tools=tools, add_generation_prompt=add_generation_prompt, **template_args)


def _read_source(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(4 * MAX_SOURCE + 1)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise TemplateError(f"{path} is not a chat template: {error}") from None


def _compile(source: str) -> TemplateCode:
    line = None
    try:
        return compile_template(source)
    except jinja2.exceptions.TemplateSyntaxError as error:
        line = error.lineno
        message = f"line {line} of the template: {error.message or 'the template does not parse'}"
    except Exception as error:
        message = f"the template cannot be compiled: {_error_text(error)}"
    raise TemplateError(message, line=line)


def _join_output(machine: Machine, parts: Iterator[str]) -> str:
    output, length = [], 0
    for part in parts:
        machine.charge_bytes(8)
        length += len(part)
        if length > MAX_TEXT:
            raise LimitExceeded(f"the template writes more than {MAX_TEXT:,} characters")
        output.append(part)
    return "".join(output)


def _error_text(error: Exception) -> str:
    """Return an error's message, at most MAX_MESSAGE characters of it."""
    try:
        text = str(error) or type(error).__name__
    except Exception:  # the message may contain a hostile value
        text = type(error).__name__
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}…"


def _template_line(trace: TracebackType | None, code: TemplateCode) -> int | None:
    """Return the template's line that raised an error: that of the innermost frame of its code."""
    code_line = None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == FILENAME:
            code_line = trace.tb_lineno
        trace = trace.tb_next
    if code_line is None:
        return None
    return next((line for at, line in code.lines if at <= code_line), 1)


def _with_thinking_keys(message: dict[object, object]) -> dict[object, object]:
    """Return a message whose thinking has the keys that templates read."""
    thinking = next((message[name] for name in THINKING_KEYS if message.get(name) is not None), None)
    if thinking is None:
        return message
    return {"thinking": thinking, **message, "reasoning_content": thinking}
