"""The protocol between a model's process and its parent: frames, messages, and the conversion of values.

Imports run from `wire_values` and `messages` to `wire_types` and `frames`. The package does not import the rest of
`erllama._process`.
"""
