"""Memory pressure: measures memory, and evicts blocks when it runs short.

`memory` reads memory usage, with `cgroups` for the limits of containers. `pressure` checks it at an interval.
Imports no other part of the cache but `sizes`; `Cache` imports it.
"""
