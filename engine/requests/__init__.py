"""What a caller submits and receives.

`request` holds the immutable values: options, events and results. `prompts` turns text into prompt tokens. `reply`
assembles one reply, and `ticket` is the caller's end of a request in flight. Does not import scheduling.
"""
