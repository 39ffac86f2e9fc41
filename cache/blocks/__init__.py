"""What a block is: its key, its fields, its file.

`keys` computes keys, `block` is the block without its payload, `kvc` reads and writes `.kvc` files,
and `match` holds the results of lookups and loads. Imports nothing else of the cache.
"""
