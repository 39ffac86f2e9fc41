"""The chat templates of one model: which template a request uses, compiled once.

`ModelTemplates` chooses among the model's own templates, a caller's, and ChatML. `erllama.chat.chats` calls it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path

from erllama._runtime.log import logger
from erllama.chat.templates.template import CHATML, ChatTemplate
from erllama.chat.thinking import find_thinking_markers
from erllama.engine import Markers
from erllama.errors import OptionError

log = logger("erllama")


class ModelTemplates:
    """Chooses and compiles chat templates. Thread-safe.

    Args:
        sources: the model's templates by name.
        special_tokens: texts of special tokens by the names under which templates read them.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._sources, self._special_tokens = sources, special_tokens
        self._lock = threading.Lock()
        self._warned = False
        self._compiled = lru_cache(maxsize=16)(self._compile)

    def choose(self, requested: object = None, *, tools: bool = False) -> ChatTemplate:
        """Return the template that a request uses.

        Args:
            requested: a template's text, the name of one of the model's templates, or the path of a file; None for
                the model's default.
            tools: the conversation has tools.

        Raises:
            TemplateError: the template does not parse.
            OptionError: `requested` is none of these, or the file cannot be read.
        """
        if isinstance(requested, Path):
            try:
                return self._compiled(requested.expanduser().read_text("utf-8"))
            except (OSError, ValueError, RuntimeError) as error:  # not UTF-8, not a path, no home directory
                raise OptionError(f"chat_template={str(requested)!r} cannot be read: {error}") from None
        if isinstance(requested, str) and requested in self._sources:
            return self._compiled(self._sources[requested])
        if isinstance(requested, str) and "{" in requested:
            return self._compiled(requested)
        if requested is not None:
            names = ", ".join(map(repr, self._sources)) or "none"
            raise OptionError(
                f"chat_template={requested!r:.80} is neither a template nor the name of one of the model's "
                f"({names}); pass a template's text, such a name, or the pathlib.Path of a file"
            )
        return self._compiled(self._default_source(tools))

    @cached_property
    def thinking_markers(self) -> Markers | None:
        """The markers of thinking in the model's default template; None if it has none."""
        return find_thinking_markers(self.choose().source) if self._sources else None

    def _default_source(self, tools: bool) -> str:
        if tools and "tool_use" in self._sources:
            return self._sources["tool_use"]
        if "default" in self._sources:
            return self._sources["default"]
        with self._lock:
            warned, self._warned = self._warned, True
        if not warned:
            log.warning(
                "the model has no chat template; using ChatML, which the model may not know: set chat_template"
            )
        return CHATML

    def _compile(self, source: str) -> ChatTemplate:
        names = dict(self._special_tokens)
        return ChatTemplate(
            source,
            bos_token=names.pop("bos_token", ""),
            eos_token=names.pop("eos_token", ""),
            special_tokens=names,
        )
