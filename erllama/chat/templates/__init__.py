"""Chat templates, rendered in a sandbox of our own.

`template` is the entry point. `compiler` turns a template's text into Python code, which runs on a
`machine` with the `filters`, `methods` and `tests` that it may call, within `limits`.
"""
