"""Which tokens a text was computed as.

`text_tokens` finds the tokens of the longest known beginning of a text, and `token_chain` stores
shared beginnings once. Imports nothing else of the cache but keys.
"""
