"""A loaded model and how it is served: `ServedModel`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import erllama
from erllama._model.model import Model
from erllama.chat.thinking import find_thinking_markers


@dataclass(frozen=True, slots=True, eq=False)
class ServedModel:
    """A model and how it is served.

    Attributes:
        model: the loaded model. Its `id` is the name that clients use.
        aliases: further names. "*" for every name that no model has.
        special_tokens_in_content: whether messages may spell out special tokens. Unsafe if messages have texts from
            outside, such as web pages.
        created: time of loading, in seconds since 1970.
        defaults: options of `Model.chat` that apply where a request sets none, such as `temperature`, `seed` and
            `chat_template`.
        pooling: how the vectors of a text's tokens become one, as of `Model.embed`; None for the model's own.
        file: name of the model's file; "" if it has none.
    """

    model: Model
    aliases: tuple[str, ...] = ()
    special_tokens_in_content: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    defaults: Mapping[str, object] = field(default_factory=dict)
    pooling: str | None = None
    file: str = ""

    @property
    def name(self) -> str:
        """The name of the model."""
        return self.model.id

    def with_defaults(self, options: Mapping[str, object]) -> dict[str, object]:
        """Return the options of a request, with the model's own where the request has none.

        Of `template_args`, each variable is an option of its own.
        """
        found = {**self.defaults, **options}
        args = [each["template_args"] for each in (self.defaults, options) if each.get("template_args")]
        if len(args) == 2:
            found["template_args"] = {**args[0], **args[1]}  # type: ignore[dict-item]
        return found

    @property
    def fingerprint(self) -> str:
        """What computes the replies, such as "b10605-erllama-0.1.0": the build of libllama and our version."""
        build = self.model._backend.namespace.get("libllama")
        return f"{build}-erllama-{erllama.__version__}" if build else f"erllama-{erllama.__version__}"

    @property
    def can_think(self) -> bool:
        """Whether the chat template has markers of thinking."""
        templates = self.model._chat_requests.chats.templates
        return find_thinking_markers(templates.choose(self.defaults.get("chat_template")).source) is not None
