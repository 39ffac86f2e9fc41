"""The state of `erllama chat`: the messages, and the options of the replies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import erllama
from erllama._model.requests.options import ChatOptions, chat_request
from erllama._types import Message
from erllama.checks import shown
from erllama.cli.files import new_file
from erllama.cli.reply import stream_reply
from erllama.errors import ChatError


@dataclass(slots=True)
class ChatSession:
    """A chat in the terminal. One thread uses it.

    Attributes:
        model: the model that replies.
        system: the system message; None for no system message.
        options: options of `Model.chat`, by name.
        silent: do not stream replies to stdout.
        messages: the user's messages and the replies, without the system message.
        replies: the replies of this process, the latest last, for statistics.
    """

    model: erllama.Model
    system: str | None = None
    options: dict[str, object] = field(default_factory=dict)
    silent: bool = False
    messages: list[Message] = field(default_factory=list)
    replies: list[erllama.Completion] = field(default_factory=list)

    @property
    def all_messages(self) -> list[Message]:
        """All messages, with the system message first."""
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages]

    def ask(self, text: str) -> erllama.ChatCompletion:
        """Send a user message and return the reply, which is streamed to stdout.

        If there is no reply, the message is removed. If Ctrl-C ends the reply, its text so far is kept.

        Raises:
            erllama.Error: as `Model.chat` does.
        """
        self.messages.append({"role": "user", "content": text})
        return self._reply()

    def regenerate(self) -> erllama.ChatCompletion:
        """Replace the last reply with another one, and return it.

        Raises:
            ChatError: there is no user message yet.
            erllama.Error: as `Model.chat` does. The last user message and its reply are then removed.
        """
        user_positions = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not user_positions:
            raise ChatError("there is no message to reply to; send a message first")
        del self.messages[user_positions[-1] + 1 :]
        return self._reply()

    def _reply(self) -> erllama.ChatCompletion:
        options, messages = cast(ChatOptions, self.options), self.all_messages
        has_reply = False
        try:
            if self.silent:
                reply = self.model.chat(messages, **options)
            else:
                start = lambda: self.model.stream_chat(messages, **options)  # noqa: E731
                reply = cast("erllama.ChatCompletion", stream_reply(self.model, start, self.n_tokens))
            has_reply = bool(reply.tokens)
        finally:
            if not has_reply:
                self.messages.pop()
        if has_reply:
            self.messages.append(reply.message)
            self.replies.append(reply)
        return reply

    def n_tokens(self) -> int:
        """Return the length of all messages in tokens."""
        return len(self.model.apply_chat_template(self.all_messages)) if self.all_messages else 0

    def set_options(self, changed: Mapping[str, object]) -> None:
        """Change options of the replies.

        Raises:
            OptionError: an option does not exist or has an invalid value. No option is changed then.
        """
        options = {**self.options, **changed}
        # Raises for invalid options, as a request would.
        chat_request([], cast(ChatOptions, options), "/set", None, self.model._backend.vocabulary)
        self.options = options

    def save(self, path: Path) -> None:
        """Write the messages as JSON to a file that only its owner can read. Replaces a file or a link at `path`.

        Raises:
            OSError: the file cannot be written.
        """
        text = json.dumps(self.all_messages, indent=2, ensure_ascii=False) + "\n"
        with new_file(path) as file:
            file.write(text.encode("utf-8", "backslashreplace"))

    def load(self, path: Path) -> None:
        """Replace the messages with those of a file.

        Raises:
            ChatError: the file holds no messages, or the template refuses them.
            OSError: the file cannot be read.
        """
        try:
            messages = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ChatError(f"{path} is not JSON: {error}") from None
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise ChatError(f"{path} holds {shown(messages)}; load a list of messages, as /save writes it")
        if messages:
            self.model.render_chat(messages)
        system = None
        if messages and messages[0].get("role") == "system":
            system = messages[0].get("content")
            if not isinstance(system, str):
                raise ChatError(f"{path}: the content of the system message is {shown(system)}; it must be text")
            messages = messages[1:]
        self.system, self.messages = system, messages
