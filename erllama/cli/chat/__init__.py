"""`erllama chat`: the command, its input line, its slash commands and its conversation."""
