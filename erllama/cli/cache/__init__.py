"""`erllama cache`: lists, checks, evicts, exports and imports stored prompts."""
