"""`erllama chat`: the command, its input, its slash commands and the session that they change."""
