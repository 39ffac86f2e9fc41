"""One prompt, one reply; and the same again after a restart, which finds the prompt read.

python examples/one_shot.py [model.gguf]
"""

import tempfile
from pathlib import Path

from _model import model_file

import erllama


def complete(path: Path, place: str) -> erllama.Completion:
    """Load a model, ask it once, and unload it: all that stays is the cache's directory."""
    with erllama.Cache(disk=place) as cache, erllama.load_model(path, cache=cache, n_ctx=2048) as model:
        return model.complete("Once upon a time, in a quiet village", max_tokens=16, seed=1)


def main() -> None:
    with model_file() as path, tempfile.TemporaryDirectory() as place:
        first = complete(path, place)
        again = complete(path, place)
    print(f"reply: {first.text!r}, ended by {first.finish_reason!r}")
    for reply in (first, again):
        n_prompt = len(reply.context_tokens) - len(reply.tokens)
        hit = reply.cache
        print(f"{hit.kind}: {hit.tokens} of {n_prompt} prompt tokens were warm; tier {hit.tier}")
    print("the same reply" if again.tokens == first.tokens else "another reply")


if __name__ == "__main__":
    main()
