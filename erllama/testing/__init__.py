"""Helpers for testing models, caches and backends: for this project's suite and for yours."""
