"""The pipeline that moves blocks between requests and tiers.

`erllama.cache.store` wires it as a chain in which each link uses the links before it: `write_queue`, `tier_set`,
`evictor`, `change_feed`, `tier_writer`, and at its end `saver` and `loader`. `attached_tiers`, `text_memory`,
`integrity`, `garbage_collector`, `memory_directory` and `report` use the chain. Imports `sharing`, `catalog`,
`tiers`, `texts` and `blocks`.
"""
