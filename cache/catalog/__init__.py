"""What is stored where, in memory.

`catalog` records which tier holds which block. It uses `prefix_tree` for longest-prefix lookups and
`lru` for the eviction order. `counters` counts what a cache did. Does not call tiers: it only
records what they hold.
"""
