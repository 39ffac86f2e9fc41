"""One conversation in normalized form, with the template that renders it.

`Conversation.render` turns messages and tools into text. `render_with_reply` shows how the template will render a
reply in later turns, so that a `Turn` can remember its tokens. `erllama.chat.chats` makes one for each request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from erllama._types import Message
from erllama.chat.content_masking import ContentMask, SpecialTokenTexts
from erllama.chat.message_adapters import adapt_messages, alternate_roles, encode_arguments
from erllama.chat.messages import normalize_messages
from erllama.chat.templates.plain_data import copy_arguments, copy_documents
from erllama.chat.templates.template import ChatTemplate
from erllama.errors import ChatError, TemplateError

# Unique texts in place of a reply, its thinking and an argument, to find out what a template does with them.
_SAMPLE_REPLY = "0b5f9d0e reply 7c41"
_SAMPLE_THINKING = "5c1e77a2 thought 90d3"
_SAMPLE_ARGUMENT = "e2a80c14 argument 3f6b"


@dataclass(frozen=True, slots=True)
class Conversation:
    """The input of a template.

    Attributes:
        template: the model's template, or the caller's.
        messages, tools: in normalized form.
        documents, args: further variables of the template.
        continue_final: the reply continues the last message, which is the assistant's.
        special: texts that content must not spell out as special tokens; the rendered text then has marks (see
            `content_masking`). None if content may spell them out.
    """

    template: ChatTemplate
    messages: list[Message]
    tools: list[Message]
    documents: Sequence[Mapping[str, object]] | None
    args: Mapping[str, object]
    continue_final: bool
    special: SpecialTokenTexts | None = None

    def render(self, *, add_generation_prompt: bool = True) -> str:
        """Return the conversation as the template renders it.

        Raises:
            ChatError: there are tools, and the template does not use tools; or the text cannot be encoded as UTF-8.
            TemplateError: as for `ChatTemplate.render`.
        """
        if self.tools and not self.template.uses("tools"):
            raise ChatError("the chat template does not use tools; set chat_template to one that does")
        return self._render_adapted(add_generation_prompt)

    def with_stripped_content(self, rendered: str) -> Conversation:
        """Return the conversation with the message to be continued as the template renders it.

        Some templates strip white space of a message's text.

        Args:
            rendered: the conversation as `render` returns it.
        """
        result = self
        for strip in (str.rstrip, str.lstrip) if self.continue_final else ():
            last = result.messages[-1]
            content = str(last["content"])
            shorter = replace(result, messages=[*result.messages[:-1], {**last, "content": strip(content)}])
            with suppress(ChatError):
                if strip(content) != content and shorter.render() == rendered:
                    result = shorter
        return result

    def _render_adapted(self, add_generation_prompt: bool) -> str:
        messages = adapt_messages(self.messages, self.template.source)
        try:
            return self._render_messages(messages, add_generation_prompt)
        except TemplateError as error:
            if error.exceeds_limit:
                raise  # it would take as long again
            # Some templates require the arguments of calls as JSON text, and some that roles alternate.
            alternating = alternate_roles(messages)
            tried = [messages]
            for changed in (encode_arguments(messages), alternating, encode_arguments(alternating)):
                if changed not in tried:
                    tried.append(changed)
                    with suppress(TemplateError):
                        return self._render_messages(changed, add_generation_prompt)
            raise

    def _render_messages(self, messages: list[Message], add_generation_prompt: bool) -> str:
        inputs: tuple[Any, Any, Any] = (messages, self.tools or None, self.documents)
        mask, args = None, self.args
        if self.special is not None:
            # Documents and args are the caller's objects. Copies in plain data are finite.
            documents = None if self.documents is None else copy_documents(self.documents)
            args = copy_arguments(self.args)
            mask = ContentMask(self.special, messages, self.tools, documents, args, self.template.source)
            inputs = (mask.mask_messages(messages), mask.mask_value(inputs[1]), mask.mask_value(documents))
        rendered = self.template.render(
            inputs[0],
            tools=inputs[1],
            documents=inputs[2],
            add_generation_prompt=add_generation_prompt,
            continue_final_message=self.continue_final,
            **args,
        )
        try:
            rendered.encode()
        except UnicodeEncodeError as error:
            raise ChatError(
                f"the chat template writes half of a surrogate pair, at character {error.start}; "
                "use whole characters in the template, template_args and documents"
            ) from None
        return rendered if mask is None else mask.unmask(rendered)

    def reply_message(
        self, content: str, thinking: str, calls: Sequence[Mapping[str, object]], *, within_character: bool = False
    ) -> Message:
        """Return a reply as a message to append, or to replace the last message if the reply continues it.

        Args:
            within_character: the continued message ends within a character, which the reply contains as a whole.
        """
        message: Message = {"role": "assistant", "content": content}
        if self.continue_final:
            beginning = str(self.messages[-1]["content"])
            beginning = beginning.removesuffix("\ufffd") if within_character else beginning
            message = {**self.messages[-1], "content": f"{beginning}{content}"}
        if thinking:
            message["reasoning_content"] = f"{message.get('reasoning_content') or ''}{thinking}"
        if calls:
            message["tool_calls"] = list(calls)
        return message

    def render_with_reply(self, message: Message, rendered: str) -> str | None:
        """Return the conversation and a reply as later turns render them, up to the end of the reply's text.

        Args:
            message: the reply, as `reply_message` returns it.
            rendered: the conversation before the reply, as rendered for this turn.

        Returns:
            None if this text would not identify what was computed: the template renders the earlier messages
            differently now, or leaves out a part of the reply, so that other replies render to the same text.

        Raises:
            ChatError: the template refuses a conversation that ends in this way.
        """
        whole = self._with_reply(message).render(add_generation_prompt=False)
        sample = self._with_reply({"role": "assistant", "content": _SAMPLE_REPLY})
        _, separator, end = sample.render(add_generation_prompt=False).rpartition(_SAMPLE_REPLY)
        if not separator or not whole.startswith(rendered) or not whole.endswith(end):
            return None
        text = whole[: len(whole) - len(end)]
        return text if len(text) > len(rendered) and self._renders_whole_reply(message, text, rendered) else None

    def _renders_whole_reply(self, message: Message, text: str, rendered: str) -> bool:
        """Return whether the template renders all of a reply, at the end of `text`."""
        content = str(message["content"]).strip()
        if text.find(content, max(len(rendered) - len(content) + 1, 0)) < 0:
            return False
        sample, expected = dict(message), []
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            arguments = [f"{_SAMPLE_ARGUMENT} {i}" for i in range(len(calls))]
            sample["tool_calls"] = list(map(_with_argument, calls, arguments))
            expected += arguments
            if content:
                sample["content"] = _SAMPLE_REPLY
                expected.append(_SAMPLE_REPLY)
        if message.get("reasoning_content"):
            sample["reasoning_content"] = _SAMPLE_THINKING
            expected.append(_SAMPLE_THINKING)
        if not expected:
            return True
        sample_text = self._with_reply(sample).render(add_generation_prompt=False)
        return sample_text.startswith(rendered) and all(sample_text.count(part) == 1 for part in expected)

    def _with_reply(self, message: Message) -> Conversation:
        before = self.messages[:-1] if self.continue_final else self.messages
        return replace(self, messages=[*before, *normalize_messages([message])], continue_final=False)


def _with_argument(call: Mapping[str, object], argument: str) -> Message:
    function = call["function"]
    assert isinstance(function, Mapping)
    return {**call, "function": {**function, "arguments": json.dumps({"argument": argument})}}
