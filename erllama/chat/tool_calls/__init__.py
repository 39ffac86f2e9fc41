"""Tool calls: tools as callers give them, and calls as models write them.

`families` lists how each model family writes calls. `grammars` makes the grammar of a call,
`reader` reads one, `payloads` parses its arguments, `tools` normalizes tools, and `enforcing`
validates what a grammar cannot enforce.
"""
