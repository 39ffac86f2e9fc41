"""Named conversations: `/save NAME` and `/resume NAME` keep them in the user's data directory.

Each is a file of messages, as `/save FILE` writes it. Only the user can read the files and their directory.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path

import platformdirs

from erllama.checks import shown
from erllama.cli.console import format_age
from erllama.cli.files import private_directory
from erllama.errors import OptionError

# Without "/" and ".", so that a name is never a path, and short enough for the name of a file.
_NAME = re.compile(r"[\w-]{1,60}")


def is_name(text: str) -> bool:
    """Return whether a text is the name of a conversation, and not that of a file."""
    return _NAME.fullmatch(text) is not None


def conversations_directory() -> Path:
    """Return the directory of the named conversations. It may not exist."""
    return Path(platformdirs.user_data_dir("erllama")) / "conversations"


def new_conversation_path(name: str) -> Path:
    """Return where a conversation of this name is saved, and create the directory.

    Raises:
        OSError: the directory cannot be created, or other users can write to it.
    """
    private_directory(conversations_directory())
    return conversations_directory() / f"{name}.json"


def saved_conversation(name: str) -> Path:
    """Return the file of a saved conversation.

    Raises:
        OptionError: there is none of this name.
    """
    path = conversations_directory() / f"{name}.json"
    if is_name(name) and path.is_file():
        return path
    names = [each.stem for each in _newest_first()]
    if near := get_close_matches(name, names, n=1):
        hint = f"did you mean {near[0]!r}?"
    else:
        hint = "/resume lists them" if names else "/save NAME saves one"
    raise OptionError(f"there is no conversation {shown(name)}; {hint}")


def list_conversations() -> str:
    """Return the names of the saved conversations with their ages, one a line, newest first."""
    lines = [f"{path.stem:<20} {format_age(path.stat().st_mtime_ns)}" for path in _newest_first()]
    return "\n".join(lines) or "no conversation is saved; /save NAME saves this one"


def _newest_first() -> list[Path]:
    paths = [path for path in conversations_directory().glob("*.json") if is_name(path.stem) and path.is_file()]
    return sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)
