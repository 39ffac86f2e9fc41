"""Pins of a server: those of its configuration, and those that clients ask for with a time to live.

`ConfiguredPins` pins the configured prefixes of each model that is loaded. `ClientPins` pins prefixes of requests
after the requests have ended. Both are best effort: what fails is logged and fails no request.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from erllama._model.model import Model
from erllama._model.requests.options import TemplateOptions, pin_ttl
from erllama.cache.blocks.pins import check_pin_name
from erllama.chat.json_values import InvalidValueError, parse_json
from erllama.checks import shown
from erllama.errors import Error, ModelUnloaded, OptionError, PinQuotaExceeded
from erllama.server.conduct.keys import combined_salt
from erllama.server.models import ModelPool, ServedModel

log = logging.getLogger("erllama.server")

OPTIONS = ("model", "name", "system", "text_file", "messages_file", "tools_file", "ttl", "cache_salt")
_CONTENTS = ("system", "text_file", "messages_file")
_CLIENT_SHARE = 0.5  # of the bytes that pins may protect, so that clients leave room for the operator's pins
_MAX_CLIENT_PINS = 64
_MAX_RUNNING = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PinEntry:
    """A pin that a configuration names.

    Attributes:
        model: a name of the model.
        content: text, or messages.
        tools: as of `Model.pin`; None for no tools.
        name, ttl: as of `Model.pin`.
        cache_salt: that of the requests which use the prefix; of a server with keys, that of the key.
    """

    model: str
    content: str | Sequence[Mapping[str, object]]
    tools: Sequence[Mapping[str, object]] | None = None
    name: str | None = None
    ttl: float | None = None
    cache_salt: str | None = None

    @classmethod
    def of(cls, entry: Mapping[str, object], resolve: Callable[[str], Path]) -> PinEntry:
        """Return a pin with the options of a section `[[pins]]`. Reads the files that they name.

        Args:
            resolve: returns the path of a file.

        Raises:
            OptionError: an option has a wrong type or value, or a file cannot be read.
        """
        given = {name: value for name, value in entry.items() if name in OPTIONS}
        for name, value in given.items():
            if name != "ttl" and (not isinstance(value, str) or not value):
                raise OptionError(f"{name} must be a text, not {shown(value)}")
        texts: dict[str, Any] = given
        if "model" not in texts:
            raise OptionError("a pin needs a model, the name of one")
        contents = [name for name in _CONTENTS if name in texts]
        if len(contents) != 1:
            raise OptionError(f"a pin needs one of {', '.join(_CONTENTS)}")
        if "tools_file" in texts and contents == ["text_file"]:
            raise OptionError("tools_file has an effect on system and messages_file only; remove it")
        content: str | Sequence[Mapping[str, object]]
        match contents[0]:
            case "system":
                content = [{"role": "system", "content": texts["system"]}]
            case "text_file":
                content = _read("text_file", resolve(texts["text_file"]))
            case _:
                content = _read_objects("messages_file", resolve(texts["messages_file"]))
        tools = None
        if "tools_file" in texts:
            tools = _read_objects("tools_file", resolve(texts["tools_file"]))
        ttl = pin_ttl(texts["ttl"]) if "ttl" in texts else None
        if "name" in texts:
            check_pin_name(texts["name"])
        return cls(
            model=texts["model"],
            content=content,
            tools=tools,
            name=texts.get("name"),
            ttl=ttl,
            cache_salt=texts.get("cache_salt"),
        )

    def check_names(self, names: Collection[str]) -> None:
        """Raise OptionError if the model is none of the server's, whose names and aliases are `names`."""
        if self.model not in names:
            raise OptionError(f"a pin names the model {self.model!r}; the server has {', '.join(names)}")


