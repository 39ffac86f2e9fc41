"""The end of the last message in a rendered conversation, for a reply that continues it.

`ChatTemplate.render` uses `FinalText` with `continue_final_message`.
"""

from __future__ import annotations

from typing import Final

from erllama.errors import ChatError, TemplateError

# Keys of a message's thinking. Templates read the first, and some read the second.
THINKING_KEYS: Final = ("reasoning_content", "thinking", "reasoning")
# Put behind the text that is continued, to find its end in the rendered text. Its last character is a space, which
# shows whether the template strips texts.
_END: Final = "END_OF_THE_TEXT_TO_CONTINUE "


class FinalText:
    """The text of the last message, and the search for its end in a rendered conversation.

    Args:
        chat: the conversation. `mark` changes its last message.
        field: the message's key that has the text.
        source: the template's source.

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
        if field in THINKING_KEYS:
            self._fields = [name for name in THINKING_KEYS if self._message.get(name) == text]
        self._part: dict[object, object] | None = None
        if text is None:
            raise ChatError(f"the last message has no {field!r} to continue", index=self._index)
        if not any(name in source for name in self._fields):
            raise TemplateError(
                f"the template does not read {field!r}, so it cannot be continued", index=self._index
            )
        if isinstance(text, list | tuple):
            parts = [part for part in text if isinstance(part, dict) and isinstance(part.get("text"), str)]
            self._part = parts[-1] if parts else None
            text = self._part["text"] if self._part is not None else None
        if not isinstance(text, str):
            raise ChatError(f"the last message's {field!r} has no text to continue", index=self._index)
        self.text = text

    def mark(self, text: str) -> None:
        """Replace the message's text by `text` and a mark."""
        if self._part is not None:
            self._part["text"] = text + _END
        else:
            self._message.update(dict.fromkeys(self._fields, text + _END))

    def is_stripped(self, rendered: str) -> bool:
        """Return whether the template rendered the mark without the white space at its end."""
        at = rendered.rfind(_END.strip())
        return at >= 0 and not rendered.startswith(_END, at)

    def cut(self, rendered: str) -> str:
        """Return the rendered text before the mark.

        Raises:
            TemplateError: the template did not render the whole text.
        """
        at = rendered.rfind(_END.strip())
        if at < 0 or self.text.strip() not in rendered:
            raise TemplateError(
                "the template does not render the whole last message, so it cannot be continued", index=self._index
            )
        return rendered[:at]
