"""Tool calls: tools as callers define them, and calls as models write them.

`tools` normalizes tools. `syntax` describes how a family writes calls, and `formats` lists the families. `reader`
reads calls. `call_grammar` writes their grammar with `rule_writer` and `gemma_grammar`; `constrained_calls` decides
how much of each schema it enforces, with `schema_enforcement`. `literals` and `parameter_schemas` are leaves.
"""
