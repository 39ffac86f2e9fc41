"""A model in a process of its own: the child, the protocol, and its supervision by the caller's process.

`erllama._model.load` creates a `ProcessRunner` for `load_model(..., process=True)`. In the child, `child` runs a
`ModelThread` and an `Endpoint` that serves it. docs/processes.md describes the design.
"""
