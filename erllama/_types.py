"""Type aliases of prompts and messages.

The one definition of each, for the façade (`erllama._model`), chats (`erllama.chat`) and the command
(`erllama.cli`). Imports no other module of the library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

# A prompt as callers pass it: text, or token ids of shape (n,).
Prompt = str | Sequence[int] | NDArray[np.integer]

# A conversation as callers pass it, in the form of OpenAI's or Anthropic's clients.
Messages = Sequence[Mapping[str, object]]

# One message in the library's own form.
Message = dict[str, object]
