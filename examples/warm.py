"""Reads a long prompt before anybody asks: the first question then costs no more than the second.

python examples/warm.py [model.gguf]
"""

from _model import model_file

import erllama

SYSTEM = "You are the keeper of a small lighthouse, and a patient teller of stories.\n" * 10


def main() -> None:
    with model_file() as path, erllama.Cache() as cache, erllama.load_model(path, cache=cache) as model:
        warmed = model.prefill(SYSTEM)
        key = warmed.finish_key
        print(f"read: {warmed.timings.prefill_tokens} tokens in {warmed.timings.total * 1e3:.1f} ms")
        print(f"kept as {key.hex()[:12] if key else None}; wrote {warmed.text!r}")

        for question in ("Which ship passed last night?", "And where was it going?"):
            # There is a hit without the key, too; with it, a save that is still in flight is waited for.
            reply = model.complete(SYSTEM + question, max_tokens=8, seed=1, parent_key=key)
            first = reply.timings.restore + reply.timings.prefill
            print(
                f"asked: {reply.cache.tokens} tokens were warm, {reply.timings.prefill_tokens} computed; "
                f"first token in {first * 1e3:.1f} ms"
            )


if __name__ == "__main__":
    main()
