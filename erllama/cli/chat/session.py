"""A conversation at the prompt: its messages, and the options of its replies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import erllama
from erllama._model.request_options import ChatOptions, chat_request
from erllama.cli import reply as replies
from erllama.cli.files import new_file
from erllama.errors import ChatError, shown

Message = dict[str, object]


@dataclass(slots=True)
class Conversation:
    """What is said, and how replies are drawn. Of one thread.

    Attributes:
        model: what replies.
        system: what the conversation begins with; None for nothing.
        options: of `Model.chat`, by name.
        silent: replies are not shown as they come.
        messages: those of the user and the replies, in turn.
        replies: what each reply of this process cost, the latest last.
    """

    model: erllama.Model
    system: str | None = None
    options: dict[str, object] = field(default_factory=dict)
    silent: bool = False
    messages: list[Message] = field(default_factory=list)
    replies: list[erllama.Completion] = field(default_factory=list)

    @property
    def all_messages(self) -> list[Message]:
        """With the system message, as the model gets them."""
        first: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.messages]

    def ask(self, text: str) -> erllama.ChatCompletion:
        """Say something; the reply is shown as it comes.

        A message that gets no reply is taken back; a reply that Ctrl-C ends stays as far as it came.

        Raises:
            erllama.Error: as of `Model.chat`.
        """
        self.messages.append({"role": "user", "content": text})
        return self._answer()

    def regenerate(self) -> erllama.ChatCompletion:
        """Another reply in place of the last one.

        Raises:
            ChatError: there is none.
            erllama.Error: as of `Model.chat`; the last one is then gone, and its message, too.
        """
        asked = [at for at, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            raise ChatError("nothing was said yet; say something first")
        del self.messages[asked[-1] + 1 :]
        return self._answer()

    def _answer(self) -> erllama.ChatCompletion:
        options, messages = cast(ChatOptions, self.options), self.all_messages
        came = False
        try:
            if self.silent:
                reply = self.model.chat(messages, **options)
            else:
                stream = lambda: self.model.stream_chat(messages, **options)  # noqa: E731
                reply = cast("erllama.ChatCompletion", replies.show(self.model, stream, self.n_tokens))
            came = bool(reply.tokens)
        finally:
            if not came:
                self.messages.pop()
        if came:
            self.messages.append(reply.message)
            self.replies.append(reply)
        return reply

    def n_tokens(self) -> int:
        """Tokens of all that was said."""
        return len(self.model.apply_chat_template(self.all_messages)) if self.all_messages else 0

    def set(self, changed: Mapping[str, object]) -> None:
        """Change options of the replies.

        Raises:
            OptionError: there is none of a name, or it cannot be that; all stay as they were.
        """
        options = {**self.options, **changed}
        # As a request would be checked.
        chat_request([], cast(ChatOptions, options), "/set", None, self.model._backend.vocabulary)
        self.options = options

    def save(self, path: Path) -> None:
        """Write the messages to a new file of the user's alone, as JSON; it replaces a file or a link of that name.

        Raises:
            OSError: it cannot be written.
        """
        text = json.dumps(self.all_messages, indent=2, ensure_ascii=False) + "\n"
        with new_file(path) as file:
            file.write(text.encode("utf-8", "backslashreplace"))

    def load(self, path: Path) -> None:
        """Go on with the messages of a file.

        Raises:
            ChatError: they are none, or the template refuses them.
            OSError: it cannot be read.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ChatError(f"{path} is no JSON: {error}") from None
        if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
            raise ChatError(f"{path} holds {shown(found)}; give a list of messages, as /save writes it")
        if found:
            self.model.render_chat(found)
        system = None
        if found and found[0].get("role") == "system":
            system = found[0].get("content")
            if not isinstance(system, str):
                raise ChatError(f"{path}: the content of its system message is {shown(system)}; give a text")
            found = found[1:]
        self.system, self.messages = system, found
