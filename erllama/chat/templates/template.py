"""Chat templates: from a conversation to the text that a model reads.

A `ChatTemplate` renders as Hugging Face transformers does, to the byte, the
templates that model files carry; a template is taken for hostile, and whatever
it tries, what comes out is a text or a `TemplateError` (`sandbox`). What is given
to render is rebuilt out of plain data first, so nothing of the caller's is
changed or reached. Chats are made of it; it knows nothing of models.
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
from erllama.chat.templates.filters import TABLES
from erllama.chat.templates.limits import MAX_DEPTH, MAX_INT_BITS, MAX_STEPS, MAX_TEXT, LimitExceeded
from erllama.chat.templates.machine import Machine
from erllama.chat.templates.methods import FUNCTIONS
from erllama.errors import ChatError, OptionError, TemplateError

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

# Characters of what is told of an error: a template may raise with all that it was given.
MAX_MESSAGE: Final = 10_000
# Values within values of what is given: half of what a template may make of it.
MAX_GIVEN_DEPTH: Final = MAX_DEPTH // 2
# Names of what a model thought, of which the first is what templates read, and the second what some do.
_THOUGHTS: Final = ("reasoning_content", "thinking", "reasoning")
# Put behind the text that is to be continued, to find its end in what is rendered. It ends with a space, by
# which it shows whether the template strips its texts.
_END: Final = "END_OF_THE_TEXT_TO_CONTINUE "
_OWN: Final = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")


class ChatTemplate:
    """A chat template, compiled once; any thread may render it, any number at a time.

    Args:
        source: the template's text, in jinja2's language.
        bos_token, eos_token: what the variables of these names hold.
        special_tokens: other variables of the model's, as {"pad_token": "<pad>"}.

    Raises:
        TemplateError: it does not parse, or is beyond the limits; `line` tells where.
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
            raise OptionError(f"a chat template is a str, not {type(source).__name__}")
        self.source = source
        self._tokens = {**(special_tokens or {}), "bos_token": bos_token, "eos_token": eos_token}
        for name, token in self._tokens.items():
            if not isinstance(name, str) or not isinstance(token, str):
                raise OptionError(f"a special token is a str, not {type(token).__name__} ({name!r})")
            if name in FUNCTIONS or name in _OWN:
                raise OptionError(
                    f"a special token cannot be called {name!r}: templates have another thing of that name"
                )
        self._code = _compiled(source)

    def __repr__(self) -> str:
        return f"<ChatTemplate of {len(self.source):,} characters>"

    def uses(self, name: str) -> bool:
        """Whether the template reads a variable of this name, such as "tools" or "enable_thinking"."""
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
        """The text of a conversation.

        Args:
            messages: the conversation, each message a mapping of JSON values with a "role". What a message
                thinks may be under "reasoning_content", "thinking" or "reasoning"; templates find it under
                the first two.
            tools: JSON schemas of functions.
            documents: what the template is to cite.
            add_generation_prompt: end with what begins a reply.
            continue_final_message: end within the last message instead, right behind its "content", or
                behind its text of the name given.
            template_args: variables of the template's own: JSON values.

        Raises:
            TemplateError: the template refuses the conversation, fails on it or asks for more than it may.
            ChatError: a message, tool or document is not made of JSON values, or nothing can be continued.
            OptionError: a variable is not made of JSON values, is misspelt or clashes.
        """
        if "messages" in template_args:
            if messages is not None:
                raise OptionError("messages were given twice")
            messages = cast("Sequence[Mapping[str, object]]", template_args.pop("messages"))
        self._check_arguments(template_args)
        copier = _Copier()
        variables: dict[str, object] = {
            **self._tokens,
            **{name: copier.argument(name, value) for name, value in template_args.items()},
        }
        variables["messages"] = chat = [_with_thoughts(m) for m in copier.mappings("message", messages)]
        variables["tools"] = None if tools is None else copier.mappings("tool", tools)
        variables["documents"] = None if documents is None else copier.mappings("document", documents)
        variables["add_generation_prompt"] = bool(add_generation_prompt) and not continue_final_message
        if not continue_final_message:
            return self._run(variables, copier.characters)
        field = continue_final_message if isinstance(continue_final_message, str) else "content"
        final = _FinalText(chat, field, self.source)
        final.mark(final.text)
        rendered = self._run(variables, copier.characters)
        if final.is_stripped(rendered) and final.text != final.text.rstrip():
            # The white space before the mark is not what the template would write.
            final.mark(final.text.rstrip())
            rendered = self._run(variables, copier.characters)
        return final.cut(rendered)

    def _check_arguments(self, given: Mapping[str, object]) -> None:
        for name in given:
            if name in FUNCTIONS:
                raise OptionError(f"{name!r} clashes with the function that templates have of that name")
            if name in self._code.reads or name in self._tokens:
                continue
            near = get_close_matches(name, {*_OWN, *self._code.reads}, n=1, cutoff=0.88)
            if near:
                raise OptionError(
                    f"render has no option {name!r}, and the template does not read it; did you mean {near[0]!r}?"
                )

    def _run(self, variables: dict[str, object], given: int) -> str:
        failure: tuple[str, int | None]
        try:
            machine = Machine(TABLES, given)
            return _joined(machine, self._start(machine, variables))
        except Exception as error:
            failure = _told(error), _line(error.__traceback__, self._code)
        # Outside of the handler, so that what the template made is not kept with the error.
        raise TemplateError(failure[0], line=failure[1])

    def _start(self, machine: Machine, variables: dict[str, object]) -> Iterator[str]:
        names = {
            **self._code.names,
            "LoopContext": machine.loop,
            "Macro": machine.macro,
            "str": machine.text,
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
    """The text of a conversation under a template; see `ChatTemplate.render`.

    Args:
        template: the text of a template, or the Path of a file that holds one.

    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(template, Path):
        template = _read(template)
    render: Callable[..., str] = ChatTemplate(template).render
    return render(messages, tools=tools, add_generation_prompt=add_generation_prompt, **template_args)


def plain_documents(given: object) -> list[dict[object, object]]:
    """A copy of documents in plain data, as `ChatTemplate.render` makes it, or ChatError."""
    return _Copier().mappings("document", given)


def plain_arguments(given: Mapping[str, object]) -> dict[str, object]:
    """A copy of a template's variables in plain data, as `ChatTemplate.render` makes it, or OptionError."""
    copier = _Copier()
    return {name: copier.argument(name, value) for name, value in given.items()}


def _read(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(4 * MAX_SOURCE + 1)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise TemplateError(f"{path} is no chat template: {error}") from None


def _compiled(source: str) -> TemplateCode:
    line = None
    try:
        return compile_template(source)
    except jinja2.exceptions.TemplateSyntaxError as error:
        line = error.lineno
        message = f"line {line} of the template: {error.message or 'it does not parse'}"
    except Exception as error:
        message = f"the template cannot be compiled: {_told(error)}"
    raise TemplateError(message, line=line)


def _joined(machine: Machine, parts: Iterator[str]) -> str:
    written, length = [], 0
    for part in parts:
        machine.spend(8)
        length += len(part)
        if length > MAX_TEXT:
            raise LimitExceeded(f"the template writes more than {MAX_TEXT:,} characters")
        written.append(part)
    return "".join(written)


def _told(error: Exception) -> str:
    """What an error says, in not too many words."""
    try:
        told = str(error) or type(error).__name__
    except Exception:  # it would say what a hostile value says
        told = type(error).__name__
    return told if len(told) <= MAX_MESSAGE else f"{told[:MAX_MESSAGE]}…"


def _line(trace: TracebackType | None, code: TemplateCode) -> int | None:
    """The template's line at which an error was raised: of the innermost frame that is its own."""
    found = None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == FILENAME:
            found = trace.tb_lineno
        trace = trace.tb_next
    if found is None:
        return None
    return next((line for at, line in code.lines if at <= found), 1)


class _Copier:
    """Rebuilds what callers give out of plain data, and counts its characters."""

    def __init__(self) -> None:
        self.characters = 0
        self._parts = 0

    def mappings(self, what: str, given: object) -> list[dict[object, object]]:
        """A list of dicts, or ChatError."""
        if not isinstance(given, Sequence) or isinstance(given, str | bytes):
            raise ChatError(f"{what}s are a list of mappings, not {type(given).__name__}")
        copies = []
        for index, item in enumerate(given):
            at = index if what == "message" else None
            if not isinstance(item, Mapping):
                raise ChatError(f"a {what} is a mapping, not {type(item).__name__} ({what} {index})", index=at)
            try:
                copies.append(cast("dict[object, object]", self._copy(item, 0)))
            except _NotPlainError as refused:
                raise ChatError(f"{what} {index}: templates take JSON values, not {refused}", index=at) from None
        return copies

    def argument(self, name: str, value: object) -> object:
        """A copy of plain data, or OptionError."""
        try:
            return self._copy(value, 0)
        except _NotPlainError as refused:
            raise OptionError(f"{name}: templates take JSON values, not {refused}") from None

    def _copy(self, value: object, depth: int) -> object:
        kind = type(value)
        if kind is str:
            self.characters += len(cast(str, value))
            return value
        if value is None or kind is bool or kind is float:
            return value
        self._parts += 1
        if depth > MAX_GIVEN_DEPTH:
            raise _NotPlainError(f"values nested deeper than {MAX_GIVEN_DEPTH}")
        if self._parts > MAX_STEPS:
            raise _NotPlainError(f"more than {MAX_STEPS:,} values")
        if kind is dict or isinstance(value, Mapping):
            copy, depth = {}, depth + 1
            for key, item in cast("Mapping[object, object]", value).items():
                copy[key if type(key) is str else self._key(key)] = self._copy(item, depth)
            return copy
        if isinstance(value, list):
            return [self._copy(item, depth + 1) for item in value]
        if isinstance(value, tuple):
            return tuple(self._copy(item, depth + 1) for item in value)
        return self._scalar(value, depth)

    def _scalar(self, value: object, depth: int) -> object:
        # What is derived of plain data, such as the members of an enumeration, is brought back to it.
        if isinstance(value, str):
            return self._copy(str.__str__(value), depth)
        if isinstance(value, int):
            if int.bit_length(value) > MAX_INT_BITS:
                raise _NotPlainError(f"an integer of more than {MAX_INT_BITS} bits")
            return int.__int__(value)
        if isinstance(value, float):
            return float.__float__(value)
        raise _NotPlainError(type(value).__name__)

    def _key(self, key: object) -> object:
        if not isinstance(key, str | int | float | None):
            raise _NotPlainError(f"a key of type {type(key).__name__}")
        return self._copy(key, 0)


class _NotPlainError(Exception):
    """What was given is not made of JSON values; says what it is."""


def _with_thoughts(message: dict[object, object]) -> dict[object, object]:
    """A message whose thoughts are under the names that templates read."""
    thoughts = next((message[name] for name in _THOUGHTS if message.get(name) is not None), None)
    if thoughts is None:
        return message
    return {"thinking": thoughts, **message, "reasoning_content": thoughts}


class _FinalText:
    """The last message's text, whose end is to be found in what a template writes.

    Args:
        chat: the conversation; its last message is changed by `mark`.
        field: the name of the text.
        source: of the template.

    Raises:
        ChatError: there is no such text.
        TemplateError: the template does not read it.
    """

    def __init__(self, chat: list[dict[object, object]], field: str, source: str) -> None:
        if not chat:
            raise ChatError("there is no message to continue")
        self._index, self._message = len(chat) - 1, chat[-1]
        text = self._message.get(field)
        self._fields = [field]
        if field in _THOUGHTS:
            self._fields = [name for name in _THOUGHTS if self._message.get(name) == text]
        self._part: dict[object, object] | None = None
        if text is None:
            raise ChatError(f"the last message has no {field!r} to continue", index=self._index)
        if not any(name in source for name in self._fields):
            raise TemplateError(
                f"the template does not read {field!r}, which is to be continued", index=self._index
            )
        if isinstance(text, list | tuple):
            parts = [part for part in text if isinstance(part, dict) and isinstance(part.get("text"), str)]
            self._part = parts[-1] if parts else None
            text = self._part["text"] if self._part is not None else None
        if not isinstance(text, str):
            raise ChatError(f"the last message's {field!r} has no text to continue", index=self._index)
        self.text = text

    def mark(self, text: str) -> None:
        """Put a text with a mark behind it in the place of the message's."""
        if self._part is not None:
            self._part["text"] = text + _END
        else:
            self._message.update(dict.fromkeys(self._fields, text + _END))

    def is_stripped(self, rendered: str) -> bool:
        """Whether the template wrote the mark without the white space at its end."""
        at = rendered.rfind(_END.strip())
        return at >= 0 and not rendered.startswith(_END, at)

    def cut(self, rendered: str) -> str:
        """What the template wrote before the mark."""
        at = rendered.rfind(_END.strip())
        if at < 0 or self.text.strip() not in rendered:
            raise TemplateError(
                "the template does not write the last message whole, so it cannot be continued", index=self._index
            )
        return rendered[:at]
