"""From a row of logits to a token.

`sampler` builds a chain of `steps` over `candidates` for each request, and draws. Nothing here
imports grammars or scheduling: a grammar reaches the sampler as a mask.
"""
