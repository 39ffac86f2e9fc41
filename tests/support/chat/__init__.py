"""Chats for tests: templates, tools with the calls of each family, and a model with scripted replies."""
