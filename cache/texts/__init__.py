"""Records of texts and the tokens that they were computed as.

`text_tokens` finds the longest stored text that a text begins with, and its tokens. `token_chain` stores each
prefix that texts share once. Imports only `blocks`.
"""
