"""Grammars, which restrict the text of a reply and so the next tokens.

`grammar` is the entry point: it compiles grammars with `llguidance_adapter` and makes matchers. `matcher` holds the
state of a reply, `triggers` delays a grammar, and `forced_tokens` tokenizes forced text. `gbnf` parses GBNF into
`expressions`; `lark_writer`, `rule_rewriting`, `terminals`, `adjacency` and `automata` translate them to Lark.
`schemas` translates JSON schemas. Does not import sampling, output or scheduling.
"""
