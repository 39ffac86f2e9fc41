"""Sampling: from a row of logits to a token.

`sampler` builds a chain for each request from `options`, runs the `steps` over `candidates`, and draws with
`draws`. `batch` samples the rows of many requests together, in the arrays of `rows`. `declaration` says how a step
declares its options; `dry` is the longest step. Imports run from `batch`, `sampler` and `options` towards
`candidates`. Does not import grammars or scheduling: a grammar reaches the sampler as a mask.
"""
