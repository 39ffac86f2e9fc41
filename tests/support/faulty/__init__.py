"""Tiers and backends with one fault each, for the tests of the harness."""
