"""Tests of a fleet under Ray Serve: reuse of prefixes, killed replicas, scaling, and replicas of another model."""
