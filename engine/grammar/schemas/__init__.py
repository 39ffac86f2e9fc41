"""JSON schemas as grammars.

`json_schema` is the entry point. It leaves most of a schema to llguidance, and uses `rules` for the
parts that contain numbers beyond 2**53. Imports run towards `keywords`, `number_patterns`, `lark_rules`
and `subschemas`.
"""
