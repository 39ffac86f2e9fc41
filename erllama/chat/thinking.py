"""How families mark what a model thinks before it answers: the texts around it, found in a template's source.

`find_thinking` looks for the markers of each family, most particular first,
since the source of a template is all that tells. `Chat` calls it once for a
model; what stands between the markers is then kept apart from the answer.
"""

from __future__ import annotations

from erllama.engine import Markers


def find_thinking(template: str) -> Markers | None:
    """The markers that a template knows of; None where it knows of none."""
    for marks, thinking in _FAMILIES:
        if all(mark in template for mark in marks):
            return thinking
    return None


def _pair(open: str, close: str) -> tuple[tuple[str, ...], Markers]:
    return (open, close), Markers((open,), (close,))


# Texts that a template's source has, all of them, and what they tell.
_FAMILIES: tuple[tuple[tuple[str, ...], Markers], ...] = (
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
    # Tools may be called in the middle of it, and an answer is a tool's call, too.
    (("<|inner_prefix|>",), Markers(("<|inner_prefix|>",), ("<|inner_suffix|>",))),
    _pair("<|START_THINKING|>", "<|END_THINKING|>"),
    _pair("<seed:think>", "</seed:think>"),
    _pair("[THINK]", "[/THINK]"),
    _pair("<|think_start|>", "<|think_end|>"),
    _pair("<|begin_of_thought|>", "<|end_of_thought|>"),
    _pair("<think>", "</think>"),
    # Some templates cut the thinking off at its end, and write its beginning nowhere.
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
