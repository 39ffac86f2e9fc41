"""The scheduling of one model's requests, tick by tick, in the model thread.

`model_thread` receives requests, and function calls of other threads (`thread_call`). It runs `scheduler`, which
admits sequences (`sequence`), fills batches (`batches`) within the free cells, and preempts. `prefix_sharing`
decides where a sequence's prefix comes from, `slots` owns the context's sequence numbers and cells (`cells`),
`live_tier` shows parked cells to the cache, and `model_context` holds what all sequences of a model share. Imports
every other package of the engine except `backends`; no other package imports this one.
"""
