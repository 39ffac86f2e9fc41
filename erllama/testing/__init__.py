"""Test harness for caches, tiers and backends, both this library's and custom ones.

`BackendConformance` and `TierConformance` state what a backend and a tier must do, and test each rule.
`CacheMachine` and `BackendMachine` are Hypothesis state machines: derive from one, define how to create the object
under test, and run its `TestCase`. They need `pip install erllama[testing]`. `erllama.testing.models` writes tiny
GGUF models of several architectures. Imports the cache and the engine; only tests, benchmarks and examples import
it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from erllama.checks import import_optional

if TYPE_CHECKING:
    from erllama.testing.backends.conformance import BackendConformance
    from erllama.testing.backends.machine import BackendMachine
    from erllama.testing.cache_machine import CacheMachine
    from erllama.testing.tiers.conformance import TierConformance

__all__ = ["BackendConformance", "BackendMachine", "CacheMachine", "TierConformance"]

_MODULES = {
    "BackendConformance": "backends.conformance",
    "BackendMachine": "backends.machine",
    "CacheMachine": "cache_machine",
    "TierConformance": "tiers.conformance",
}

_NEED_HYPOTHESIS = ("BackendMachine", "CacheMachine")


def __getattr__(name: str) -> object:
    # Imported on first use, so that the model generators work without Hypothesis.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _NEED_HYPOTHESIS:
        import_optional(
            "hypothesis", needed_by=f"{__name__}.{name}", package="hypothesis", install="'erllama[testing]'"
        )
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
