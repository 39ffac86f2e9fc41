"""The model of an example: the GGUF file named on its command line, or a tiny one made for the occasion."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from erllama.testing.models import LlamaShape, write_llama
from erllama.testing.scripted import END, write_scripted

# Small enough to be written in a moment; so many words that hardly any reply meets the end token early.
_SHAPE = LlamaShape(n_layer=4, n_embd=256, n_ff=512, n_head=4, n_head_kv=2, n_vocab=4096)


@contextmanager
def model_file(argument: int = 1) -> Iterator[Path]:
    """The path of a model: the argument of that number, or, without one, a file of random weights."""
    if len(sys.argv) > argument:
        yield Path(sys.argv[argument])
        return
    with tempfile.TemporaryDirectory() as place:
        yield write_llama(Path(place) / "random.gguf", _SHAPE, seed=argument)


@contextmanager
def counting_model_file(argument: int = 1) -> Iterator[Path]:
    """The path of a model: the argument of that number, or a file that says the alphabet for ever."""
    if len(sys.argv) > argument:
        yield Path(sys.argv[argument])
        return
    letters = "abcdefghijklmnopqrstuvwxyz"
    follows = dict(zip(letters, letters[1:] + letters[0], strict=True))
    with tempfile.TemporaryDirectory() as place:
        yield write_scripted(Path(place) / "alphabet.gguf", follows)


# What the model for chats says: to a question, to one with tools at hand, and to a tool's result.
_SAID = {
    "<|answers|>": ["<think>", "23 * 17 is ", "23 * 10 + 23 * 7, ", "so 230 + 161.", "</think>", "It is ", "391."],
    "<|asks|>": ["<tool_call>", '{"name": "get_time", ', '"arguments": ', '{"city": "Oslo"}}', "</tool_call>"],
    "<|tells|>": ["In Oslo ", "it is ", "12:30."],
}
_SPECIAL = [*_SAID, "<|system|>", "<|user|>", "<|tool|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
_TEMPLATE = """
{%- macro speaker(before) -%}
{{ '<|tells|>' if before.role == 'tool' else '<|asks|>' if tools else '<|answers|>' }}
{%- endmacro -%}
{%- if tools %}<|system|>{{ tools | tojson }}{{ eos_token }}{% endif -%}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{ speaker(loop.previtem) }}
        {%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif -%}
        {{ message.content }}
        {%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor -%}
    {%- else -%}
        <|{{ message.role }}|>{{ message.content }}
    {%- endif -%}
    {{ eos_token }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ speaker(messages[-1]) }}{% endif -%}
"""


@contextmanager
def chat_model_file() -> Iterator[Path]:
    """The path of a model that chats: the first argument, or a file that says what is written above."""
    if len(sys.argv) > 1:
        yield Path(sys.argv[1])
        return
    chains = [[speaker, *pieces, END] for speaker, pieces in _SAID.items()]
    follows = dict(pair for chain in chains for pair in pairwise(chain))
    words = [piece for pieces in _SAID.values() for piece in pieces if piece not in _SPECIAL]
    with tempfile.TemporaryDirectory() as place:
        yield write_scripted(
            Path(place) / "scripted.gguf", follows, words=words, special=_SPECIAL, chat_template=_TEMPLATE
        )
