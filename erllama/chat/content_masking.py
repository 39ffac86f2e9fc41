"""Content as plain text: which special tokens of a rendered conversation come from what users and tools wrote.

A template is given content in which the characters that special tokens begin or end with are replaced by others,
one for one. So no special token that is found in what it writes has such a character of the content, however the
template cuts and joins its texts. Those that are found are the template's own. Then the characters are put back.
Where they complete the text of a special token, a mark is put before it. Where such a text overlaps one of the
template's own, a border is put between the template's own and the rest. A marked text is tokenized by `History`:
it reads no special token behind a mark, and none across a border.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain

from erllama.engine import Vocabulary
from erllama.errors import ChatError

# Before the text of a special token that is none. As bytes it is 0xff, which no text in UTF-8 has.
MARK = "\udcff"
# Where one of the template's special tokens begins or ends, and a longer or another one seems to. As bytes, 0xfe.
BORDER = "\udcfe"
# Characters that stand for others: letters that no template looks for, and that are printed as they are. Cuneiform
# comes first, then rare ideographs.
_STAND_INS = (range(0x12000, 0x12300), range(0x20000, 0x2A6D0), range(0x30000, 0x31340))
# One of them as JSON in ASCII has it.
_ESCAPED = re.compile(r"\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})", re.IGNORECASE)
# What a template's own markers look like, besides the control tokens.
_MARKUP = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,30}\]")


def without_marks(text: str) -> str:
    """A text as its reader sees it."""
    return text.replace(MARK, "").replace(BORDER, "")


def raw(text: str) -> bytes:
    """A text, which may be marked, as bytes."""
    return text.encode("utf-8", "surrogateescape")


class SpecialTexts:
    """The texts of special tokens, to be found in a text: from left to right, the longest of those at one place.

    Args:
        texts: of the tokens that are read where special tokens are.
        always: of those that a tokenizer reads in any text, as some read `<tool_call>`.
    """

    def __init__(self, texts: Iterable[bytes], always: Iterable[bytes] = ()) -> None:
        self._always = frozenset(filter(None, always))
        self.texts = frozenset(filter(None, texts)) | self._always
        self._lengths = sorted({len(text) for text in self.texts}, reverse=True)
        first = b"".join(re.escape(text[:1]) for text in sorted({text[:1] for text in self.texts}))
        self._first = re.compile(b"[" + first + b"]") if first else None

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> SpecialTexts:
        """Of the tokens that are no text, and of those of text that look like a template's markers."""
        special: list[bytes] = []
        markers: list[bytes] = []
        for token in range(vocabulary.n_tokens):
            piece = vocabulary.piece(token)
            if not piece:
                special.append(vocabulary.detokenize([token], special=True))
            elif _is_marker(piece) and vocabulary.tokenize(piece, add_special=False).tolist() == [token]:
                markers.append(piece)
        return cls(special, markers)

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

    def everywhere(self, text: bytes) -> Iterator[tuple[int, int]]:
        """Where any begins and ends, whether or not it overlaps others."""
        for begun in self._first.finditer(text) if self._first is not None else ():
            start = begun.start()
            for n in self._lengths:
                if text[start : start + n] in self.texts:
                    yield start, start + n

    def is_always_read(self, text: bytes, start: int) -> bool:
        """Whether there is one at this place that a tokenizer reads in any text."""
        return any(text[start : start + n] in self._always for n in self._lengths)


