"""The error for grammars that are valid but not supported.

The modules of grammars raise it. The chats catch it to relax the schemas of tools.
"""

from __future__ import annotations

from erllama.errors import GrammarError


class NotSupported(GrammarError):  # noqa: N818 - reads as what happened
    """A grammar has a keyword, a combination or a size that is not supported."""
