"""Complete a prompt in fewer decodes: likely tokens are computed together with the next one.

python examples/speculation.py [model.gguf [smaller.gguf]]
"""

from __future__ import annotations

from _model import counting_model_file

import erllama


def main() -> None:
    prompt = "abcdefghijklmnopqrstuvwxyz" * 3
    with counting_model_file() as file, erllama.load_model(file, cache=erllama.Cache()) as model:
        plain = model.complete(prompt, max_tokens=200, temperature=0.0)

        before = model.metrics.ticks
        reply = model.complete(prompt, max_tokens=200, temperature=0.0, speculative="ngram")
        print(f"n-grams: {len(reply.tokens)} tokens in {model.metrics.ticks - before} decodes; {reply.drafts}")
        print("the same reply" if reply.tokens == plain.tokens else "another reply: two tokens were equally likely")

        with counting_model_file(2) as smaller, erllama.load_model(smaller, cache=erllama.Cache()) as draft:
            reply = model.complete(prompt, max_tokens=200, temperature=0.0, speculative=draft)
            print(f"a model: {reply.drafts}")
            proposed = draft.draft(prompt, 5)
            found = model.verify(prompt, proposed)
            print(f"{found.accepted} of {len(proposed)} proposed tokens accepted, then {found.next_token}")


if __name__ == "__main__":
    main()
