"""Conversations: templates, messages, tool calls."""
