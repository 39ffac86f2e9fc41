"""Runs Codex and OpenCode against `erllama serve`, and prints how much of each prompt came from the cache.

    python -m scripts.agents [--agent NAME] [--results FILE] [--keep]

Exits with 1 if less than 95 % of a prompt came from the cache, from the second request of a conversation on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from scripts.agents.agent import Agent
from scripts.agents.codex import Codex
from scripts.agents.conversation import have_conversation, make_work_directory
from scripts.agents.isolation import isolate
from scripts.agents.models import write_scripted_model
from scripts.agents.opencode import OpenCode
from scripts.agents.packages import cache_directory, install_agents
from scripts.agents.report import Conversation, print_table

AGENTS: tuple[Agent, ...] = (Codex(), OpenCode())
N_CTX = 65536  # the scripted model's tokens are shorter than those of a real one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agent", choices=[agent.name for agent in AGENTS], help="by default both")
    parser.add_argument("--results", type=Path, help="write the figures as JSON")
    parser.add_argument("--keep", action="store_true", help="keep the folders of the conversations, with all logs")
    parsed = parser.parse_args()
    packages = install_agents()
    isolate(sys.argv[1:])
    conversations = [
        _run(agent, packages, keep=parsed.keep) for agent in AGENTS if parsed.agent in (None, agent.name)
    ]
    print_table(conversations)
    if parsed.results is not None:
        parsed.results.write_text(json.dumps([each.as_json() for each in conversations], indent=1))
    sys.exit(any(each.misses() for each in conversations))


def _run(agent: Agent, packages: Path, *, keep: bool) -> Conversation:
    folder = Path(tempfile.mkdtemp(prefix=f"{agent.name}-", dir=cache_directory()))
    print(f"{agent.title}: in {folder}", file=sys.stderr)
    work = make_work_directory(folder)
    model = write_scripted_model(folder / "local.gguf", agent.script(work))
    requests = have_conversation(agent, packages, folder, model, N_CTX)
    if not keep:
        shutil.rmtree(folder)
    return Conversation(agent.title, requests)


if __name__ == "__main__":
    main()
