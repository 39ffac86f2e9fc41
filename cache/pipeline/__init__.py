"""How blocks move between requests and tiers.

Saves go through `saving`, `write_queue` and `tier_writer`; loads through `loading`. Imports tiers
and the catalog; only `erllama.cache.store` imports this package.
"""
