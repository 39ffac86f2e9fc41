"""Conversations: messages and tools are rendered to a prompt, and replies are read as messages.

A request passes these modules in order: `chats` (entry point), `messages` and `tool_calls.tools` (one normalized
form), `conversation` and `templates` (text), `history` (tokens), `family` (markers and the grammar of calls),
`turn` (the reply), and `tool_calls.reader` (calls). Imports run from the first to the last. `erllama.engine` runs
the request.
"""
