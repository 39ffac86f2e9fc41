"""The in-memory catalog of a cache: which tier holds which block.

`catalog` records which tier holds which block. It uses `prefix_tree` for longest-prefix lookups and one
`ledger` per tier, which uses `eviction_order` for the eviction order. `counters` counts what a cache did. Imports
`blocks` and the interface of a tier.
"""
