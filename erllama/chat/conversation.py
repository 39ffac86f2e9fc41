"""A conversation in one form, and the template that writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from erllama.chat.content_masking import ContentMask, SpecialTexts
from erllama.chat.message_adapters import as_template_takes, with_arguments_as_text
from erllama.chat.messages import normalized_messages
from erllama.chat.templates.template import ChatTemplate, plain_arguments, plain_documents
from erllama.errors import ChatError, TemplateError

Message = dict[str, object]

# They stand for what is said, thought and given to a tool, where it is asked what a template makes of it.
_ANY_REPLY = "0b5f9d0e reply 7c41"
_ANY_THOUGHT = "5c1e77a2 thought 90d3"
_ANY_ARGUMENT = "e2a80c14 argument 3f6b"


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a template is given.

    Attributes:
        template: that of the model, or the caller's.
        messages, tools: normalized.
        documents, args: what the template gets beside them.
        continued: the last message, the assistant's, is to be gone on with.
        special: the texts of tokens that content is not read as; None where it is. What is written is marked, then.
    """

    template: ChatTemplate
    messages: list[Message]
    tools: list[Message]
    documents: Sequence[Mapping[str, object]] | None
    args: Mapping[str, object]
    continued: bool
    special: SpecialTexts | None = None

    def text(self, *, add_generation_prompt: bool = True) -> str:
        """The conversation as the template writes it.

        Raises:
            ChatError: there are tools, and the template has no place for them; or what it writes is no text.
            TemplateError: as of `ChatTemplate.render`.
        """
        if self.tools and not self.template.uses("tools"):
            raise ChatError("the chat template has no place for tools; give chat_template= with one that has")
        return self._written(add_generation_prompt)

    def as_written(self, text: str) -> Conversation:
        """The conversation with the message to be continued as the template writes it: some strip its text.

        Args:
            text: the conversation, as `text` gives it.
        """
        found = self
        for strip in (str.rstrip, str.lstrip) if self.continued else ():
            last = found.messages[-1]
            content = str(last["content"])
            shorter = replace(found, messages=[*found.messages[:-1], {**last, "content": strip(content)}])
            with suppress(ChatError):
                if strip(content) != content and shorter.text() == text:
                    found = shorter
        return found

    def _written(self, add_generation_prompt: bool) -> str:
        messages = as_template_takes(self.messages, self.template.source)
        try:
            return self._rendered(messages, add_generation_prompt)
        except TemplateError:
            # Some templates take the arguments of calls as JSON text.
            as_text = with_arguments_as_text(messages)
            if as_text == messages:
                raise
            with suppress(TemplateError):
                return self._rendered(as_text, add_generation_prompt)
            raise

    def _rendered(self, messages: list[Message], add_generation_prompt: bool) -> str:
        given: tuple[Any, Any, Any] = (messages, self.tools or None, self.documents)
        mask, args = None, self.args
        if self.special is not None:
            # Rebuilt of plain data, which ends: documents and args are the caller's own.
            documents = None if self.documents is None else plain_documents(self.documents)
            args = plain_arguments(self.args)
            mask = ContentMask(self.special, messages, self.tools, documents, args, self.template.source)
            given = (mask.messages(messages), mask.value(given[1]), mask.value(documents))
        written = self.template.render(
            given[0],
            tools=given[1],
            documents=given[2],
            add_generation_prompt=add_generation_prompt,
            continue_final_message=self.continued,
            **args,
        )
        try:
            written.encode()
        except UnicodeEncodeError as error:
            raise ChatError(
                f"the chat template writes half a surrogate pair, at character {error.start}, which is no text; "
                "give whole characters in the template, template_args and documents"
            ) from None
        return written if mask is None else mask.marked(written)

    def message(
        self, content: str, thinking: str, calls: Sequence[Mapping[str, object]], *, within_character: bool = False
    ) -> Message:
        """A reply as a message, to be added; or to take the last one's place, where that was gone on with.

        Args:
            within_character: the message that was gone on with ended within a character, which the reply has whole.
        """
        message: Message = {"role": "assistant", "content": content}
        if self.continued:
            begun = str(self.messages[-1]["content"])
            begun = begun.removesuffix("\ufffd") if within_character else begun
            message = {**self.messages[-1], "content": f"{begun}{content}"}
        if thinking:
            message["reasoning_content"] = f"{message.get('reasoning_content') or ''}{thinking}"
        if calls:
            message["tool_calls"] = list(calls)
        return message

    def as_it_comes_back(self, message: Message, written: str) -> str | None:
        """The conversation and a reply, up to the end of its text, as the template writes them in later turns.

        Args:
            message: the reply, as `message` gives it.
            written: what the template wrote before the reply.

        Returns:
            None where that is not what was computed: where the template writes what was before otherwise, or leaves
            out some of the reply, and so writes others as it does this one.

        Raises:
            ChatError: the template takes no conversation that ends so.
        """
        whole = self._with(message).text(add_generation_prompt=False)
        sample = self._with({"role": "assistant", "content": _ANY_REPLY})
        _, found, end = sample.text(add_generation_prompt=False).rpartition(_ANY_REPLY)
        if not found or not whole.startswith(written) or not whole.endswith(end):
            return None
        text = whole[: len(whole) - len(end)]
        return text if len(text) > len(written) and self._writes_all(message, text, written) else None

    def _writes_all(self, message: Message, text: str, written: str) -> bool:
        """Whether a template leaves nothing out of a reply, which it wrote as `text`."""
        said = str(message["content"]).strip()
        if text.find(said, max(len(written) - len(said) + 1, 0)) < 0:
            return False
        sample, expected = dict(message), []
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            arguments = [f"{_ANY_ARGUMENT} {i}" for i in range(len(calls))]
            sample["tool_calls"] = list(map(_with_argument, calls, arguments))
            expected += arguments
            if said:
                sample["content"] = _ANY_REPLY
                expected.append(_ANY_REPLY)
        if message.get("reasoning_content"):
            sample["reasoning_content"] = _ANY_THOUGHT
            expected.append(_ANY_THOUGHT)
        if not expected:
            return True
        found = self._with(sample).text(add_generation_prompt=False)
        return found.startswith(written) and all(found.count(mark) == 1 for mark in expected)

    def _with(self, message: Message) -> Conversation:
        before = self.messages[:-1] if self.continued else self.messages
        return replace(self, messages=[*before, *normalized_messages([message])], continued=False)


def _with_argument(call: Mapping[str, object], argument: str) -> Message:
    function = call["function"]
    assert isinstance(function, Mapping)
    return {**call, "function": {**function, "arguments": json.dumps({"argument": argument})}}
