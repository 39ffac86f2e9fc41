"""Memory pressure: measures memory, and evicts blocks when it runs short.

`memory` reads memory usage, with `cgroups` for the limits of containers. `pressure` checks it at an interval.
Imports only `sizes` from the rest of the cache. `Cache` imports it.
"""
