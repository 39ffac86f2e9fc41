"""Content as plain text: which special tokens of a rendered conversation come from what users and tools wrote.

A template is given content in which the characters that special tokens begin or end with are replaced by others,
one for one. So no special token that is found in what it writes has such a character of the content, however the
template cuts and joins its texts. The characters are put back then, and a mark is put before each special token's
text that they complete. A marked text is tokenized by `History`, which reads no special token behind a mark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from erllama.engine import Vocabulary

# Before the text of a special token that is none. As bytes it is 0xff, which no text in UTF-8 has.
MARK = "\udcff"
# Characters that stand for others: letters that no template looks for, and that are printed as they are.
_STAND_INS = range(0x12000, 0x12300)
# What a template's own markers look like, besides the control tokens.
_MARKUP = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,30}\]")


def without_marks(text: str) -> str:
    """A text as its reader sees it."""
    return text.replace(MARK, "")


def raw(text: str) -> bytes:
    """A text, which may be marked, as bytes."""
    return text.encode("utf-8", "surrogateescape")


class SpecialTexts:
    """The texts of special tokens, to be found in a text: from left to right, the longest of those at one place."""

    def __init__(self, texts: Iterable[bytes]) -> None:
        self.texts = frozenset(filter(None, texts))
        self._lengths = sorted({len(text) for text in self.texts}, reverse=True)
        first = b"".join(re.escape(text[:1]) for text in sorted({text[:1] for text in self.texts}))
        self._first = re.compile(b"[" + first + b"]") if first else None

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> SpecialTexts:
        """Of the tokens that are no text."""
        special = (token for token in range(vocabulary.n_tokens) if not vocabulary.piece(token))
        return cls(vocabulary.detokenize([token], special=True) for token in special)

    def in_template(self, source: str, vocabulary: Vocabulary) -> SpecialTexts:
        """These, and the markers of a template that are one token of the vocabulary."""
        found = {text.encode() for text in _MARKUP.findall(source)} - self.texts
        single = (text for text in found if len(vocabulary.tokenize(text, add_special=False)) == 1)
        return SpecialTexts([*self.texts, *single])

    def find(self, text: bytes) -> Iterator[tuple[int, int]]:
        """Where each begins and ends."""
        at = 0
        while self._first is not None and (begun := self._first.search(text, at)):
            start = begun.start()
            at = next((start + n for n in self._lengths if text[start : start + n] in self.texts), start)
            if at > start:
                yield start, at
            else:
                at = start + 1

    def at(self, text: bytes, start: int) -> bool:
        """Whether there is one at this place."""
        return any(text[start : start + n] in self.texts for n in self._lengths)


class ContentMask:
    """Replaces characters of content by others, and back.

    Args:
        special: what content must not spell out.
        given: all that the template is given, and itself: what has none of the characters that stand for others.
    """

    def __init__(self, special: SpecialTexts, *given: object) -> None:
        self._special = special
        texts = [text.decode("utf-8", "replace") for text in special.texts]
        ends = {text[0] for text in texts} | {text[-1] for text in texts}
        # Letters and white space mean something to templates. Texts that begin and end so are found whole.
        self._ends = sorted(end for end in ends if not end.isalnum() and not end.isspace())
        self._words = sorted((t for t in texts if t[0] not in self._ends and t[-1] not in self._ends), key=len)
        known = json.dumps(given, ensure_ascii=False, default=str).replace("\\\\", "\\")
        free = (chr(code) for code in _STAND_INS if chr(code) not in known and _escaped(chr(code)) not in known)
        self._stand_ins = {own: next(free) for own in dict.fromkeys([*self._ends, *(t[0] for t in self._words)])}

    def messages(self, messages: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
        """Messages with the content of all but the assistant's replaced."""
        return [self._message(message) for message in messages]

    def _message(self, message: Mapping[str, object]) -> dict[str, object]:
        if message["role"] == "assistant":
            return dict(message)
        return {
            name: self.value(value) if name in ("content", "name") else value for name, value in message.items()
        }

    def value(self, value: object) -> object:
        """A JSON value with its texts replaced."""
        if isinstance(value, str):
            for end in self._ends:
                value = value.replace(end, self._stand_ins[end])
            for word in self._words:
                value = value.replace(word, self._stand_ins[word[0]] + word[1:])
            return value
        if isinstance(value, Mapping):
            return {self.value(name): self.value(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        return value

    def marked(self, rendered: str) -> str:
        """What was written of replaced content, with the characters put back, and marks."""
        written = rendered.encode("utf-8", "surrogatepass")
        parts, end = [], 0
        for start, after in self._special.find(written):
            parts += [self._between(written[end:start]), written[start:after]]
            end = after
        return b"".join([*parts, self._between(written[end:])]).decode("utf-8", "surrogatepass")

    def _between(self, part: bytes) -> bytes:
        """A part without special tokens of the template's."""
        text = part.decode("utf-8", "surrogatepass")
        for own, other in self._stand_ins.items():
            text = text.replace(other, own).replace(_escaped(other), own)
        raw_text, parts, end = text.encode("utf-8", "surrogatepass"), [], 0
        mark = MARK.encode("utf-8", "surrogatepass")
        for start, _ in self._special.find(raw_text):
            parts += [raw_text[end:start], mark]
            end = start
        return b"".join([*parts, raw_text[end:]])


def tokenized(
    text: bytes,
    special: Callable[[], SpecialTexts],
    tokenize: Callable[[bytes, int | None, bool], list[int]],
    before: int | None,
) -> list[int]:
    """The ids of a marked text; without marks, of the text as it is.

    Args:
        special: the tokens that are no text.
        tokenize: ids of a text that follows a token, or begins; with special tokens read or not.
        before: the token that it follows.
    """
    mark = raw(MARK)
    if mark not in text:
        return tokenize(text, before, True)
    found, pending, end = special(), b"", 0
    ids: list[int] = []

    def add(part: bytes, *, parse_special: bool) -> None:
        if part:
            ids.extend(tokenize(part, ids[-1] if ids else before, parse_special))

    spans = [(start, after) for start, after in found.find(text) if text[start - 1 : start] != mark]
    for start, after in [*spans, (len(text), len(text))]:
        part = text[end:start]
        if mark in part:
            add(pending, parse_special=True)
            pending = b""
            for piece in _plain_pieces(part, mark, found):
                add(piece, parse_special=False)
        else:
            pending += part
        pending += text[start:after]
        end = after
    add(pending, parse_special=True)
    return ids


def _plain_pieces(part: bytes, mark: bytes, special: SpecialTexts) -> list[bytes]:
    """A part without its marks, cut within the tokens that are read even where special ones are not."""
    pieces = [b""]
    first, *others = part.split(mark)
    pieces[0] += first
    for other in others:
        if special.at(other, 0):
            pieces[-1] += other
        else:
            pieces[-1] += other[:1]
            pieces.append(other[1:])
    return pieces


def _escaped(character: str) -> str:
    """As JSON in ASCII has it."""
    return json.dumps(character)[1:-1]
