"""Markers of thinking: the texts around a model's thoughts, found in its chat template.

`find_thinking_markers` tries each family's markers, the most specific first. `model_templates` and `family`
call it. The engine then separates the text between the markers from the answer.
"""

from __future__ import annotations

from erllama.engine import Markers


def find_thinking_markers(template: str) -> Markers | None:
    """Return the markers in a template's source; None if it has none."""
    for texts, markers in _MARKERS:
        if all(text in template for text in texts):
            return markers
    return None


def _pair(open: str, close: str) -> tuple[tuple[str, ...], Markers]:
    return (open, close), Markers((open,), (close,))


# Texts that must all be in a template's source, and the markers that they identify.
_MARKERS: tuple[tuple[tuple[str, ...], Markers], ...] = (
    (
        ("<|channel|>analysis<|message|>",),
        Markers(
            ("<|channel|>analysis<|message|>", "<|start|>assistant<|channel|>analysis<|message|>"), ("<|end|>",)
        ),
    ),
    (
        ("<|channel>thought", "<channel|>"),
        Markers(("<|channel>thought\n", "<|channel>thought"), ("<channel|>",)),
    ),
    # This family may call tools while it thinks, and its answer is a tool call, too.
    (("<|inner_prefix|>",), Markers(("<|inner_prefix|>",), ("<|inner_suffix|>",))),
    _pair("<|START_THINKING|>", "<|END_THINKING|>"),
    _pair("<seed:think>", "</seed:think>"),
    _pair("[THINK]", "[/THINK]"),
    _pair("<|think_start|>", "<|think_end|>"),
    _pair("<|begin_of_thought|>", "<|end_of_thought|>"),
    _pair("<think>", "</think>"),
    # Some templates remove thinking up to its end marker and contain no begin marker.
    (("</think>",), Markers(("<think>",), ("</think>",))),
    _pair("<thinking>", "</thinking>"),
    _pair("<thought>", "</thought>"),
    _pair("<reasoning>", "</reasoning>"),
    _pair("<reason>", "</reason>"),
    (
        ("Here is my thought process:",),
        Markers(("Here is my thought process:",), ("Here is my response:",)),
    ),
)
