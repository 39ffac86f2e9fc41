"""The commands of a server: `erllama serve`, `ps` and `stop`."""
