"""The configuration of a fleet: `FleetConfig`, as Python values, as a mapping, or as a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from erllama.checks import boolean, choice, integer, real, reject_unknown, seconds, shown
from erllama.errors import OptionError
from erllama.fleet.prefix_router import POLICIES

_RANK = "{rank}"
_MAX_REPLICAS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """How a fleet of replicas serves one model.

    Attributes:
        model: path of the GGUF file, the same on all machines.
        name: that clients use; None for the name of the file.
        options: of `load_model`, for the replicas.
        cache: options of `Cache`, for the replicas. In directories, "{rank}" stands for the number of the replica,
            from 0: replicas on one machine can have a directory each.
        server: options of `erllama.server.app`, for the ingress.
        replicas: number of replicas, without autoscaling.
        min_replicas, max_replicas: with `max_replicas`, the number of replicas follows the number of requests,
            within these limits.
        target_requests: requests that run or wait per replica, at which the number of replicas stays the same. None
            for the number that a replica runs at once, `n_seq_max`.
        upscale_delay, downscale_delay: how long there must be more or fewer requests before replicas are added or
            removed.
        max_waiting: requests that may wait at each replica. Further ones wait in the ingress.
        max_pending: requests that each ingress accepts at once.
        policy: how requests are routed: "prefix", or "round_robin" or "random" for comparisons.
        weight: with "prefix", how much a prompt token that a replica has to compute before the request counts,
            against a token of the request's prompt that it has. Below 1, requests wait for their prefix rather than
            compute it twice.
        kv_events: whether replicas publish what their caches hold, so that every ingress knows it. Otherwise an
            ingress knows the requests that it has sent itself.
        report_interval: time between two reports of a replica's load.
        drain: how long requests may run on a replica that stops, before they continue on another one.
        save: how long a replica may take to save its contexts when it stops.
        hot_prefixes: how many of the most used prefixes a new replica loads from its cache.
        ingresses: number of processes that take HTTP requests, render and tokenize.
        ingress_resources, replica_resources: what Ray reserves for each, such as {"num_cpus": 4, "num_gpus": 1}.

    Raises:
        OptionError: an option is unknown, has the wrong type, is out of range, or contradicts another one.
    """

    model: str | Path
    name: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    cache: Mapping[str, object] = field(default_factory=dict)
    server: Mapping[str, object] = field(default_factory=dict)
    replicas: int = 1
    min_replicas: int = 1
    max_replicas: int | None = None
    target_requests: float | None = None
    upscale_delay: float | str = 10.0
    downscale_delay: float | str = "10min"
    max_waiting: int = 64
    max_pending: int = 1024
    policy: str = "prefix"
    weight: float = 0.25
    kv_events: bool = True
    report_interval: float | str = 1.0
    drain: float | str = 30.0
    save: float | str = 60.0
    hot_prefixes: int = 16
    ingresses: int = 1
    ingress_resources: Mapping[str, object] = field(default_factory=lambda: {"num_cpus": 1})
    replica_resources: Mapping[str, object] = field(default_factory=lambda: {"num_cpus": 1})

    def __post_init__(self) -> None:
        if not isinstance(self.model, str | Path) or not str(self.model):
            raise OptionError(f"model={shown(self.model)}; pass the path of a GGUF file")
        if self.name is not None and (not isinstance(self.name, str) or not self.name):
            raise OptionError(f"name={shown(self.name)}; pass a text, or None for the name of the file")
        for name in ("options", "cache", "server", "ingress_resources", "replica_resources"):
            if not isinstance(getattr(self, name), Mapping):
                raise OptionError(f"{name} must be a mapping of options, not {shown(getattr(self, name))}")
        self._check_replicas()
        integer("max_waiting", self.max_waiting, 0)
        integer("max_pending", self.max_pending, 1)
        integer("hot_prefixes", self.hot_prefixes, 0)
        integer("ingresses", self.ingresses, 1, _MAX_REPLICAS)
        choice("policy", self.policy, POLICIES)
        real("weight", self.weight, 0.0)
        boolean("kv_events", self.kv_events)
        for name in ("upscale_delay", "downscale_delay", "drain", "save"):
            seconds(name, getattr(self, name))
        if seconds("report_interval", self.report_interval) < 0.05:
            raise OptionError(f"report_interval={shown(self.report_interval)}; it must be at least 50ms")
        self._check_model()

    def _check_replicas(self) -> None:
        integer("replicas", self.replicas, 1, _MAX_REPLICAS)
        integer("min_replicas", self.min_replicas, 1, _MAX_REPLICAS)
        if self.target_requests is not None:
            real("target_requests", self.target_requests, 0.01)
        if self.max_replicas is None:
            if self.min_replicas != 1 or self.target_requests is not None:
                raise OptionError("min_replicas and target_requests have an effect with max_replicas only; add it")
            return
        integer("max_replicas", self.max_replicas, 1, _MAX_REPLICAS)
        if self.replicas != 1:
            raise OptionError(
                f"replicas={self.replicas} and max_replicas={self.max_replicas}; pass replicas for a fixed number, "
                "or min_replicas and max_replicas"
            )
        if self.max_replicas < self.min_replicas:
            raise OptionError(f"max_replicas={self.max_replicas} is below min_replicas={self.min_replicas}")

    def _check_model(self) -> None:
        """Check the options of the model and the cache as far as that is possible without opening them."""
        reserved = {"id": "name", "cache": "cache", "vocab_only": "", "on_progress": "", "process": ""}
        reserved["kv_events"] = "kv_events"
        for name, instead in reserved.items():
            if name in self.options:
                hint = f"; pass {instead} of the fleet" if instead else "; a fleet sets it itself"
                raise OptionError(f"options has {name!r}{hint}")
        integer("n_seq_max", self.options.get("n_seq_max", 4), 1)
        if self.options.get("n_ctx") == "fit":
            raise OptionError(
                'options has n_ctx="fit", and each replica would have another context; pass a number of tokens'
            )
        for name in ("ram_file", "disk"):
            for directory in _directories(self.cache.get(name)):
                if "{" in directory.replace(_RANK, ""):
                    raise OptionError(
                        f'cache.{name}={shown(directory)}; the only field of a directory is "{_RANK}"'
                    )

    @property
    def id(self) -> str:
        """The name of the model that clients use."""
        return self.name or Path(self.model).stem

    @property
    def slots(self) -> int:
        """Requests that a replica runs at once."""
        return integer("n_seq_max", self.options.get("n_seq_max", 4), 1)

    def model_options(self) -> dict[str, object]:
        """Return the options of `load_model` for the replicas.

        Their KV is interchangeable only if the file is named by its content. If no KV outlives them, that is a part
        of the content, so that no replica has to read the whole file.
        """
        found = dict(self.options)
        if "fingerprint" not in found and not self.is_persistent:
            found["fingerprint"] = "gguf_chunked"
        return found

    @property
    def is_persistent(self) -> bool:
        """Whether KV outlives the replicas, on their machines or in a remote tier."""
        return any(self.cache.get(name) for name in ("disk", "ram_file", "remote"))

    def cache_options(self, rank: int) -> dict[str, object]:
        """Return the options of `Cache` for one replica."""
        found = dict(self.cache)
        for name in ("ram_file", "disk"):
            if name in found:
                found[name] = _with_rank(found[name], rank)
        return found

    @classmethod
    def of(cls, options: FleetConfig | Mapping[str, object]) -> FleetConfig:
        """Return the configuration with these names and values."""
        if isinstance(options, FleetConfig):
            return options
        if not isinstance(options, Mapping):
            raise OptionError(
                f"{shown(options)} is no configuration; pass a FleetConfig, or a mapping of its options"
            )
        known = [each.name for each in fields(cls)]
        reject_unknown({name: value for name, value in options.items() if name not in known}, known, "a fleet")
        if "model" not in options:
            raise OptionError("a fleet needs a model, the path of a GGUF file")
        return cls(**options)  # type: ignore[arg-type]

    @classmethod
    def of_file(cls, path: str | Path) -> FleetConfig:
        """Return the configuration in a TOML file, with the tables `[options]`, `[cache]` and `[server]`.

        Raises:
            OptionError: the file cannot be read, or is wrong.
        """
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
            return cls.of(tomllib.loads(text))
        except (OSError, UnicodeDecodeError, RuntimeError) as error:
            raise OptionError(f"{path} cannot be read: {error}") from None
        except tomllib.TOMLDecodeError as error:
            raise OptionError(f"{path} is not TOML: {error}") from None
        except OptionError as error:
            raise OptionError(f"{path}: {error}") from None


def _directories(value: object) -> list[str]:
    if isinstance(value, str | Path):
        return [str(value)]
    if isinstance(value, Mapping | Sequence):
        return [str(each) for each in value]
    return []


def _with_rank(value: object, rank: int) -> object:
    if isinstance(value, str | Path):
        return str(value).replace(_RANK, str(rank))
    if isinstance(value, Mapping):
        return {_with_rank(each, rank): quota for each, quota in value.items()}
    if isinstance(value, Sequence):
        return [_with_rank(each, rank) for each in value]
    return value
