"""An agent as the runner sees it: a program with a configuration, which has a conversation about a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from scripts.agents.models import Script

NOTES, FIRST_LINE, NEW_LINE = "notes.txt", "Buy oats.", "Buy rye."
TEXT = f"{FIRST_LINE}\nWater the plants.\n"
# The user's messages. The server is killed and started again before the last one.
PROMPTS = (
    f"Read {NOTES}, replace its first line by: {NEW_LINE} Then count its lines.",
    "Is there anything else to do?",
    "And what does the first line say now?",
)


class Agent(ABC):
    """An agent.

    Attributes:
        name: on the command line of the runner.
        title: with its version.
    """

    name: str
    title: str

    @abstractmethod
    def write_configuration(self, home: Path, url: str, n_ctx: int) -> None:
        """Write the configuration for a server into a home directory."""

    @abstractmethod
    def command(self, packages: Path, prompt: str, *, continues: bool) -> list[str]:
        """Return the command of one turn.

        Args:
            packages: the folder of `install_agents`.
            continues: whether the turn continues the last conversation.
        """

    @abstractmethod
    def environment(self) -> Mapping[str, str]:
        """Return the variables that turn off downloads and checks for updates."""

    @abstractmethod
    def script(self, work: Path) -> Script:
        """Return replies that read the notes, edit them, run a command and answer.

        Args:
            work: the directory of the conversation.
        """
