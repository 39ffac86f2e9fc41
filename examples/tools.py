"""Let a model call a tool and use its result.

python examples/tools.py [model.gguf]
"""

from __future__ import annotations

from _model import model_or_demo

import erllama

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_time",
            "description": "The local time in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


def get_time(city: str) -> str:
    return {"Oslo": "12:30"}.get(city, "unknown")


def main() -> None:
    policy = {"min_tokens": 1, "cold_min_tokens": 1}
    with erllama.load_model(model_or_demo(), cache=erllama.Cache(), policy=policy) as model:
        messages: list[dict[str, object]] = [{"role": "user", "content": "What time is it in Oslo?"}]
        # tool_choice="required" forces a tool call. Its arguments always match the schema.
        reply = model.chat(messages, tools=TOOLS, tool_choice="required", max_tokens=200)
        messages.append(reply.message)
        for call in reply.tool_calls:
            result = get_time(**call.arguments)  # type: ignore[arg-type]
            print(f"{call.name}({call.arguments}) -> {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        reply = model.chat(messages, tools=TOOLS, max_tokens=200)
        print(f"answer: {reply.text!r}; {reply.usage.cached} of {reply.usage.prompt} prompt tokens from the cache")


if __name__ == "__main__":
    main()
