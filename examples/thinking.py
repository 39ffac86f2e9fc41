"""Separate thinking from the answer, sign it, and limit it with a budget.

python examples/thinking.py [model.gguf]
"""

from __future__ import annotations

from _model import model_or_demo

import erllama


def main() -> None:
    with erllama.load_model(model_or_demo()) as model:
        messages = [{"role": "user", "content": "What is 23 + 17?"}]
        thinking, answer, signature = "", "", b""
        with model.stream_chat(
            messages, max_tokens=256, thinking="enabled", thinking_signing_key=b"a key"
        ) as events:
            for event in events:
                match event:
                    case erllama.ThinkingDelta():
                        thinking += event.text
                    case erllama.ThinkingEnd():
                        signature = event.signature
                    case erllama.TextDelta():
                        answer += event.text
        print(f"thinking:  {thinking!r}\nanswer:    {answer!r}\nsignature: {signature.hex()}")

        # The same with a prompt instead of messages.
        prompt = model.render_chat(messages)
        reply = model.complete(prompt, max_tokens=256, thinking="enabled")
        print(f"complete:  {reply.thinking!r}, {reply.text!r}")

        reply = model.chat(
            messages,
            max_tokens=256,
            thinking="enabled",
            thinking_budget_tokens=8,
            thinking_budget_message=" That will do.",
        )
        print(f"with a budget: {reply.thinking!r}, {reply.text!r}")


if __name__ == "__main__":
    main()
