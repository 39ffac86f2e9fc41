"""The state of `erllama chat`: the model, the messages, attached files, and the options of the replies."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import erllama
from erllama._model.requests.options import ChatOptions, TemplateOptions, ToolRunOptions, chat_request
from erllama._types import Message
from erllama.checks import shown
from erllama.cli.chat.loaded_model import LoadedModel
from erllama.cli.chat.text_files import (
    MOST_BYTES_OF_CONVERSATION,
    MOST_BYTES_OF_FILE,
    quoted_file,
    read_text_file,
)
from erllama.cli.files import new_file
from erllama.cli.reply import PlainWriter, Writer, stream_reply
from erllama.errors import ChatError, OptionError


@dataclass(slots=True)
class ChatSession:
    """A chat in the terminal. One thread uses it.

    Attributes:
        loaded: the model that replies.
        system: the system message; None for no system message.
        options: options of `Model.chat`, by name.
        silent: do not stream replies to stdout.
        tools: the functions that the model may call.
        new_writer: returns a writer for a reply.
        messages: the user's messages and the replies, without the system message.
        attached: texts of files that the next message begins with.
        name: the name under which `/save` saves the conversation; None for none.
        replies: the replies of this process, the latest last, for statistics.
    """

    loaded: LoadedModel
    system: str | None = None
    options: dict[str, object] = field(default_factory=dict)
    silent: bool = False
    tools: Sequence[Callable[..., object]] = ()
    new_writer: Callable[[], Writer] = PlainWriter
    messages: list[Message] = field(default_factory=list)
    attached: list[str] = field(default_factory=list)
    name: str | None = None
    replies: list[erllama.Completion] = field(default_factory=list)

    @property
    def model(self) -> erllama.Model:
        """The model that replies."""
        return self.loaded.model

    @property
    def all_messages(self) -> list[Message]:
        """All messages, with the system message first."""
        return [*self._system_messages, *self.messages]

    @property
    def _system_messages(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    @property
    def _request_options(self) -> dict[str, object]:
        # Files, results of tools and loaded conversations must not contain special tokens, which begin a message.
        return {"special_tokens_in_content": False, **self.options}

    def ask(self, text: str) -> erllama.ChatCompletion:
        """Send a user message and return the reply, which is streamed to stdout.

        If there is no reply, the message is removed. If Ctrl-C ends the reply, its text so far is kept.

        Raises:
            erllama.Error: as `Model.chat` does.
        """
        before = self.messages
        reply = self._reply([*before, {"role": "user", "content": "".join([*self.attached, text])}], before)
        if self.messages is not before:
            self.attached = []
        return reply

    def regenerate(self) -> erllama.ChatCompletion:
        """Replace the last reply with another one, and return it.

        Raises:
            ChatError: there is no user message yet.
            erllama.Error: as `Model.chat` does. The last user message and its reply are then removed.
        """
        user_positions = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not user_positions:
            raise ChatError("there is no message to reply to; send a message first")
        last = user_positions[-1]
        return self._reply(self.messages[: last + 1], self.messages[:last])

    def _reply(self, messages: list[Message], without_reply: list[Message]) -> erllama.ChatCompletion:
        """Reply to messages. If there is no reply, the messages become `without_reply`."""
        self.messages = messages
        has_reply = False
        try:
            reply, added = self._run_tools() if self.tools else self._chat()
            has_reply = bool(reply.tokens)
        finally:
            if not has_reply:
                self.messages = without_reply
        if has_reply:
            self.messages = [*messages, *added]
        return reply

    def _chat(self) -> tuple[erllama.ChatCompletion, list[Message]]:
        """Return a reply, and its message."""
        options, messages = cast(ChatOptions, self._request_options), self.all_messages
        if self.silent:
            reply = self.model.chat(messages, **options)
        else:
            start = lambda: self.model.stream_chat(messages, **options)  # noqa: E731
            reply = stream_reply(self.model, start, self.n_tokens, self.new_writer())
        if reply.tokens:
            self.replies.append(reply)
        return reply, [reply.message]

    def _run_tools(self) -> tuple[erllama.ChatCompletion, list[Message]]:
        """Return the last reply of a run, and all messages of the run."""
        options, messages = cast(ToolRunOptions, self._request_options), self.all_messages
        start = lambda: self.model.stream_run_tools(messages, self.tools, **options)  # noqa: E731
        run = stream_reply(self.model, start, self.n_tokens, self.new_writer(), self.replies.append)
        added: list[Message] = [dict(message) for message in run.messages[len(messages) :]]
        # Templates may refuse a call without a result.
        calls = run.reply.tool_calls
        added += [erllama.ToolResult(call, "Error: the call was not run").message for call in calls]
        return run.reply, added

    def attach(self, path: Path) -> int:
        """Add the text of a file to the next message, and return its length in tokens.

        Raises:
            OptionError: it is not a text file, or is too large for the context.
            OSError: the file cannot be read.
        """
        text = quoted_file(path, read_text_file(path, MOST_BYTES_OF_FILE))
        n_tokens, n_ctx = len(self.model.tokenize(text, add_special=False)), self.model.n_ctx
        if n_tokens >= n_ctx:
            raise OptionError(f"{path} has {n_tokens:,} tokens; the context holds {n_ctx:,}: pass a part of it")
        self.attached.append(text)
        return n_tokens

    def reset(self) -> None:
        """Start a new conversation. Keeps the system message."""
        self.messages, self.attached, self.name = [], [], None

    def n_tokens(self) -> int:
        """Return the length of all messages in tokens."""
        if not self.all_messages:
            return 0
        names = TemplateOptions.__annotations__
        options = {name: value for name, value in self._request_options.items() if name in names}
        if self.tools:
            options["tools"] = self.tools
        return len(self.model.apply_chat_template(self.all_messages, **cast(TemplateOptions, options)))

    def set_options(self, changed: Mapping[str, object]) -> None:
        """Change options of the replies.

        Raises:
            OptionError: an option does not exist or has an invalid value. No option is changed then.
        """
        if self.tools and "tools" in changed:
            raise OptionError("tools: the tools of this chat are the functions of --tools")
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
            OptionError: it is not a text file, or is too large.
            OSError: the file cannot be read.
        """
        text = read_text_file(path, MOST_BYTES_OF_CONVERSATION)
        try:
            messages = json.loads(text)
        except (ValueError, RecursionError) as error:
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
        self.reset()
        self.system, self.messages = system, messages
