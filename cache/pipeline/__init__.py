"""How blocks move between requests and tiers.

A chain that `erllama.cache.store` wires, each link using those before it: `write_queue`, `tier_set`,
`evictor`, `change_feed`, `tier_writer`, and at its end `saver` and `loader`. `text_memory`, `integrity`,
`garbage_collector` and `report` use the chain. Imports tiers and the catalog.
"""
