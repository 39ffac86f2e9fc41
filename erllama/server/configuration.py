"""Reads the configuration file of `erllama serve`, in TOML.

Sections: `[server]`, `[[models]]`, `[[keys]]`, `[[pins]]` and `[cache]`. Errors name the file and, where possible,
the line. Relative paths start at the file's directory.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeVar

from erllama._model.load import load_model
from erllama.cache.options import OPTIONS as CACHE_OPTIONS
from erllama.cache.sizes import parse_bytes
from erllama.checks import boolean, reject_unknown, shown
from erllama.errors import OptionError
from erllama.server.conduct.key_files import ENVIRONMENT, check_private, read_key_file
from erllama.server.conduct.keys import ApiKey
from erllama.server.listening import ListenOptions
from erllama.server.options import ServerOptions, texts
from erllama.server.pins import OPTIONS as PIN_OPTIONS
from erllama.server.pins import PinEntry

T = TypeVar("T")

_SECTIONS = ("server", "models", "keys", "pins", "cache")
_SERVER = tuple(each.name for each in fields(ServerOptions) if each.name != "keys")
_LISTEN = tuple(each.name for each in fields(ListenOptions))
_KEY_SOURCES = ("key", "key_env", "key_file")
_KEY = ("name", "cache_salt", "requests_per_minute", "tokens_per_minute", "models")
_MODEL = ("path", "name", "aliases", "special_tokens_in_content")
# Options of load_model and Cache that are objects of Python, or that the command sets itself.
_NOT_IN_FILES = ("cache", "id", "on_progress", "vocab_only", "tiers")
_CACHE_PATHS = ("disk", "ram_file")
_LOAD = tuple(
    parameter.name
    for parameter in inspect.signature(load_model).parameters.values()
    if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in _NOT_IN_FILES
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """A model that a configuration names.

    Attributes:
        path: of the GGUF file.
        name: that clients use; None for the name of the file.
        aliases: further names.
        special_tokens_in_content: as in `ServedModel`.
        options: of `load_model`, by name.
    """

    path: Path
    name: str | None = None
    aliases: tuple[str, ...] = ()
    special_tokens_in_content: bool = False
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """The content of a configuration file; all of it empty without one.

    Attributes:
        server: options of `ServerOptions`, by name, without keys.
        listen: options of `ListenOptions`, by name.
        access_log: a path, "stderr" or "none"; None if the file has no such option.
        models, keys, pins: as listed.
        cache: options of `Cache`, by name.
    """

    server: Mapping[str, object] = field(default_factory=dict)
    listen: Mapping[str, object] = field(default_factory=dict)
    access_log: str | None = None
    models: tuple[ModelEntry, ...] = ()
    keys: tuple[ApiKey, ...] = ()
    pins: tuple[PinEntry, ...] = ()
    cache: Mapping[str, object] = field(default_factory=dict)


def read_configuration(path: Path, environment: Mapping[str, str] = ENVIRONMENT) -> Configuration:
    """Return the content of a configuration file.

    Args:
        environment: where `key_env` is looked up.

    Raises:
        OptionError: the file is not TOML, or an option is unknown, has the wrong type or is out of range.
        OSError: the file cannot be read.
    """
    text = path.read_text(encoding="utf-8")
    try:
        sections = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"{path}: {error}") from None
    return _Reader(path, text, environment).read(sections)


class _Reader:
    def __init__(self, path: Path, text: str, environment: Mapping[str, str]) -> None:
        self._path, self._lines, self._environment = path, text.splitlines(), environment

    def read(self, sections: Mapping[str, object]) -> Configuration:
        with self._located(None, None, sections):
            reject_unknown(
                {name: value for name, value in sections.items() if name not in _SECTIONS},
                _SECTIONS,
                "the configuration",
            )
        server = self._table(sections, "server")
        cache = self._table(sections, "cache")
        with self._located("server", None, server):
            self._refuse(server, (*_SERVER, *_LISTEN, "access_log"), "[server]")
            options = {name: _size(name, value) for name, value in server.items() if name in _SERVER}
            options |= {
                name: texts(name, server[name]) for name in ("allowed_hosts", "cors_origins") if name in server
            }
            listen = {name: value for name, value in server.items() if name in _LISTEN}
            ServerOptions.of(options)
            ListenOptions(**listen)  # type: ignore[arg-type]
            log = server.get("access_log")
            if log is not None and not isinstance(log, str):
                raise OptionError(f'access_log must be a path, "stderr" or "none", not {shown(log)}')
        with self._located("cache", None, cache):
            known = [name for name in CACHE_OPTIONS if name not in _NOT_IN_FILES]
            self._refuse(cache, known, "[cache]")
        return Configuration(
            server=options,
            listen=listen,
            access_log=str(self._resolve(log)) if log not in (None, "stderr", "none") else log,
            models=tuple(self._each(sections, "models", self._model)),
            keys=tuple(key for keys in self._each(sections, "keys", self._keys) for key in keys),
            pins=tuple(self._each(sections, "pins", self._pin)),
            cache={
                name: self._cache_path(value) if name in _CACHE_PATHS else value for name, value in cache.items()
            },
        )

    # --- entries -----------------------------------------------------------------------------------

    def _model(self, entry: Mapping[str, object]) -> ModelEntry:
        self._refuse(entry, (*_MODEL, *_LOAD), "[[models]]")
        path, name = entry.get("path"), entry.get("name")
        if not isinstance(path, str) or not path:
            raise OptionError("a model needs a path, the path of a GGUF file")
        if name is not None and (not isinstance(name, str) or not name):
            raise OptionError(f"name must be a text, not {shown(name)}")
        return ModelEntry(
            path=self._resolve(path),
            name=name,
            aliases=texts("aliases", entry.get("aliases", ())),
            special_tokens_in_content=boolean(
                "special_tokens_in_content", entry.get("special_tokens_in_content", False)
            ),
            options={name: value for name, value in entry.items() if name not in _MODEL},
        )

    def _keys(self, entry: Mapping[str, object]) -> list[ApiKey]:
        self._refuse(entry, (*_KEY_SOURCES, *_KEY), "[[keys]]")
        limits = {name: value for name, value in entry.items() if name in _KEY}
        if "models" in limits:
            limits["models"] = texts("models", limits["models"])
        for name in ("name", "cache_salt"):
            if not isinstance(limits.get(name, ""), str):
                raise OptionError(f"{name} must be a text, not {shown(limits[name])}")
        sources = [name for name in _KEY_SOURCES if name in entry]
        if len(sources) != 1:
            raise OptionError(f"a key needs one of {', '.join(_KEY_SOURCES)}")
        source, value = sources[0], entry[sources[0]]
        if not isinstance(value, str):
            raise OptionError(f"{source} must be a text, not {shown(value)}")
        if source == "key_file":
            return read_key_file(self._resolve(value), **limits)
        if source == "key":
            check_private(self._path)
            secret = value
        else:
            secret = self._environment.get(value, "").strip()
            if not secret:
                raise OptionError(f"key_env: the variable {value} is not set; set it to the key")
            limits.setdefault("name", value)
        return [ApiKey(secret=secret, **limits)]  # type: ignore[arg-type]

    def _pin(self, entry: Mapping[str, object]) -> PinEntry:
        self._refuse(entry, PIN_OPTIONS, "[[pins]]")
        return PinEntry.of(entry, self._resolve)

    def _cache_path(self, value: object) -> object:
        """Return directories with absolute paths: one, a list, or a mapping to quotas."""
        if isinstance(value, str):
            return str(self._resolve(value))
        if isinstance(value, list):
            return [self._cache_path(each) for each in value]
        if isinstance(value, Mapping):
            return {self._cache_path(directory): quota for directory, quota in value.items()}
        return value

    def _resolve(self, path: object) -> Path:
        return self._path.parent / Path(str(path)).expanduser()

    # --- structure and errors ----------------------------------------------------------------------

    def _table(self, sections: Mapping[str, object], name: str) -> Mapping[str, object]:
        table = sections.get(name, {})
        if not isinstance(table, Mapping):
            raise OptionError(f"{self._path}: {name} must be a section, [{name}]")
        return table

    def _each(
        self, sections: Mapping[str, object], name: str, read: Callable[[Mapping[str, object]], T]
    ) -> Iterator[T]:
        entries = sections.get(name, [])
        if not isinstance(entries, list) or not all(isinstance(each, Mapping) for each in entries):
            raise OptionError(f"{self._path}: {name} must be a list of sections, [[{name}]]")
        for index, entry in enumerate(entries):
            with self._located(name, index, entry):
                made = read(entry)
            yield made

    @staticmethod
    def _refuse(entry: Mapping[str, object], known: Collection[str], where: str) -> None:
        reject_unknown({name: value for name, value in entry.items() if name not in known}, known, where)

    @contextmanager
    def _located(self, section: str | None, index: int | None, entry: Mapping[str, object]) -> Iterator[None]:
        """Add the file, and the line of the option that an error names, to errors."""
        try:
            yield
        except OptionError as error:
            line = self._line(section, index, [name for name in entry if _names(str(error), name)])
            where = f"{self._path}, line {line}" if line else str(self._path)
            raise OptionError(f"{where}: {error}") from None

    def _line(self, section: str | None, index: int | None, names: Collection[str]) -> int | None:
        """Return the number of the line that sets one of some options in a section; else that of its header."""
        current, n_before, header = None, -1, None
        for number, line in enumerate(self._lines, 1):
            found = re.match(r"\s*\[\[?\s*([\w.-]+)", line)
            if found:
                current = found[1]
                n_before += current == section
                if section is None and current in names:
                    return number
                if current == section and index in (None, n_before):
                    header = number
            elif current == section and (section is None or index in (None, n_before)):
                option = re.match(r"""\s*["']?([\w-]+)["']?\s*=""", line)
                if option and option[1] in names:
                    return number
        return header


def _names(message: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message.split(";")[0]) is not None


def _size(name: str, value: object) -> object:
    return parse_bytes(name, value) if name == "max_body_bytes" else value
