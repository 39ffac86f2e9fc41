"""Complete one prompt, and complete it again after a restart with the prompt from the cache.

python examples/one_shot.py [model.gguf]
"""

import tempfile
from pathlib import Path

from _model import model_or_demo

import erllama

BEGINNING = (
    "Once upon a time, in a quiet village by the sea, lived a small fox called Pip. "
    "One day Pip found an old lamp on the beach. It was"
)


def complete(path: Path, place: str) -> erllama.Completion:
    """Load a model, complete the prompt, and unload the model. Only the cache directory stays."""
    with erllama.Cache(disk=place) as cache, erllama.load_model(path, cache=cache, n_ctx=2048) as model:
        return model.complete(BEGINNING, max_tokens=200, seed=1)


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        first = complete(model_or_demo(), place)
        again = complete(model_or_demo(), place)
    print(f"reply: {first.text!r}, ended by {first.finish_reason!r}")
    for reply in (first, again):
        n_prompt = reply.n_prompt
        hit = reply.cache
        print(f"{hit.kind}: {hit.tokens} of {n_prompt} prompt tokens from the cache; tier {hit.tier}")
    print("the same reply" if again.tokens == first.tokens else "a different reply")


if __name__ == "__main__":
    main()
