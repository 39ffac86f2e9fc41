"""Reads the configuration file of `erllama serve`, in TOML, and checks it.

Sections: `[server]`, `[[models]]`, `[[keys]]`, `[[pins]]` and `[cache]`. Relative paths start at the directory of
the file. Reading finds every mistake that can be found without loading a model, each with its line: `serve`,
`serve --check` and a reload read a file with the same function.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path

from erllama._model.load import check_load_options, load_model
from erllama.cache.blocks.key_file import read_key_file as read_secret_keys
from erllama.cache.options import OPTIONS as CACHE_OPTIONS
from erllama.cache.options import check_options, check_usable, checked_key_file
from erllama.cache.sizes import parse_bytes
from erllama.checks import boolean, reject_unknown, shown
from erllama.errors import Error, ModelLoadError, OptionError
from erllama.models.names import model_path
from erllama.server.conduct.key_files import ENVIRONMENT, check_private, read_key_file
from erllama.server.conduct.keys import ApiKey
from erllama.server.models.entry import ModelEntry
from erllama.server.pins import OPTIONS as PIN_OPTIONS
from erllama.server.pins import PinEntry
from erllama.server.settings.listening import ListenOptions
from erllama.server.settings.mistakes import Mistake, Mistakes
from erllama.server.settings.options import ServerOptions, texts
from erllama.server.settings.toml_lines import Place, toml_lines

_SECTIONS = ("server", "models", "keys", "pins", "cache")
_SERVER = tuple(each.name for each in fields(ServerOptions) if each.name != "keys")
_LISTEN = tuple(each.name for each in fields(ListenOptions))
_OTHERS = ("access_log", "model_dirs")  # of [server], and of no class of options
_KEY_SOURCES = ("key", "key_env", "key_file")
_KEY = ("name", "cache_salt", "requests_per_minute", "tokens_per_minute", "models")
_MODEL = ("path", "name", "aliases", "special_tokens_in_content", "load", "keep_alive")
# Options of load_model and Cache that are objects of Python, or that the command sets itself.
_NOT_IN_FILES = ("cache", "id", "on_progress", "vocab_only", "tiers")
_CACHE_PATHS = ("disk", "ram_file")
_LOAD = tuple(
    parameter.name
    for parameter in inspect.signature(load_model).parameters.values()
    if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in _NOT_IN_FILES
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """The content of a configuration file; all of it empty without one.

    Attributes:
        server: options of `ServerOptions`, by name, without keys.
        listen: options of `ListenOptions`, by name.
        access_log: a path, "stderr" or "none"; None if the file has no such option.
        models, keys, pins: as listed.
        cache: options of `Cache`, by name.
        mistakes: what is wrong with the file. What a mistake is about is left out of the other attributes.
        lines: the line of each option, by its place in the file.
        key_lines: for each key, the line of its `models`, or of its section.
        pin_lines: for each pin, the line of its `model`.
    """

    server: Mapping[str, object] = field(default_factory=dict)
    listen: Mapping[str, object] = field(default_factory=dict)
    access_log: str | None = None
    models: tuple[ModelEntry, ...] = ()
    keys: tuple[ApiKey, ...] = ()
    pins: tuple[PinEntry, ...] = ()
    cache: Mapping[str, object] = field(default_factory=dict)
    mistakes: tuple[Mistake, ...] = ()
    lines: Mapping[Place, int] = field(default_factory=dict, compare=False, repr=False)
    key_lines: tuple[int | None, ...] = field(default=(), compare=False, repr=False)
    pin_lines: tuple[int | None, ...] = field(default=(), compare=False, repr=False)


def read_configuration(path: Path, environment: Mapping[str, str] = ENVIRONMENT) -> Configuration:
    """Return the content of a configuration file, and its mistakes.

    Args:
        environment: where `key_env` is looked up.
    """
    mistakes = Mistakes()
    try:
        text = path.read_text(encoding="utf-8")
        sections = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\(at line (\d+), column \d+\)", str(error))
        line = int(found[1]) if found else text.rstrip("\n").count("\n") + 1
        return Configuration(mistakes=(Mistake(f"not TOML: {error}", path, line),))
    except UnicodeDecodeError as error:
        return Configuration(mistakes=(Mistake(f"not UTF-8 text: {error.reason} at byte {error.start}", path),))
    except OSError as error:
        mistakes.add(error)
        return Configuration(mistakes=tuple(mistakes.found))
    return _Reader(path, toml_lines(text), environment, mistakes).read(sections)


class _Reader:
    """Reads one file. Each option is read where it can be read, and each mistake is noted with its line."""

    def __init__(
        self, path: Path, lines: Mapping[Place, int], environment: Mapping[str, str], mistakes: Mistakes
    ) -> None:
        self._path, self._lines, self._environment, self._mistakes = path, lines, environment, mistakes
        self._model_dirs: tuple[Path, ...] = ()
        self._keys: list[ApiKey] = []
        self._key_lines: list[int | None] = []
        self._pins: list[PinEntry] = []
        self._pin_lines: list[int | None] = []

    def read(self, sections: Mapping[str, object]) -> Configuration:
        """Return the content of the file's sections."""
        self._known((), sections, _SECTIONS, "the configuration")
        server = self._server(self._table(sections, "server"))
        self._model_dirs = tuple(map(Path, server.get("model_dirs", ())))  # type: ignore[call-overload]
        cache = self._cache(self._table(sections, "cache"))
        models = [self._model(place, entry) for place, entry in self._entries(sections, "models")]
        for place, entry in self._entries(sections, "keys"):
            self._read_keys(place, entry)
        for place, entry in self._entries(sections, "pins"):
            self._read_pin(place, entry)
        log = server.get("access_log")
        return Configuration(
            server={name: value for name, value in server.items() if name in _SERVER},
            listen={name: value for name, value in server.items() if name in _LISTEN},
            access_log=str(log) if log is not None else None,
            cache=cache,
            models=tuple(entry for entry in models if entry is not None),
            keys=tuple(self._keys),
            key_lines=tuple(self._key_lines),
            pins=tuple(self._pins),
            pin_lines=tuple(self._pin_lines),
            mistakes=tuple(self._mistakes.found),
            lines=self._lines,
        )

    # --- sections ----------------------------------------------------------------------------------

    def _server(self, section: Mapping[str, object]) -> dict[str, object]:
        known = self._known(("server",), section, (*_SERVER, *_LISTEN, *_OTHERS), "[server]")
        values: dict[str, object] = {}
        for name, value in known.items():
            with self._at(("server", name)):
                checked = _server_option(name, value)
                if name == "model_dirs":
                    checked = [str(self._resolve(each)) for each in texts(name, checked)]
                elif name == "state_dir" or (name == "access_log" and value not in ("stderr", "none")):
                    checked = str(self._resolve(checked))
                if name == "access_log" and not Path(str(checked)).parent.is_dir():
                    raise OptionError(f"access_log: {Path(str(checked)).parent} is not a directory; create it")
                values[name] = checked
        return values

    def _cache(self, section: Mapping[str, object]) -> dict[str, object]:
        known = [name for name in CACHE_OPTIONS if name not in _NOT_IN_FILES]
        options = self._known(("cache",), section, known, "[cache]")
        key_file = self._cache_path(options.pop("key_file", None))
        with self._at(("cache", "key_file")):
            key_file = checked_key_file(key_file)
        key = {"key_file": key_file} if isinstance(key_file, Path) else {}
        options = self._check_together(
            ("cache",), options, lambda rest: check_options(self._with_paths(rest) | key)
        )
        options = self._with_paths(options)
        for name in options.keys() & set(_CACHE_PATHS):
            with self._at(("cache", name)):
                for root in check_options({name: options[name]}):
                    check_usable(root)
        if isinstance(options.get("remote_key_file"), str):
            with self._at(("cache", "remote_key_file")):
                read_secret_keys(str(options["remote_key_file"]))
        return options | {name: str(path) for name, path in key.items()}

    def _model(self, place: Place, entry: Mapping[str, object]) -> ModelEntry | None:
        known = self._known(place, entry, (*_MODEL, *_LOAD), "[[models]]")
        read: dict[str, object] = {}
        for name in _MODEL:
            with self._at((*place, name)):
                if name in known or name == "path":
                    checked = _model_option(name, known.get(name))
                    read[name] = self._model_path(checked) if name == "path" else checked
        options = {name: value for name, value in known.items() if name not in _MODEL}
        options = self._check_together(place, options, check_load_options)
        path = read.get("path")
        if isinstance(path, Path):
            self._check_together(place, options, lambda rest: check_model_file(path, rest), "path")
        given = known.get("path")
        if isinstance(path, Path) and path != self._path.parent / Path(str(given)).expanduser():
            read.setdefault("name", given)  # a model that is given by its name has that name for clients, too
        if "path" not in read or any(name in known and name not in read for name in _MODEL):
            return None  # its names are unknown
        return ModelEntry(
            **read,  # type: ignore[arg-type]
            options=options,
            lines={str(name): self._lines[where] for name in entry if (where := (*place, name)) in self._lines},
        )

    def _read_keys(self, place: Place, entry: Mapping[str, object]) -> None:
        known = self._known(place, entry, (*_KEY_SOURCES, *_KEY), "[[keys]]")
        limits: dict[str, object] = {}
        for name in _KEY:
            with self._at((*place, name)):
                if name in known:
                    checked = _key_option(name, known[name])
                    ApiKey(secret="key", **{name: checked})  # type: ignore[arg-type]
                    limits[name] = checked
        sources = [name for name in _KEY_SOURCES if name in known]
        with self._at((*place, *sources[:1])):
            if len(sources) != 1:
                raise OptionError(f"a key needs one of {', '.join(_KEY_SOURCES)}")
            keys = [*self._keys, *self._keys_of(sources[0], known[sources[0]], limits)]
            ServerOptions(keys=tuple(keys))  # refuses equal ones
            self._key_lines += [self._line((*place, "models"))] * (len(keys) - len(self._keys))
            self._keys = keys

    def _keys_of(self, source: str, value: object, limits: dict[str, object]) -> list[ApiKey]:
        """Return the keys of an entry from the file itself, from another one, or from a variable."""
        if not isinstance(value, str):
            raise OptionError(f"{source} must be a text; put it into quotes")  # without the secret
        if source == "key_file":
            return read_key_file(self._resolve(value), **limits)
        if source == "key":
            check_private(self._path)
            return [ApiKey(secret=value, **limits)]  # type: ignore[arg-type]
        secret = self._environment.get(value, "").strip()
        if not secret:
            raise OptionError(f"key_env: the variable {value} is not set; set it to the key")
        return [ApiKey(secret=secret, **{"name": value, **limits})]  # type: ignore[arg-type]

    def _with_paths(self, options: Mapping[str, object]) -> dict[str, object]:
        """Return options of the cache, with absolute paths."""
        found = {
            name: self._cache_path(value) if name in _CACHE_PATHS else value for name, value in options.items()
        }
        for name in ("remote", "remote_key_file"):
            value = options.get(name)
            if isinstance(value, str) and "://" not in value:
                found[name] = str(self._resolve(value))
        return found

    def _read_pin(self, place: Place, entry: Mapping[str, object]) -> None:
        known = self._known(place, entry, PIN_OPTIONS, "[[pins]]")
        try:
            pin = PinEntry.of(known, self._resolve)
        except OptionError as error:
            named = _named_options(str(error), known)
            self._mistakes.add(error, self._path, self._line((*place, *(named[0] if named else ()))), "pins")
        else:
            self._pins.append(pin)
            self._pin_lines.append(self._line((*place, "model")))

    def _cache_path(self, value: object) -> object:
        """Return directories with absolute paths: one, a list, or a mapping to quotas."""
        if isinstance(value, str):
            return str(self._resolve(value))
        if isinstance(value, list):
            return [self._cache_path(each) for each in value]
        if isinstance(value, Mapping):
            return {self._cache_path(directory): quota for directory, quota in value.items()}
        return value

    def _model_path(self, model: object) -> Path:
        """Return the file of a model, by its path or its name."""
        return model_path(str(model), self._model_dirs, base=self._path.parent)

    def _resolve(self, path: object) -> Path:
        try:
            return self._path.parent / Path(str(path)).expanduser()
        except RuntimeError as error:  # "~name" without such a user
            raise OptionError(f"{shown(path)}: {error}") from None

    # --- structure ---------------------------------------------------------------------------------

    def _table(self, sections: Mapping[str, object], name: str) -> Mapping[str, object]:
        table = sections.get(name, {})
        with self._at((name,)):
            if not isinstance(table, Mapping):
                raise OptionError(f"{name} must be a section, [{name}]")
        return table if isinstance(table, Mapping) else {}

    def _entries(self, sections: Mapping[str, object], name: str) -> list[tuple[Place, Mapping[str, object]]]:
        """Return the sections of a list, each with its place."""
        entries = sections.get(name, [])
        if isinstance(entries, list) and all(isinstance(each, Mapping) for each in entries):
            return [((name, index), entry) for index, entry in enumerate(entries)]
        error = OptionError(f"{name} must be a list of sections, [[{name}]]")
        self._mistakes.add(error, self._path, self._line((name,)), name)
        return []

    def _known(
        self, place: Place, section: Mapping[str, object], known: Collection[str], where: str
    ) -> dict[str, object]:
        """Return the options of a section that exist, and note the others."""
        for name, value in section.items():
            if name not in known:
                with self._at((*place, name)):
                    reject_unknown({name: value}, known, where)
        return {name: value for name, value in section.items() if name in known}

    # --- mistakes ----------------------------------------------------------------------------------

    def _at(self, place: Place) -> AbstractContextManager[None]:
        """Note an error of the `with` block as a mistake at a place, and continue after the block."""
        return self._mistakes.collecting(self._path, self._line(place), str(place[0]))

    def _line(self, place: Place) -> int | None:
        """Return the line of a place; of the smallest section around it if it has none."""
        while place and place not in self._lines:
            place = place[:-1]
        return self._lines.get(place)

    def _check_together(
        self,
        place: Place,
        options: Mapping[str, object],
        check: Callable[[dict[str, object]], object],
        culprit: str | None = None,
    ) -> dict[str, object]:
        """Return the options that pass a check, and note those that the check's errors name.

        Args:
            culprit: the option to blame for an error that names none; None for the whole section.
        """
        rest = dict(options)
        while True:
            try:
                check(rest)
                return rest
            except (Error, OSError) as error:
                named = _named_options(str(error), rest) if isinstance(error, OptionError) else []
                where = named[0] if named else (culprit,) if culprit else ()
                self._mistakes.add(error, self._path, self._line((*place, *where)), str(place[0]))
                if not named:  # it would be found again
                    return {}
                del rest[str(named[0][0])]


