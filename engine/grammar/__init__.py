"""Grammars: what a reply may contain, and which tokens may come next.

`grammar` is the entry point. It uses `llguidance_adapter` to compile, `triggers` for grammars that
start later, and `forced_tokens` for text that is certain. `gbnf`, `lark_writer`, `expressions` and
`automata` translate GBNF; `schemas` translates JSON schemas. Nothing here imports sampling, output
or scheduling.
"""
