"""Generates sums and differences with thinking that computes them digit by digit, as taught at school."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from scripts.demo_model import words
from scripts.demo_model.grammar import one

_PLUS = (
    "What is {a} + {b}?",
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "How much is {a} [+|plus|and] {b}?",
    "{a} + {b}",
    "{a} + {b} = ?",
    "[Calculate|Compute|Work out|Solve] {a} + {b}.",
    "[Add|Please add] {a} and {b}.",
    "What is the sum of {a} and {b}?",
    "[Can you|Could you] [add {a} and {b}|tell me what {a} + {b} is]?",
)
_MINUS = (
    "What is {a} - {b}?",
    "What is {a} - {b}?",
    "What is {a} minus {b}?",
    "How much is {a} [-|minus] {b}?",
    "{a} - {b}",
    "{a} - {b} = ?",
    "[Calculate|Compute|Work out|Solve] {a} - {b}.",
    "[Subtract|Take] {b} from {a}.",
    "What is the difference between {a} and {b}?",
    "[Can you|Could you] tell me what {a} - {b} is?",
)
_AND_PLUS = ("[And|Now] [plus|add] {b}?", "And {b} more?")
_AND_MINUS = ("[And|Now] minus {b}?",)
_GAINED = (
    "{who} has {a} {what} and [gets|finds|buys] {b} more. How many {what} does {who} have now?",
    "{who} has {a} {what}. {other} gives {who} {b} more. How many [are there|{what} does {who} have]?",
)
_SPENT = (
    "{who} has {a} {what} and [loses|sells|gives away] {b}. How many {what} are left?",
    "There are {a} {what}. {who} takes {b} of them. How many are left?",
)
_COUNTED = words.listed("apples,nuts,coins,books,balls,eggs,cards,stones,shells,flowers,cookies,stamps")


@dataclass(frozen=True, slots=True)
class Sum:
    """A question, its thinking and its answer; `value` is the result."""

    question: str
    thought: str
    answer: str
    value: int


def held_out(a: int, plus: bool, b: int) -> bool:
    """Return whether no training text has this sum, for tests. One sum in eight is held out."""
    return (a * 31 + b * 17 + plus) % 8 == 0 and (plus or a != b)


def arithmetic(random: Random, first: int | None = None, *, equal: bool = False) -> Sum:
    """Return a sum or difference of numbers below 100, mostly below 50, that is not held out and not negative.

    With `first`, it continues from that number. With `equal`, it subtracts a number from itself; otherwise it never
    does.
    """
    while True:
        below = 50 if random.random() < 0.75 else 100
        plus = random.random() < 0.55
        a, b = random.randrange(below) if first is None else first, random.randrange(below)
        if (plus or a > b) and not held_out(a, plus, b):
            break
    if equal:
        plus, b = False, a
    patterns: Sequence[str]
    if first is not None:
        patterns = _AND_PLUS if plus else _AND_MINUS
    elif a > 1 and b > 1 and random.random() < 0.15:
        return _word_problem(random, a, plus, b)
    else:
        patterns = _PLUS if plus else _MINUS
    question = one(patterns, random, {"a": str(a), "b": str(b)})
    return Sum(question, thought(a, plus, b), answer(a, plus, b), a + b if plus else a - b)


def answer(a: int, plus: bool, b: int) -> str:
    return f"{a} + {b} = {a + b}." if plus else f"{a} - {b} = {a - b}."


def thought(a: int, plus: bool, b: int) -> str:
    """Return the steps of the computation, from the ones to the tens.

    >>> thought(17, True, 25)
    '17 + 25: 7 + 5 = 12, write 2, carry 1. 1 + 2 + 1 = 4. So 42.'
    """
    units_a, units_b, tens_a, tens_b = a % 10, b % 10, a // 10, b // 10
    if plus:
        units = units_a + units_b
        carry = units // 10
        steps = f"{units_a} + {units_b} = {units}, write {units % 10}, carry {carry}."
        tens = f"{tens_a} + {tens_b} + {carry} = {tens_a + tens_b + carry}."
        return f"{a} + {b}: {steps} {tens} So {a + b}."
    borrow = int(units_a < units_b)
    units = units_a + 10 * borrow
    steps = f"{units} - {units_b} = {units - units_b}, borrow {borrow}."
    tens = f"{tens_a} - {tens_b} - {borrow} = {tens_a - tens_b - borrow}."
    return f"{a} - {b}: {steps} {tens} So {a - b}."


def _word_problem(random: Random, a: int, plus: bool, b: int) -> Sum:
    """Return a sum as a word problem."""
    who, other = random.sample(words.GIRLS + words.BOYS, 2)
    what = random.choice(_COUNTED)
    values = {"who": who, "other": other, "what": what, "a": str(a), "b": str(b)}
    question = one(_GAINED if plus else _SPENT, random, values)
    value = a + b if plus else a - b
    ending = f"{value} {what}" if value != 1 else f"1 of the {what}"
    statement = f"{who} has {ending}." if plus else f"{ending.capitalize()} {'are' if value != 1 else 'is'} left."
    return Sum(question, thought(a, plus, b), statement, value)
