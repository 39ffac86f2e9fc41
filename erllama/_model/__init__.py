"""The façade: loaded models, their requests and the results that users get.

`load` creates a `model.Model`, which delegates to collaborators: `requests` (completions, chats, embeddings),
`adapters`, and a `runner`. `registry` lists the loaded models. Imports run from `load` to `model` to the
collaborators, and from those to `erllama.chat`, `erllama.engine` and `erllama.cache`. No collaborator refers to a
model.
"""