def _read(option: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{option}: {path} cannot be read: {error}") from None


def _read_objects(option: str, path: Path) -> list[dict[str, object]]:
    try:
        value = parse_json(_read(option, path))
    except InvalidValueError as error:
        raise OptionError(f"{option}: {path} is not JSON: {error} at character {error.at}") from None
    if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
        raise OptionError(f"{option}: {path} must have a JSON list of objects, with at least one")
    return value


# --- pins of the configuration ----------------------------------------------------------------


class ConfiguredPins:
    """The pins of the configuration. Pins the prefixes of a model whenever it is loaded."""

    def __init__(self) -> None:
        self._entries: Sequence[PinEntry] = ()
        self._has_keys = False

    def set(self, entries: Sequence[PinEntry], models: ModelPool, *, has_keys: bool) -> None:
        """Pin these prefixes from now on, those of loaded models at once.

        Args:
            has_keys: whether the server has keys of clients.
        """
        self._entries, self._has_keys = tuple(entries), has_keys
        models.lifecycle.on_loaded = self.begin
        for served in models.loaded():
            self.begin(served)

    def begin(self, served: ServedModel) -> None:
        """Pin the prefixes of a loaded model in a thread, one after another. Returns at once."""
        names = (served.name, *served.aliases)
        own = [entry for entry in self._entries if entry.model in names]
        if own:
            arguments = (served, own, self._has_keys)
            name = f"erllama-pins-{served.name}"
            threading.Thread(target=pin_entries, args=arguments, name=name, daemon=True).start()


def pin_entries(served: ServedModel, entries: Sequence[PinEntry], has_keys: bool) -> None:
    """Pin the prefixes of a loaded model. Logs those that cannot be pinned."""
    model = served.model
    for entry in entries:
        options = _pin_options(served, entry, has_keys)
        try:
            pin = model.pin(entry.content, **options)
        except ModelUnloaded:
            return
        except Error as error:
            log.warning("a prefix of model %r could not be pinned: %s", model.id, error)
        except Exception:
            log.exception("a prefix of model %r could not be pinned", model.id)
        else:
            log.info("model %r: pinned %s, %d tokens, %d bytes", model.id, pin.name, pin.n_tokens, pin.n_bytes)


def _pin_options(served: ServedModel, entry: PinEntry, has_keys: bool) -> dict[str, Any]:
    """Return the options of `Model.pin`. Messages are rendered as those of requests."""
    salt = entry.cache_salt if not has_keys else combined_salt(entry.cache_salt, None)
    options: dict[str, Any] = {"name": entry.name, "ttl": entry.ttl, "cache_salt": salt}
    if not isinstance(entry.content, str):
        known = TemplateOptions.__annotations__
        options |= {name: value for name, value in served.defaults.items() if name in known}
        options["special_tokens_in_content"] = served.special_tokens_in_content
        if entry.tools is not None:
            options["tools"] = entry.tools
    return options


# --- pins of clients --------------------------------------------------------------------------


class ClientPins:
    """Pins prefixes of requests in the background. Used by the server's event loop.

    Bounded: a few run at once, and further ones are skipped; clients have at most 64 pins, and the oldest one is
    removed; and all pins take at most half of the bytes that pins may protect.
    """

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()
        self._names: OrderedDict[str, Model] = OrderedDict()

    def begin(
        self,
        model: Model,
        find_prefix: Callable[[], Awaitable[NDArray[np.int32]]],
        ttl: str,
        cache_salt: str | None,
    ) -> None:
        """Pin a prefix in a task of its own, unless too many are being pinned. Returns at once.

        Args:
            find_prefix: returns the token ids of the prefix, int32, shape (n,).
            ttl: how long the pin lasts, such as "5m".
            cache_salt: of the request.
        """
        if len(self._running) < _MAX_RUNNING:
            task = asyncio.ensure_future(self._pin(model, find_prefix, ttl, cache_salt))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _pin(
        self,
        model: Model,
        find_prefix: Callable[[], Awaitable[NDArray[np.int32]]],
        ttl: str,
        cache_salt: str | None,
    ) -> None:
        try:
            ids = await find_prefix()
            if not len(ids):
                return
            digest = hashlib.sha256(repr((model.id, cache_salt)).encode() + ids.tobytes()).hexdigest()
            name = f"client-{ttl}-{digest[:16]}"
            options: dict[str, Any] = {"name": name, "ttl": ttl, "cache_salt": cache_salt}
            await model._pins.run_async(ids, options, model, share=_CLIENT_SHARE)  # type: ignore[arg-type]
            self._names[name] = model
            self._names.move_to_end(name)
            while len(self._names) > _MAX_CLIENT_PINS:
                oldest, its_model = self._names.popitem(last=False)
                await asyncio.to_thread(its_model.cache.unpin, oldest)
        except (PinQuotaExceeded, ModelUnloaded) as error:
            log.info("a client's prefix was not pinned: %s", error)
        except Error as error:
            log.warning("a client's prefix could not be pinned: %s", error)
        except Exception:
            log.exception("a client's prefix could not be pinned")

    async def wait(self) -> None:
        """Wait for the prefixes that are being pinned. For tests."""
        while self._running:
            await asyncio.gather(*self._running, return_exceptions=True)
