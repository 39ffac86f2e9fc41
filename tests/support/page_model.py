"""A model for the tests of the chat page, whose reply depends on the last message."""

from __future__ import annotations

import time
from collections.abc import Sequence

import erllama
from support.chat.scripted_model import CALL, TEMPLATE, VOCABULARY
from support.scripted_backend import EOG, START, ScriptedBackend

WORDS = "word "
THOUGHTS = "First I read the question. Then I answer it."
HOSTILE = """Look: <script>window.hacked = 1</script> and <img src="x" onerror="window.hacked = 2">

[click](javascript:window.hacked=3) [data](data:text/html,<script>window.hacked=4</script>) \
[also](JaVaScRiPt:alert(1)) ![picture](https://evil.example/pixel.png) [fine](https://example.org/a?b=1)

<iframe src="https://evil.example"></iframe>

```html
<script>window.hacked = 5</script>
```

| <b>a</b> | b |
|---|---|
| <img src=x onerror=window.hacked=6> | [x](vbscript:x) |
"""
SAMPLE = """The cache stores the **keys and values** of a prompt in blocks. A later request that begins with \
the same tokens restores them instead of computing them again.

### What that saves

1. The first token comes at once, *also after a restart*.
2. The processor is free for other requests:
   - on a laptop, the fan stays off
   - on a server, more people fit

```python
import erllama

model = erllama.load_model("model.gguf")
print(model.complete("Hello", max_tokens=20).text)
```

| Tier | Survives | Speed |
|---|---|---|
| Memory | a new request | fastest |
| Disk | a restart | 2 GB/s |

> A prompt is restored to the token: `exact`, or not at all.
"""


def page_model(
    *, cache: erllama.Cache | None = None, id: str = "scripted-7b", token_seconds: float = 0.0
) -> erllama.Model:
    """Load a model that replies to the last message as `_reply_text` says.

    Args:
        token_seconds: time that a token of a reply takes.
    """
    user, tool = VOCABULARY.special["<|user|>"], VOCABULARY.special["<|tool|>"]

    def next_token(tokens: list[int]) -> int:
        n = tokens[::-1].index(START)
        written = len(VOCABULARY.detokenize(tokens[len(tokens) - n :]))
        begin = max(at for at, token in enumerate(tokens) if token in (user, tool))
        message = VOCABULARY.detokenize(tokens[begin + 1 : tokens.index(EOG, begin)]).decode()
        if message == "for ever":
            time.sleep(0.01)
            return WORDS.encode()[written % len(WORDS)]
        time.sleep(token_seconds)
        reply = _reply_text(message, is_result=tokens[begin] == tool).encode()
        return reply[written] if written < len(reply) else EOG

    backend = ScriptedBackend(VOCABULARY, next_token, chat_templates={"default": TEMPLATE}, n_ctx=8192)
    return erllama.load_backend(
        backend, id=id, cache=cache or erllama.Cache(), policy={"min_tokens": 1, "cold_min_tokens": 1}
    )


def _reply_text(message: str, *, is_result: bool) -> str:
    if is_result:
        return f"The tool says {message}."
    fixed = {
        "hostile": HOSTILE,
        "sample": SAMPLE,
        "think": f"<think>{THOUGHTS}</think>Thought through.",
        "call": CALL,
    }
    return fixed.get(message.split("\n")[-1], f"You said {message}.")


def long_text(words: Sequence[str] = ("a", "prompt", "of", "many", "tokens")) -> str:
    return " ".join(words * 20)
