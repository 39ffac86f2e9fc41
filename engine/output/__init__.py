"""From tokens to the parts of a reply.

`text` decodes bytes without splitting a character, `stops` finds stop strings, `phases` separates
thinking, the answer and tool calls, and `constraint` chooses the grammar of each phase. Imports
`engine.grammar`; does not import requests or scheduling.
"""
