"""The errors for grammars that are valid but not supported.

The modules of grammars raise them. The chats catch `NotSupported` to relax the schemas of tools.
"""

from __future__ import annotations

from erllama.errors import GrammarError


class NotSupported(GrammarError):  # noqa: N818 - reads as what happened
    """A grammar has a keyword, a combination or a size that is not supported."""


class EndlessIntersection(NotSupported):
    """The compiler cannot combine schemas that a value must match together, because they refer to themselves."""
