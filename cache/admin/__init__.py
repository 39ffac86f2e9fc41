"""Maintenance of a cache directory, without a `Cache` or a model.

`maintenance` lists, verifies and removes blocks; `archive` exports and imports them. The command `erllama cache`
calls both. Imports `tiers` and `blocks`, and the eviction order from `catalog`; does not import `pipeline`.
"""
