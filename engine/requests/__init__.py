"""Requests and replies: the values that callers submit and receive.

`request` holds the immutable values: options, events and results. `prompts` turns text into prompt tokens. `reply`
assembles one reply, and `ticket` is the caller's end of a request in flight. `progress` is how far a reply came,
for another process that continues it. Imports `output`, `sampling` and `grammar`; does not import `scheduling`.
"""
