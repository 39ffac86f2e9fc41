"""The error for grammars that take more than is supported, while texts of them may exist.

The modules of grammars raise it; the chats relax the schemas of tools by it.
"""

from __future__ import annotations

from erllama.errors import GrammarError


class NotSupported(GrammarError):  # noqa: N818 - reads as what happened
    """A grammar with a keyword, a combination or a size that is not supported."""
