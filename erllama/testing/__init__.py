"""What tests of this library, of caches and of backends of your own are made with.

`BackendConformance` and `TierConformance` state what a backend and a tier must do, and test each rule.
`CacheMachine` and `BackendMachine` are Hypothesis state machines: derive from
one, say how to make the thing under test, and run its `TestCase`. They need
`pip install erllama[testing]`. `erllama.testing.models` writes tiny GGUF
models of several kinds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

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


def __getattr__(name: str) -> object:
    # Late, so that the generator of models works without Hypothesis.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
