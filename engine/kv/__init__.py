"""The KV of one model: restored from the cache, computed, and saved to the cache.

`prefix_cache` is the cache as the engine uses it, `sequence_kv` restores and saves the blocks of one
sequence, `prefill_slices` decides where prefill is cut and which bits are reproducible, and `weights_check` checks
that the model file is unchanged. Imports the cache and the values of `requests`; does not import `scheduling`.
"""
