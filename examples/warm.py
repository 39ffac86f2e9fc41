"""Compute a long prompt in advance: the first question is then as fast as the second.

python examples/warm.py [model.gguf]
"""

from _model import model_file

import erllama

SYSTEM = "You are the keeper of a small lighthouse, and a patient teller of stories.\n" * 10


def main() -> None:
    with model_file() as path, erllama.Cache() as cache, erllama.load_model(path, cache=cache) as model:
        warmed = model.prefill(SYSTEM)
        key = warmed.finish_key
        print(f"prefilled: {warmed.timings.prefill_tokens} tokens in {warmed.timings.total * 1e3:.1f} ms")
        print(f"stored as {key.hex()[:12] if key else None}; reply {warmed.text!r}")

        for question in ("Which ship passed last night?", "And where was it going?"):
            # The key is optional. With it, the request waits for a save that is still running.
            reply = model.complete(SYSTEM + question, max_tokens=8, seed=1, parent_key=key)
            first = reply.timings.restore + reply.timings.prefill
            print(
                f"question: {reply.cache.tokens} tokens from the cache, {reply.timings.prefill_tokens} computed; "
                f"first token in {first * 1e3:.1f} ms"
            )


if __name__ == "__main__":
    main()
