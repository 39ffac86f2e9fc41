"""Runs Codex and OpenCode against `erllama serve`, and measures how much of their prompts comes from the cache.

`python -m scripts.agents` is the runner: it needs Linux on x86-64, npm and git. `packages` installs the agents, at
pinned versions. `isolation` confines them to this machine. `models` writes the model. `codex` and `opencode`
configure and start an agent. `server` runs the server, `conversation` has a conversation of three turns, and
`requests` and `report` turn its access log into figures.
"""
