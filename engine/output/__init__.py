"""The parsers that turn tokens into the parts of a reply: answer, thinking and tool calls.

`text` decodes bytes without splitting a character, `stops` finds stop strings, and `token_codec` encodes tokens so
that markers are found across them. `phase_options` describes the phases of a reply, `phases` separates thinking,
the answer and tool calls, `tool_call_ends` finds where a call ends, and `thinking_budget` limits thinking.
`constraint` chooses the grammar of each phase. Imports `engine.grammar`; does not import requests or scheduling.
"""
