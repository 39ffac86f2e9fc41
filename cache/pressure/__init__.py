"""Memory pressure: measures memory and evicts when it runs short.

`memory` measures (with `cgroups` for the limits of containers) and `pressure` runs the watch.
"""
