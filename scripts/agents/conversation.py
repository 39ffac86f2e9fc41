"""A conversation of an agent: three messages of the user, the last one after the server was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from scripts.agents.agent import NEW_LINE, NOTES, PROMPTS, TEXT, Agent
from scripts.agents.requests import Request, read_requests
from scripts.agents.server import Server

_TURN_SECONDS = 600.0  # on a busy machine; an agent that takes longer hangs


def have_conversation(agent: Agent, packages: Path, folder: Path, model: Path, n_ctx: int) -> list[Request]:
    """Let an agent answer each of PROMPTS, and return its requests.

    Exits with a message if an agent fails, or if the model's edit is not in the file.

    Args:
        packages: of `install_agents`.
        folder: an empty folder, for the agent's home directory and for all files of the server.
        model: a GGUF file with the agent's script.
        n_ctx: tokens of its context.
    """
    home, work = folder / "home", folder / "work"
    home.mkdir()
    lines = []
    with Server(folder, model, n_ctx) as server:
        agent.write_configuration(home, server.url, n_ctx)
        for turn, prompt in enumerate(PROMPTS, 1):
            if turn == len(PROMPTS):
                server.kill()
                server.start()
            n_before = len(server.access_lines())
            _run_turn(agent, packages, home, work, prompt, continues=turn > 1)
            server.wait_until_written()
            lines += [(turn, line) for line in server.access_lines()[n_before:]]
    if not (work / NOTES).read_text().startswith(NEW_LINE):
        sys.exit(f"{agent.title} did not edit {work / NOTES}; see the files in {folder}")
    return read_requests(lines)


def make_work_directory(folder: Path) -> Path:
    """Create the directory in which the agent works: a repository with the notes."""
    work = folder / "work"
    work.mkdir()
    (work / NOTES).write_text(TEXT)
    subprocess.run(["git", "init", "--quiet", str(work)], check=True)
    return work


def _run_turn(agent: Agent, packages: Path, home: Path, work: Path, prompt: str, *, continues: bool) -> None:
    # No variable of the caller but the path: proxies and keys stay away from the agent.
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "TERM": "dumb", **agent.environment()}
    log = home.parent / "agent.log"
    with log.open("a") as output:
        ended = subprocess.run(
            agent.command(packages, prompt, continues=continues),
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            timeout=_TURN_SECONDS,
            check=False,
        )
    if ended.returncode:
        sys.exit(f"{agent.title} ended with exit status {ended.returncode}; see {log}")
