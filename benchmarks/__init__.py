"""Benchmarks against other tools: `python -m benchmarks --help`, or `make bench`."""
