"""The tokens that texts were computed as.

`text_tokens` finds the longest stored text that a text begins with, and its tokens. `token_chain` stores prefixes
that texts share once. Imports only `blocks`.
"""
