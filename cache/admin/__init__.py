"""Maintenance of a cache directory, without a `Cache` or a model.

`maintenance` lists, verifies and removes blocks; `archive` exports and imports them. The command `erllama cache`
calls both. Imports tiers, and the eviction order from the catalog; does not import the pipeline.
"""
