"""`erllama cache`: lists, checks, prunes, exports and imports what is stored."""
