"""Limits of chat templates: constants with their reasons, and the error for exceeding one.

`Budget` and `Machine` enforce the limits of a rendering, and `compiler` those of a template. Imports no other
module of this package.
"""

from __future__ import annotations

from typing import Final

# Processor time of one rendering, in seconds. The largest conversations take a tenth of it.
MAX_SECONDS: Final = 10.0
# Steps of one rendering. A step takes about a fifth of a microsecond, so this is what MAX_SECONDS allows, but equal
# on every machine. A conversation of ten thousand messages takes one or two million.
MAX_STEPS: Final = 50_000_000
# Characters of one text, and of the rendered text: far beyond any context, well within memory.
MAX_TEXT: Final = 64 << 20
# Bytes of all values that a rendering makes, including those that it drops, and the additional bytes for each
# character of its input: templates copy a message about ten times.
MAX_MEMORY: Final = 512 << 20
MEMORY_PER_CHARACTER: Final = 64
# Depth of macro calls. Tools' schemas nest a few dozen levels at most, and a level takes several stack frames.
MAX_CALLS: Final = 48
# Nesting depth of values, which `json` and the interpreter walk by recursion.
MAX_DEPTH: Final = 100
# Values that one operation may walk over, to compare, write or sort them.
MAX_ITEMS: Final = 2_000_000
# Well below the 4,300 digits beyond which Python refuses to write an integer. A process may turn that check off.
MAX_INT_BITS: Final = 4096
# Characters that strip() accepts, and width of a number in a format.
MAX_CHARACTERS: Final = 256


class LimitExceeded(Exception):  # noqa: N818 - named as in `erllama.errors`
    """A template exceeds a limit. A template cannot catch it."""
