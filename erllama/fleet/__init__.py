"""A fleet: many replicas of one model under Ray Serve, with requests routed to the replica that has their prefix.

    import erllama.fleet
    from ray import serve

    serve.run(erllama.fleet.build({"model": "/models/m.gguf", "replicas": 3}))

`serve run erllama.fleet:app config=fleet.toml` does the same from a file. Needs `pip install 'erllama[ray]'`.

Imports run one way: ray_app -> ray_router, ray_calls, ingress -> runner -> replica -> prefix_router ->
prefix_index, loads, ranking, hot_prefixes, drains -> kv_events, transport. Only the modules whose names begin with
`ray_` import Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from erllama.checks import import_optional
from erllama.fleet.config import FleetConfig

if TYPE_CHECKING:
    from ray import serve

__all__ = ["FleetConfig", "app", "build"]


def build(config: FleetConfig | Mapping[str, object]) -> serve.Application:
    """Return a Ray Serve application, for `serve.run`.

    Args:
        config: a `FleetConfig`, or a mapping of its options.

    Raises:
        OptionError: an option is wrong.
        MissingPackage: Ray is not installed.
    """
    checked = FleetConfig.of(config)
    _check_packages()
    from erllama.fleet.ray_app import make_application

    return make_application(checked)


def app(args: Mapping[str, object]) -> serve.Application:
    """Return a Ray Serve application, for `serve run erllama.fleet:app` and the `args` of a Serve configuration.

    Args:
        args: either `config`, the path of a TOML file with the options of `FleetConfig`, or these options.
    """
    _check_packages()
    from erllama.fleet.ray_app import application_of

    return application_of(args)


def _check_packages() -> None:
    for module, package in (("ray.serve", "ray[serve]"), ("starlette", "starlette"), ("uvicorn", "uvicorn")):
        import_optional(module, needed_by="erllama.fleet", package=package, install="'erllama[ray]'")
