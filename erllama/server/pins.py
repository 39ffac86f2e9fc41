"""Pins of a server: those of its configuration, and those that clients ask for with a time to live.

`ConfiguredPins` pins the configured prefixes of each model that is loaded. `ClientPins` pins prefixes of requests
after the requests have ended. Both are best effort: what fails is logged and fails no request.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from erllama._model.model import Model
from erllama._model.requests.options import PinOptions, TemplateOptions, pin_ttl
from erllama.cache import Cache
from erllama.cache.blocks.pins import PrefixNotStored, check_pin_name
from erllama.chat.json_values import InvalidValueError, parse_json
from erllama.checks import shown
from erllama.errors import Error, ModelUnloaded, OptionError, PinQuotaExceeded
from erllama.server.conduct.keys import ApiKey, combined_salt
from erllama.server.models import ModelPool, ServedModel

log = logging.getLogger("erllama.server")

OPTIONS = ("model", "name", "system", "text_file", "messages_file", "tools_file", "ttl", "cache_salt")
_CONTENTS = ("system", "text_file", "messages_file")
_CLIENT_SHARE = 0.5  # of the bytes that pins may protect, so that clients leave room for the operator's pins
_MAX_CLIENT_PINS = 64  # of each client
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
        """Raise OptionError if the server has no model of this name. `names` has its names and aliases."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class PinOrder:
    """What a client asks to pin.

    Attributes:
        model: the model of the request.
        find_prefix: returns the token ids of the prefix, int32, shape (n,), which the request has computed.
        ttl: how long the pin lasts, such as "5m".
        cache_salt: of the request.
        key: of the request; None if the server has no keys.
        charge: called with the number of tokens that were computed for the pin.
    """

    model: Model
    find_prefix: Callable[[], Awaitable[NDArray[np.int32]]]
    ttl: str
    cache_salt: str | None = None
    key: ApiKey | None = None
    charge: Callable[[int], object]

    @property
    def client(self) -> tuple[bool, str | None]:
        """Whose limit counts the pin: that of the key or, without keys, of the salt."""
        return (False, self.cache_salt) if self.key is None else (True, self.key.secret)


class _ClientPin(NamedTuple):
    """A pin of a client: its cache, the tokens of its prefix, and when it ends, in seconds since 1970."""

    cache: Cache
    n_tokens: int
    expires: float


class ClientPins:
    """Pins prefixes of requests in the background. Used by the server's event loop.

    Bounded: a few run at once, and further ones are skipped; each client has at most 64 pins, and its oldest one is
    removed; and all pins take at most half of the bytes that pins may protect. A client's pin of a prefix replaces
    its pins of shorter prefixes with the same time to live: a conversation has one pin, however many turns it has.

    Args:
        signing_key: makes the names of pins. Without it, a name does not show which prefix it belongs to.
    """

    def __init__(self, signing_key: bytes) -> None:
        self._signing_key = signing_key
        self._running: set[asyncio.Task[None]] = set()
        self._pins: dict[
            tuple[bool, str | None], dict[str, _ClientPin]
        ] = {}  # of each client by name, oldest first

    def begin(self, order: PinOrder) -> None:
        """Pin a prefix in a task of its own, unless too many are being pinned. Returns at once."""
        if len(self._running) < _MAX_RUNNING:
            task = asyncio.ensure_future(self._pin(order))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _pin(self, order: PinOrder) -> None:
        model = order.model
        try:
            ids = await order.find_prefix()
            if not len(ids):
                return
            self._forget_expired()
            own = self._pins.get(order.client, {})
            *shorter, name = self._names(order, ids, {pin.n_tokens for pin in own.values()})
            options: PinOptions = {"name": name, "ttl": order.ttl, "cache_salt": order.cache_salt}
            pin = await model._pins.pin_computed(ids, options, model, share=_CLIENT_SHARE, count=order.charge)
            own = self._pins.setdefault(order.client, {})  # other tasks may have changed it
            own.pop(name, None)
            own[name] = _ClientPin(model.cache, pin.n_tokens, pin.expires or math.inf)
            removed = {each: own.pop(each) for each in shorter if each in own}
            while len(own) > _MAX_CLIENT_PINS:
                oldest = next(iter(own))
                removed[oldest] = own.pop(oldest)
            for each, its_pin in removed.items():
                await asyncio.to_thread(its_pin.cache.unpin, each)
        except (PinQuotaExceeded, PrefixNotStored, ModelUnloaded) as error:
            log.info("a client's prefix was not pinned: %s", error)
        except Error as error:
            log.warning("a client's prefix could not be pinned: %s", error)
        except Exception:
            log.exception("a client's prefix could not be pinned")

    def _names(self, order: PinOrder, ids: NDArray[np.int32], lengths: Iterable[int]) -> list[str]:
        """Return the names of the pins of shorter prefixes, of these lengths in tokens, and of the whole one."""
        scope = repr((order.model.id, order.cache_salt)).encode() + b"\0"
        digest, names, done = hmac.new(self._signing_key, b"client pin\0" + scope, "sha256"), [], 0
        for length in [*sorted(n for n in lengths if n < len(ids)), len(ids)]:
            digest.update(ids[done:length].tobytes())
            names.append(f"client-{order.ttl}-{digest.hexdigest()[:16]}")
            done = length
        return names

    def _forget_expired(self) -> None:
        """Forget the pins that have ended. The cache removes them."""
        now = time.time()
        for client, own in list(self._pins.items()):
            for name in [name for name, pin in own.items() if pin.expires <= now]:
                del own[name]
            if not own:
                del self._pins[client]

    async def wait(self) -> None:
        """Wait for the prefixes that are being pinned. For tests."""
        while self._running:
            await asyncio.gather(*self._running, return_exceptions=True)
