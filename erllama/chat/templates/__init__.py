"""Chat templates, and the sandbox in which they render.

`template` is the entry point. It imports `compiler`, which turns a template's text into Python code, and `machine`,
which runs the code with `filters`, `methods` and `tests` on a `budget` within `limits`. `plain_data` copies the
input, and `continuation` ends the text within the last message. No module here imports other modules of
`erllama.chat`.
"""