class ContentMask:
    """Replaces characters of content by others, and back.

    Args:
        special: what content must not spell out.
        given: all that the template is given, in plain data, and itself: what has none of the characters that
            stand for others.

    Raises:
        ChatError: too few characters are left to stand for others.
    """

    def __init__(self, special: SpecialTexts, *given: object) -> None:
        self._special = special
        texts = [text.decode("utf-8", "replace") for text in special.texts]
        ends = {text[0] for text in texts} | {text[-1] for text in texts}
        # Letters and white space mean something to templates. Texts that begin and end so are found whole.
        self._ends = sorted(end for end in ends if not end.isalnum() and not end.isspace())
        self._words = sorted((t for t in texts if t[0] not in self._ends and t[-1] not in self._ends), key=len)
        owns = list(dict.fromkeys([*self._ends, *(t[0] for t in self._words)]))
        used = _characters(chain(_texts(given), texts))
        free = (chr(code) for code in chain(*_STAND_INS) if chr(code) not in used)
        self._stand_ins = dict(zip(owns, free, strict=False))
        if len(self._stand_ins) < len(owns):
            raise ChatError(
                f"special_tokens_in_content=False needs {len(owns)} characters of those from U+12000 that the "
                f"conversation does not have, and it leaves {len(self._stand_ins)}; "
                "shorten it, or leave the option out"
            )
        self._own = {other.encode(): own.encode() for own, other in self._stand_ins.items()}
        self._written = re.compile(b"|".join(map(re.escape, self._own))) if self._own else None

    def messages(self, messages: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
        """Messages with the content of all but the assistant's replaced, and the ids of calls in all."""
        return [self._message(message) for message in messages]

    def _message(self, message: Mapping[str, object]) -> dict[str, object]:
        if message["role"] != "assistant":
            masked = ("content", "name", "tool_call_id")
            return {name: self.value(value) if name in masked else value for name, value in message.items()}
        calls = message.get("tool_calls")
        if not isinstance(calls, list):
            return dict(message)
        # The caller chooses ids, and a result has that of its call: templates may compare them.
        return {**message, "tool_calls": [{**call, "id": self.value(call["id"])} for call in calls]}

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
        """What was written of replaced content, with the characters put back, and marks.

        Each text of a special token that has a character put back gets a mark before it where it overlaps none of
        the template's own. Otherwise, borders cut it off where those begin and end. So no tokenizer finds it,
        whichever of the texts that overlap it reads first.
        """
        for own, other in self._stand_ins.items():
            rendered = rendered.replace(_escaped(other), other if own.isascii() else _escaped(own))
        text, put_back, template = self._put_back(rendered.encode())
        ends = [end for _, end in template]
        marks: set[int] = set()
        borders: set[int] = set()
        for start, end in self._special.everywhere(text) if put_back else ():
            at = bisect_left(put_back, start)
            if at == len(put_back) or put_back[at] >= end:
                continue
            first = bisect_right(ends, start)
            overlapped = [span for span in template[first : first + end - start] if span[0] < end]
            if not overlapped:
                marks.add(start)
            borders.update(begin if start < begin else after for begin, after in overlapped)
        parts: list[str] = []
        done = 0
        for at in sorted(marks | borders):
            parts += [text[done:at].decode(), BORDER if at in borders else "", MARK if at in marks else ""]
            done = at
        return "".join([*parts, text[done:].decode()])

    def _put_back(self, masked: bytes) -> tuple[bytes, list[int], list[tuple[int, int]]]:
        """A text with the characters put back, where those are, and where the template's own special tokens are."""
        parts: list[bytes] = []
        put_back: list[int] = []
        template: list[tuple[int, int]] = []
        length = 0

        def add(part: bytes) -> None:
            nonlocal length
            parts.append(part)
            length += len(part)

        done = 0
        for start, end in [*self._special.find(masked), (len(masked), len(masked))]:
            for written in self._written.finditer(masked, done, start) if self._written is not None else ():
                add(masked[done : written.start()])
                put_back.append(length)
                add(self._own[written.group()])
                done = written.end()
            add(masked[done:start])
            if start < end:
                template.append((length, length + end - start))
            add(masked[start:end])
            done = end
        return b"".join(parts), put_back, template


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
    mark, border = raw(MARK), raw(BORDER)
    if mark not in text and border not in text:
        return tokenize(text, before, True)
    found, pending, end = special(), b"", 0
    ids: list[int] = []

    def add(part: bytes, *, parse_special: bool) -> None:
        if part:
            ids.extend(tokenize(part, ids[-1] if ids else before, parse_special))

    spans = [(start, after) for start, after in found.find(text) if text[start - 1 : start] != mark]
    for start, after in [*spans, (len(text), len(text))]:
        for number, part in enumerate(text[end:start].split(border)):
            if number or mark in part:
                add(pending, parse_special=True)
                pending = b""
            if mark in part:
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
    plain = part.replace(mark, b"")
    pieces: list[bytes] = []
    at = done = 0
    for marked in part.split(mark)[:-1]:
        at += len(marked)
        if special.is_always_read(plain, at):
            cut = at + 1
            while plain[cut] & 0xC0 == 0x80:  # a character stays whole
                cut += 1
            pieces.append(plain[done:cut])
            done = cut
    return [*pieces, plain[done:]]


def _is_marker(piece: bytes) -> bool:
    if piece[:1] not in (b"<", b"["):
        return False
    try:
        return _MARKUP.fullmatch(piece.decode()) is not None
    except UnicodeDecodeError:
        return False


def _texts(value: object) -> Iterator[str]:
    """All texts of plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _texts(name)
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def _characters(texts: Iterable[str]) -> set[str]:
    """The characters of texts, and those that they have as escapes of JSON."""
    found: set[str] = set()
    for text in texts:
        found.update(text)
        for high, low in _ESCAPED.findall(text):
            found.add(chr(0x10000 + ((int(high, 16) - 0xD800) << 10) + int(low, 16) - 0xDC00))
    return found


def _escaped(character: str) -> str:
    """As JSON in ASCII has it."""
    return json.dumps(character)[1:-1]
