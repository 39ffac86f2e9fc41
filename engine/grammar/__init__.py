"""Grammars: what a reply may contain, and which tokens may come next.

`grammar` is the entry point: it compiles grammars with `llguidance_adapter` and makes matchers. `matcher` holds the
state of a reply, `triggers` delays a grammar, and `forced_tokens` tokenizes forced text. `gbnf` parses GBNF into
`expressions`; `lark_writer`, `rule_rewriting`, `terminals`, `adjacency` and `automata` translate them to Lark.
`schemas` translates JSON schemas. Nothing here imports sampling, output or scheduling.
"""
