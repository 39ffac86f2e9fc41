"""A cache in several processes: what another process opens it with, and what it reports back.

A model may run in a process of its own, which opens the directories of its caller's cache. `spec` has the values
that both need, and `members` collects the reports of the other processes. `Cache` and its pipeline use them.
Imports `options`, `catalog`, `tiers` and `blocks`.
"""
