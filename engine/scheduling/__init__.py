"""One model's thread: which request computes what, tick by tick.

`model_thread` receives requests and runs `scheduler`, which fills batches (`batches`) from sequences
(`sequence`) within the cells that are free (`cells`). `slots` tracks which sequence holds which
cells, and `live_tier` shows them to the cache. Every other package of the engine may be imported
here; none imports this one.
"""