def check_model_file(path: Path, options: Mapping[str, object]) -> None:
    """Check the header of a model's file, and options of `load_model` against it. Reads no weights.

    Raises:
        ModelLoadError: the file is missing, incomplete, or of a kind that libllama does not know.
        OptionError: an option is wrong, or contradicts the file.
    """
    # Imported here: the help of the command works without a built libllama.
    from erllama.engine.backends.gguf_parts import parts
    from erllama.engine.backends.llama_file import check_header

    check_header(path, check_load_options(options))
    for part in parts(path):
        if not part.exists():
            raise ModelLoadError(f"{part} does not exist; a model in parts needs all of them")


def _server_option(name: str, value: object) -> object:
    """Return an option of `[server]`, checked."""
    if name == "access_log":
        if not isinstance(value, str) or not value:
            raise OptionError(f'access_log must be a path, "stderr" or "none", not {shown(value)}')
        return value
    if name in _LISTEN:
        ListenOptions(**{name: value})  # type: ignore[arg-type]
        return value
    if name == "model_dirs":
        return texts(name, value)
    if name in ("allowed_hosts", "cors_origins"):
        value = texts(name, value)
    elif name == "max_body_bytes":
        value = parse_bytes(name, value)
    ServerOptions.of({name: value})
    return value


def _model_option(name: str, value: object) -> object:
    """Return an option of `[[models]]` that is not one of `load_model`, checked."""
    if name == "path" and (not isinstance(value, str) or not value):
        raise OptionError("a model needs a path: that of a GGUF file, or the name of a model on this machine")
    if name == "name" and (not isinstance(value, str) or not value):
        raise OptionError(f"name must be a text, not {shown(value)}")
    if name == "aliases":
        return texts(name, value)
    if name in ("load", "keep_alive"):
        ModelEntry(path=Path(), **{name: value})  # type: ignore[arg-type]
    return boolean(name, value) if name == "special_tokens_in_content" else value


def _key_option(name: str, value: object) -> object:
    """Return an option of `[[keys]]`, checked except for what `ApiKey` checks."""
    if name == "models":
        return texts(name, value)
    if name in ("name", "cache_salt") and not isinstance(value, str):
        raise OptionError(f"{name} must be a text, not {shown(value)}")
    return value


def _named_options(message: str, options: Mapping[str, object]) -> list[Place]:
    """Return the options that an error names before its remedy, in the order of the message.

    For an option with options of its own, such as `policy`, these follow its name.
    """
    message = message.split(";")[0]
    found: dict[Place, int] = {}
    for name, value in options.items():
        inner = [(name, each) for each in value] if isinstance(value, Mapping) else []
        for place in [(name,), *inner]:
            match = re.search(rf"(?<!\w){re.escape(str(place[-1]))}(?!\w)", message)
            if match:
                found[place] = match.start()
    return sorted(found, key=lambda place: (-len(place), found[place]))
