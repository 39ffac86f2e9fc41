"""The settings of `erllama serve`: the options of the command and of its configuration file together.

`read_settings` reads and checks both, for `serve`, for `serve --check` and for a reload. No model is loaded, and no
address is bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import erllama
from erllama._model.load import check_load_options
from erllama.cache.options import check_options, check_usable
from erllama.errors import OptionError
from erllama.events.options import KvEvents
from erllama.server.conduct.key_files import read_key_file, read_key_variable
from erllama.server.conduct.keys import ApiKey
from erllama.server.models.entry import ModelEntry
from erllama.server.pins import PinEntry
from erllama.server.settings.configuration import Configuration, check_model_file, read_configuration
from erllama.server.settings.listening import ListenOptions
from erllama.server.settings.mistakes import Mistake, Mistakes
from erllama.server.settings.options import ServerOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandOptions:
    """What the command line sets. It overrides the configuration file, except for the options of its models.

    Attributes:
        config: the configuration file; None for none.
        models: further models, without the options of `load`; the demo model if there is none in the file, either.
        api_key_file: a file with further keys; None for none.
        listen, server, cache: options of `ListenOptions`, `ServerOptions` and `Cache`, by name.
        load: options of `load_model` for all models, by name. Those of a model in the file override them.
        in_process: run all models in this process. Otherwise each has one of its own, unless an option says so.
        access_log: as in `Configuration`.
    """

    config: Path | None = None
    models: Sequence[ModelEntry] = ()
    api_key_file: Path | None = None
    listen: Mapping[str, object] = field(default_factory=dict)
    server: Mapping[str, object] = field(default_factory=dict)
    cache: Mapping[str, object] = field(default_factory=dict)
    load: Mapping[str, object] = field(default_factory=dict)
    in_process: bool = False
    access_log: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a server is run.

    Attributes:
        listen, options: of the server, checked. `options` has the keys.
        models: at least one, with all options of their loads.
        pins: of these models.
        cache: options of `Cache`, by name.
        access_log: a path, "stderr" or "none".
    """

    listen: ListenOptions
    options: ServerOptions
    models: tuple[ModelEntry, ...]
    pins: tuple[PinEntry, ...]
    cache: Mapping[str, object]
    access_log: str

    def needing_restart(self, new: Settings) -> list[str]:
        """Return the names of the options that differ in `new` and that a reload does not change."""
        changed = [
            each.name
            for old, other in ((self.listen, new.listen), (self.options, new.options))
            for each in fields(old)
            if each.name != "keys" and getattr(old, each.name) != getattr(other, each.name)
        ]
        names = {**self.cache, **new.cache}
        changed += [f"cache.{name}" for name in names if self.cache.get(name) != new.cache.get(name)]
        return changed + (["access_log"] if self.access_log != new.access_log else [])


def read_settings(command: CommandOptions) -> Settings:
    """Return the settings of a server.

    Raises:
        ConfigurationError: with every mistake in the file, in files that it names, and in the command's options.
    """
    mistakes = Mistakes()
    file = read_configuration(command.config) if command.config is not None else Configuration()
    mistakes.found += file.mistakes
    keys = _read_keys(command, file, mistakes)
    listen = ListenOptions()
    with mistakes.collecting():
        listen = ListenOptions(**{**file.listen, **command.listen})  # type: ignore[arg-type]
    if not _has_mistake(file, "keys"):
        from_file = "host" in file.listen and "host" not in command.listen
        where = (command.config, file.lines.get(("server", "host"))) if from_file else (None, None)
        with mistakes.collecting(*where):
            listen.check_keys(bool(keys))
    options = ServerOptions()
    with mistakes.collecting():
        options = ServerOptions.of({**_server_options(command, file, listen), "keys": keys})
    models = _read_models(command, file, mistakes)
    cache = {"disk": True, **file.cache, **command.cache}
    if not _has_mistake(file, "cache"):
        with mistakes.collecting():
            check_options(cache)
            for root in check_options({"disk": command.cache.get("disk")}):
                check_usable(root)
    mistakes.check()
    return Settings(
        listen=listen,
        options=options,
        models=models,
        pins=file.pins,
        cache=cache,
        access_log=command.access_log or file.access_log or "stderr",
    )


