"""Packs whole training texts into rows of tokens. Texts of a row do not attend to each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

import numpy as np
from numpy.typing import NDArray

from scripts.demo_model import conversations
from scripts.demo_model.tokenizer import END, Tokenizer

BATCH_TOKENS = 4096
_SHARD = 1500  # texts packed together
WIDTHS = (256, 512, 1024)
# Weight of a prompt token in the loss; a token of a reply has the weight 1.
PROMPT_WORTH = 0.1
_OPENING = "<|im_start|>assistant\n"
_NO_THOUGHT = "<think>\n\n</think>\n\n"


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows; each array is (BATCH_TOKENS / width, width). Padding has the weight 0."""

    tokens: NDArray[np.int32]
    segments: NDArray[np.int32]
    worth: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens, and the weight of each in the loss."""

    tokens: list[int]
    worth: list[float]


def texts(tokenizer: Tokenizer, random: Random, drills: float) -> Iterator[Text]:
    """Yield texts without end: conversations, some long ones, single stories, and a share `drills` of drills."""
    while True:
        if drills and random.random() < drills:
            yield _token_weights(tokenizer, conversations.drill(random))
            continue
        kind = random.random()
        if kind < 0.03:
            tokens = tokenizer.encode(conversations.plain(random))
            yield Text(tokens, [1.0] * len(tokens))
            continue
        made = conversations.conversation(random, long=kind > 0.965)
        yield _token_weights(tokenizer, made)


def _token_weights(tokenizer: Tokenizer, made: conversations.Conversation) -> Text:
    """Weight the replies of a conversation; only the last one if earlier ones lack their thinking."""
    tokens: list[int] = []
    worth: list[float] = []

    def add(text: str, value: float) -> None:
        ids = tokenizer.encode(text)
        tokens.extend(ids)
        worth.extend([value] * len(ids))

    prompt, *replies = made.text().split(_OPENING)
    add(prompt, PROMPT_WORTH)
    for i, reply in enumerate(replies):
        # The template writes the start of a reply, so it is not part of the reply.
        prefix = _NO_THOUGHT if reply.startswith(_NO_THOUGHT) else ""
        written, end, following = reply.removeprefix(prefix).partition(END)
        forgotten = made.forgetful and i < len(replies) - 1
        add(_OPENING + prefix, 0.0)
        add(written + end, 0.0 if forgotten else 1.0)
        add(following, PROMPT_WORTH)
    return Text(tokens, worth)


def batches(tokenizer: Tokenizer, seed: int, *, drills: float = 0.0) -> Iterator[Batch]:
    """Yield batches without end. Packs the texts of one shard at a time into few rows, and shuffles its batches."""
    random = Random(seed)
    source = texts(tokenizer, random, drills)
    left: list[Text] = []
    while True:
        shard = left + [text for text in islice(source, _SHARD) if len(text.tokens) <= WIDTHS[-1]]
        rows = _pack(shard)
        full: list[Batch] = []
        left = []
        for width in WIDTHS:
            of_width = [row for size, row in rows if size == width]
            random.shuffle(of_width)
            n_rows = BATCH_TOKENS // width
            whole = len(of_width) // n_rows * n_rows
            full += [_batch(of_width[i : i + n_rows], width) for i in range(0, whole, n_rows)]
            left += [text for row in of_width[whole:] for text in row]
        random.shuffle(full)
        yield from full


def _pack(shard: list[Text]) -> list[tuple[int, list[Text]]]:
    """Return rows with their widths: first fit, the longest texts first."""
    rows: list[tuple[int, list[Text]]] = []
    room: list[int] = []
    for text in sorted(shard, key=lambda text: -len(text.tokens)):
        n_tokens = len(text.tokens)
        found = next((i for i, free in enumerate(room) if free >= n_tokens), None)
        if found is None:
            found = len(rows)
            width = next(width for width in WIDTHS if n_tokens <= width)
            rows.append((width, []))
            room.append(width)
        rows[found][1].append(text)
        room[found] -= n_tokens
    return rows


def _batch(rows: list[list[Text]], width: int) -> Batch:
    tokens = np.zeros((len(rows), width), np.int32)
    segments = np.full((len(rows), width), -1, np.int32)
    worth = np.zeros((len(rows), width), np.float32)
    for i, row in enumerate(rows):
        start = 0
        for number, text in enumerate(row):
            end = start + len(text.tokens)
            tokens[i, start:end], segments[i, start:end], worth[i, start:end] = text.tokens, number, text.worth
            start = end
    return Batch(tokens, segments, worth)
