"""A replica with another model under the same name: it is never used."""

from __future__ import annotations

from scripts.fleet_tests.environment import Environment


def test_mismatch(environment: Environment) -> None:
    """To be replaced."""
    raise NotImplementedError
