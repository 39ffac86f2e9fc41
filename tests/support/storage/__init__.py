"""Blocks for tests of the cache, and child processes that share a cache directory."""
