"""How families mark what a model thinks before it answers: the texts around it, found in a template's source.

`find_thinking` looks for the markers of each family, most particular first,
since the source of a template is all that tells. `Chat` calls it once for a
model; what stands between the markers is then kept apart from the answer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ThinkingMarkers:
    """Texts around what is thought.

    Attributes:
        open: any of these begins it; the template may have written it already, at the end of the prompt.
        close: any of these ends it.
    """

    open: tuple[str, ...]
    close: tuple[str, ...]


def find_thinking(template: str) -> ThinkingMarkers | None:
    """The markers that a template knows of; None where it knows of none."""
    for marks, thinking in _FAMILIES:
        if all(mark in template for mark in marks):
            return thinking
    return None


def _pair(open: str, close: str) -> tuple[tuple[str, ...], ThinkingMarkers]:
    return (open, close), ThinkingMarkers((open,), (close,))


# Texts that a template's source has, all of them, and what they tell.
_FAMILIES: tuple[tuple[tuple[str, ...], ThinkingMarkers], ...] = (
    (
        ("<|channel|>analysis<|message|>",),
        ThinkingMarkers(
            ("<|channel|>analysis<|message|>", "<|start|>assistant<|channel|>analysis<|message|>"), ("<|end|>",)
        ),
    ),
    (
        ("<|channel>thought", "<channel|>"),
        ThinkingMarkers(("<|channel>thought\n", "<|channel>thought"), ("<channel|>",)),
    ),
    # Tools may be called in the middle of it, and an answer is a tool's call, too.
    (("<|inner_prefix|>",), ThinkingMarkers(("<|inner_prefix|>",), ("<|inner_suffix|>",))),
    _pair("<|START_THINKING|>", "<|END_THINKING|>"),
    _pair("<seed:think>", "</seed:think>"),
    _pair("[THINK]", "[/THINK]"),
    _pair("<|think_start|>", "<|think_end|>"),
    _pair("<|begin_of_thought|>", "<|end_of_thought|>"),
    _pair("<think>", "</think>"),
    # Some templates cut the thinking off at its end, and write its beginning nowhere.
    (("</think>",), ThinkingMarkers(("<think>",), ("</think>",))),
    _pair("<thinking>", "</thinking>"),
    _pair("<thought>", "</thought>"),
    _pair("<reasoning>", "</reasoning>"),
    _pair("<reason>", "</reason>"),
    (
        ("Here is my thought process:",),
        ThinkingMarkers(("Here is my thought process:",), ("Here is my response:",)),
    ),
)
