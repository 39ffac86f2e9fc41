"""What is stored where, in memory.

`catalog` records which tier holds which block. It uses `prefix_tree` for longest-prefix lookups and one
`ledger` per tier, which uses `lru` for the eviction order. `counters` counts what a cache did. Imports the
interface of a tier and the blocks.
"""