def _has_mistake(file: Configuration, section: str) -> bool:
    return any(each.section == section for each in file.mistakes)


def _read_keys(command: CommandOptions, file: Configuration, mistakes: Mistakes) -> tuple[ApiKey, ...]:
    """Return the keys of the configuration, of the command's file and of the variable."""
    keys = list(file.keys)
    with mistakes.collecting():
        if command.api_key_file is not None:
            keys += read_key_file(command.api_key_file)
    with mistakes.collecting():
        secrets = {key.secret for key in keys}
        keys += [key for key in read_key_variable() if key.secret not in secrets]
    return tuple(keys)


def _server_options(command: CommandOptions, file: Configuration, listen: ListenOptions) -> dict[str, object]:
    options = {**file.server, **command.server}
    if not listen.is_loopback and listen.host[0].isalpha():
        allowed = options.get("allowed_hosts", ())
        assert isinstance(allowed, tuple)
        options["allowed_hosts"] = (*allowed, listen.host)
    return options


def _read_models(command: CommandOptions, file: Configuration, mistakes: Mistakes) -> tuple[ModelEntry, ...]:
    """Return the models of the command and of the file, or the demo model. Check their files and names."""
    load: Mapping[str, object] = {}
    with mistakes.collecting():
        check_load_options(command.load)
        load = command.load
    for entry in command.models:
        with mistakes.collecting():
            check_model_file(entry.path, load)
    entries = [*command.models, *file.models]
    if not entries and not _has_mistake(file, "models"):
        entries = [ModelEntry(path=erllama.demo_model())]
    _check_names(command, file, entries, mistakes)
    models = tuple(_with_options(entry, command) for entry in entries)
    _check_event_addresses(command, models, mistakes)
    return models


def _check_names(
    command: CommandOptions, file: Configuration, entries: Sequence[ModelEntry], mistakes: Mistakes
) -> None:
    """Note names that two models or two pins have, and models of keys and pins that do not exist."""
    taken: dict[str, ModelEntry] = {}
    for entry in entries:
        for option, name in entry.names:
            if taken.setdefault(name, entry) is not entry:
                place = (command.config, entry.lines.get(option)) if entry.lines else (None, None)
                mistakes.found.append(Mistake(f"two models have the name {name!r}; give one another name", *place))
    pins = list(zip(file.pins, file.pin_lines, strict=True))
    pin_names: set[str] = set()
    for pin, line in pins:
        if pin.name in pin_names:
            message = f"two pins have the name {pin.name!r}; give one another name"
            mistakes.found.append(Mistake(message, command.config, line))
        elif pin.name is not None:
            pin_names.add(pin.name)
    if not _has_mistake(file, "models"):
        for key, line in zip(file.keys, file.key_lines, strict=True):
            with mistakes.collecting(command.config, line):
                key.check_names([entry.id for entry in entries])
        for pin, line in pins:
            with mistakes.collecting(command.config, line):
                pin.check_names(taken)


def _check_event_addresses(command: CommandOptions, models: Sequence[ModelEntry], mistakes: Mistakes) -> None:
    """Note addresses at which two models would publish their KV events."""
    taken: dict[str, str] = {}
    for entry in models:
        place = (command.config, entry.lines.get("kv_events")) if entry.lines else (None, None)
        with mistakes.collecting(*place):
            events = KvEvents.of(entry.options.get("kv_events"))
            for address in events.addresses if events is not None else ():
                other = taken.setdefault(address, entry.id)
                if other != entry.id and not address.endswith((":*", ":0")):
                    raise OptionError(
                        f"models {other!r} and {entry.id!r} publish KV events at {address}; give each model an "
                        "address of its own, with kv_events in its [[models]]"
                    )


def _with_options(entry: ModelEntry, command: CommandOptions) -> ModelEntry:
    """Return a model with the options of the command, too."""
    options = {"process": True, **command.load, **entry.options}
    return replace(entry, options=options | ({"process": False} if command.in_process else {}))
