"""Scaling from one replica to three under load: the new ones find their prefixes in the shared bucket."""

from __future__ import annotations

from scripts.fleet_tests.environment import Environment


def test_scaling(environment: Environment) -> None:
    """To be replaced."""
    raise NotImplementedError
