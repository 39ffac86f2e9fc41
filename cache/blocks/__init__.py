"""Blocks: their keys, fields and files.

`keys` computes keys, `block` defines a block without its payload, `kvc` reads and writes `.kvc` files, and `match`
holds the results of lookups and loads. Imports no other part of the cache.
"""
