"""The KV of one model: what is computed, restored and saved.

`sequence_kv` restores and saves the blocks of one sequence, `slices` decides where prefill is cut
and which bits are reproducible, and `weights` checks that the model file is unchanged. Imports the
cache; does not import scheduling.
"""
