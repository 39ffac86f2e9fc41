"""Requests of one model: prompts and options checked, requests built, submitted and awaited.

`Model` delegates to `completions`, `chats` and `embeddings`. Imports run from `chats` to `completions`, and from
there to `prompts`, `options`, `scoring`, `speculation` and `streams`.
"""
