"""The model as users hold it: loading, requests and results.

`load` creates a `model.Model`, which delegates to `requests` (completions), `chat`, `embedding` and
`scoring`. `registry` lists the loaded models.
"""
