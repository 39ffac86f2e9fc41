"""Output to a terminal, with control characters replaced.

File names, model metadata, replies and error messages may contain escape sequences, which could move the cursor,
change the terminal's title or hide output. Therefore `echo` passes every text through `printable`. `erllama.cli`,
the demonstration and the handler of libllama's log print through this module.
"""

from __future__ import annotations

import json
import sys

_REPLACEMENT = "\ufffd"


def printable(text: str) -> str:
    """Return a text with each control or invisible character replaced by U+FFFD.

    Replaces the C0 and C1 controls except newline and tab, DEL, surrogates, the marks that change the direction of
    writing, the separators of lines and paragraphs, and other invisible characters. Keeps the joiners that emoji
    and some scripts need.
    """
    if text.isprintable():
        return text
    return "".join(c if _is_shown(c) or c in "\n\t" else _REPLACEMENT for c in text)


def one_line(text: str) -> str:
    """Return a printable text without line breaks, so that it cannot imitate another line of output."""
    return printable(text).replace("\n", " ").replace("\t", " ")


def json_text(value: object, *, indent: int | None = None) -> str:
    """Return a value as JSON. Escapes the characters that `printable` replaces, and no others."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    if text.isprintable():
        return text
    return "".join(c if _is_shown(c) or c == "\n" else json.dumps(c)[1:-1] for c in text)


def echo(text: str = "", *, end: str = "\n", stderr: bool = False) -> None:
    """Print a text through `printable`, to stdout or stderr."""
    print(printable(text), end=end, file=sys.stderr if stderr else sys.stdout, flush=stderr)


def _is_shown(character: str) -> bool:
    # Spaces beyond ASCII and C1 are harmless, and so are the two joiners. U+2028 and U+2029 start a new line.
    if character in "\u2028\u2029":
        return False
    return character.isprintable() or (character.isspace() and character >= "\u00a0") or character in "\u200c\u200d"
