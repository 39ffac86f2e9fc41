"""Chat with a model: each turn continues the last one. Shows the tokens of a turn before it runs.

python examples/chat.py [model.gguf]
"""

from __future__ import annotations

from _model import model_or_demo

import erllama


def main() -> None:
    # By default, the cache does not store conversations this short.
    policy = {"min_tokens": 1, "cold_min_tokens": 1}
    with erllama.load_model(model_or_demo(), cache=erllama.Cache(), policy=policy) as model:
        messages: list[dict[str, object]] = [
            {"role": "system", "content": "You are concise."},
            {"role": "user", "content": "What is 23 + 17?"},
        ]
        prompt = model.apply_chat_template(messages)
        print(f"prompt: {len(prompt)} tokens; as text: {model.render_chat(messages)!r}")
        print(f"as a completion: {model.complete(prompt, max_tokens=100, temperature=0.0).text!r}")

        for question in ("And minus 5?", "Thank you."):
            reply = model.chat(messages, max_tokens=100, temperature=0.0)
            print(f"{messages[-1]['content']} -> {reply.text!r}; {reply.usage}; {reply.cache_delta}")
            messages += [reply.message, {"role": "user", "content": question}]


if __name__ == "__main__":
    main()
