"""A model with scripted replies to a chat, with its template and a tool."""

from __future__ import annotations

import erllama
from support.scripted_backend import PieceVocabulary, ScriptedBackend

Message = dict[str, object]


# Ends each message with the model's end token, and each prompt with the token to which ScriptedBackend replies.
TEMPLATE = (
    "{%- if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}{{ '<|assistant|>\t' }}"
    "{%- if keep_thinking and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{- m.content }}"
    "{%- for c in m.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{%- endfor %}<|end|>"
    "{%- else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>\t' }}{% endif %}"
)


SPECIAL = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]


VOCABULARY = PieceVocabulary(["he", "llo", "hello", " there", "name", "arguments", "get_time"], SPECIAL)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_time",
            "description": "The time in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 8}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


CALL = '<tool_call>{"name":"get_time","arguments":{"city":"Oslo"}}</tool_call>'


def model_replying(*replies: str, cache: erllama.Cache | None = None, template: str = TEMPLATE) -> erllama.Model:
    """Load a model whose turns reply with these texts, byte by byte. The last one repeats."""
    assistant = VOCABULARY.special["<|assistant|>"]

    def next_token(tokens: list[int]) -> int:
        turn = tokens.count(assistant) - 1
        reply = replies[min(turn, len(replies) - 1)].encode()
        n = tokens[::-1].index(9)  # after the prompt's tab
        text = VOCABULARY.detokenize(tokens[len(tokens) - n :])
        return reply[len(text)] if reply.startswith(text) and text != reply else 256

    backend = ScriptedBackend(VOCABULARY, next_token, chat_templates={"default": template})
    return erllama.load_backend(
        backend, cache=cache or erllama.Cache(), policy={"min_tokens": 1, "cold_min_tokens": 1}
    )


def user(text: str) -> Message:
    return {"role": "user", "content": text}
