"""Masking of content: special tokens that users and tools spell out are not read as tokens.

`Conversation.render` uses it with `special_tokens_in_content=False`:

1. `ContentMask` replaces, in content, the characters that special tokens begin or end with by stand-ins, one for
   one. A special token in the rendered text that has no stand-in is then the template's own, however the template
   cuts and joins its texts.
2. `ContentMask.unmask` restores the characters in the rendered text. It inserts a mark before each special token
   that content spells out. If such a text overlaps one of the template's special tokens, it inserts a border
   between the template's token and the rest.
3. `tokenize_marked` tokenizes the marked text. It parses no special token after a mark or across a border.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain

from erllama.engine import Vocabulary
from erllama.errors import ChatError

# Inserted before a text that looks like a special token and is content. Encoded as the byte 0xff, which does not
# occur in UTF-8.
MARK = "\udcff"
# Inserted where one of the template's special tokens begins or ends within a text that looks like another one.
# Encoded as the byte 0xfe.
BORDER = "\udcfe"
# Stand-ins for other characters: letters that no template looks for and that are printed unchanged. Cuneiform
# first, then rare ideographs.
_STAND_IN_RANGES = (range(0x12000, 0x12300), range(0x20000, 0x2A6D0), range(0x30000, 0x31340))
# A stand-in in ASCII-only JSON.
_SURROGATE_ESCAPES = re.compile(r"\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})", re.IGNORECASE)
# Form of a template's markers that are not control tokens.
_MARKUP = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,30}\]")


def remove_marks(text: str) -> str:
    """Return a marked text without its marks and borders."""
    return text.replace(MARK, "").replace(BORDER, "")


def encode_marked(text: str) -> bytes:
    """Return a text, which may have marks, as bytes."""
    return text.encode("utf-8", "surrogateescape")


class SpecialTokenTexts:
    """Finds the texts of special tokens in a text, from left to right, the longest at each place.

    Args:
        texts: texts of the tokens that a tokenizer reads only when it parses special tokens.
        always: texts of the tokens that a tokenizer reads in any text, such as `<tool_call>` for some.
    """

    def __init__(self, texts: Iterable[bytes], always: Iterable[bytes] = ()) -> None:
        self._always = frozenset(filter(None, always))
        self.texts = frozenset(filter(None, texts)) | self._always
        self._lengths = sorted({len(text) for text in self.texts}, reverse=True)
        first = b"".join(re.escape(text[:1]) for text in sorted({text[:1] for text in self.texts}))
        self._first = re.compile(b"[" + first + b"]") if first else None

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary) -> SpecialTokenTexts:
        """Return the texts of control tokens, and of text tokens that look like a template's markers."""
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
        """Yield the begin and end of each text, without overlaps."""
        at = 0
        while self._first is not None and (match := self._first.search(text, at)):
            start = match.start()
            at = next((start + n for n in self._lengths if text[start : start + n] in self.texts), start)
            if at > start:
                yield start, at
            else:
                at = start + 1

    def find_overlapping(self, text: bytes) -> Iterator[tuple[int, int]]:
        """Yield the begin and end of each text, overlapping ones included."""
        for match in self._first.finditer(text) if self._first is not None else ():
            start = match.start()
            for n in self._lengths:
                if text[start : start + n] in self.texts:
                    yield start, start + n

    def is_always_special(self, text: bytes, start: int) -> bool:
        """Return whether the text of a token that is read in any text begins at `start`."""
        return any(text[start : start + n] in self._always for n in self._lengths)


class ContentMask:
    """Replaces characters of content by stand-ins, and restores them.

    Args:
        special: texts that content must not spell out as tokens.
        inputs: all input of the template as plain data, and the template itself. Characters that occur in them are
            not used as stand-ins.

    Raises:
        ChatError: the inputs leave too few characters for stand-ins.
    """

    def __init__(self, special: SpecialTokenTexts, *inputs: object) -> None:
        self._special = special
        texts = [text.decode("utf-8", "replace") for text in special.texts]
        ends = {text[0] for text in texts} | {text[-1] for text in texts}
        # Templates may depend on letters and white space, so these are not replaced at the ends of texts. A text
        # that begins and ends with them is found as a whole.
        self._ends = sorted(end for end in ends if not end.isalnum() and not end.isspace())
        self._words = sorted((t for t in texts if t[0] not in self._ends and t[-1] not in self._ends), key=len)
        replaced = list(dict.fromkeys([*self._ends, *(t[0] for t in self._words)]))
        used = _find_characters(chain(_strings(inputs), texts))
        free = (chr(code) for code in chain(*_STAND_IN_RANGES) if chr(code) not in used)
        self._stand_ins = dict(zip(replaced, free, strict=False))
        if len(self._stand_ins) < len(replaced):
            raise ChatError(
                f"special_tokens_in_content=False needs {len(replaced)} characters from U+12000 that the "
                f"conversation does not use, and {len(self._stand_ins)} are left; "
                "shorten the conversation, or remove the option"
            )
        self._originals = {other.encode(): own.encode() for own, other in self._stand_ins.items()}
        self._stand_in_bytes = re.compile(b"|".join(map(re.escape, self._originals))) if self._originals else None

    def mask_messages(self, messages: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
        """Return messages with masked content, except the assistant's, and with masked call ids."""
        return [self._message(message) for message in messages]

    def _message(self, message: Mapping[str, object]) -> dict[str, object]:
        if message["role"] != "assistant":
            masked = ("content", "name", "tool_call_id")
            return {name: self.mask_value(value) if name in masked else value for name, value in message.items()}
        calls = message.get("tool_calls")
        if not isinstance(calls, list):
            return dict(message)
        # Ids are the caller's. Templates may compare a result's id with its call's, so both are masked.
        return {**message, "tool_calls": [{**call, "id": self.mask_value(call["id"])} for call in calls]}

    def mask_value(self, value: object) -> object:
        """Return a JSON value with its strings masked."""
        if isinstance(value, str):
            for end in self._ends:
                value = value.replace(end, self._stand_ins[end])
            for word in self._words:
                value = value.replace(word, self._stand_ins[word[0]] + word[1:])
            return value
        if isinstance(value, Mapping):
            return {self.mask_value(name): self.mask_value(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mask_value(item) for item in value]
        return value

    def unmask(self, rendered: str) -> str:
        """Return a rendered text with the characters restored and with marks and borders.

        The text of a special token that has a restored character gets a mark before it if it does not overlap the
        template's tokens. Otherwise it gets borders where those begin and end. So `tokenize_marked` does not
        find it, whichever of the overlapping texts it reads first.
        """
        for own, other in self._stand_ins.items():
            rendered = rendered.replace(_json_escape(other), other if own.isascii() else _json_escape(own))
        text, restored, template = self._restore(rendered.encode())
        ends = [end for _, end in template]
        marks: set[int] = set()
        borders: set[int] = set()
        for start, end in self._special.find_overlapping(text) if restored else ():
            at = bisect_left(restored, start)
            if at == len(restored) or restored[at] >= end:
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

    def _restore(self, masked: bytes) -> tuple[bytes, list[int], list[tuple[int, int]]]:
        """Return the restored text, the positions of restored characters, and the spans of template tokens."""
        parts: list[bytes] = []
        restored: list[int] = []
        template: list[tuple[int, int]] = []
        length = 0

        def add(part: bytes) -> None:
            nonlocal length
            parts.append(part)
            length += len(part)

        done = 0
        stand_ins = self._stand_in_bytes
        for start, end in [*self._special.find(masked), (len(masked), len(masked))]:
            for match in stand_ins.finditer(masked, done, start) if stand_ins is not None else ():
                add(masked[done : match.start()])
                restored.append(length)
                add(self._originals[match.group()])
                done = match.end()
            add(masked[done:start])
            if start < end:
                template.append((length, length + end - start))
            add(masked[start:end])
            done = end
        return b"".join(parts), restored, template


def tokenize_marked(
    text: bytes,
    special: Callable[[], SpecialTokenTexts],
    tokenize: Callable[[bytes, int | None, bool], list[int]],
    before: int | None,
) -> list[int]:
    """Return the token ids of a marked text; of a text without marks, those of the text itself.

    Args:
        special: returns the texts of special tokens.
        tokenize: returns the ids of a text, given the token before it (None at the beginning) and whether to parse
            special tokens.
        before: the token before the text; None at the beginning.
    """
    mark, border = encode_marked(MARK), encode_marked(BORDER)
    if mark not in text and border not in text:
        return tokenize(text, before, True)
    special_texts, pending, end = special(), b"", 0
    ids: list[int] = []

    def add(part: bytes, *, parse_special: bool) -> None:
        if part:
            ids.extend(tokenize(part, ids[-1] if ids else before, parse_special))

    spans = [(start, after) for start, after in special_texts.find(text) if text[start - 1 : start] != mark]
    for start, after in [*spans, (len(text), len(text))]:
        for number, part in enumerate(text[end:start].split(border)):
            if number or mark in part:
                add(pending, parse_special=True)
                pending = b""
            if mark in part:
                for piece in _split_plain(part, mark, special_texts):
                    add(piece, parse_special=False)
            else:
                pending += part
        pending += text[start:after]
        end = after
    add(pending, parse_special=True)
    return ids


def _split_plain(part: bytes, mark: bytes, special: SpecialTokenTexts) -> list[bytes]:
    """Return a part without its marks, split within the tokens that are read in any text."""
    plain = part.replace(mark, b"")
    pieces: list[bytes] = []
    at = done = 0
    for marked in part.split(mark)[:-1]:
        at += len(marked)
        if special.is_always_special(plain, at):
            cut = at + 1
            while plain[cut] & 0xC0 == 0x80:  # do not split a character
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


def _strings(value: object) -> Iterator[str]:
    """Yield all strings in plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _strings(name)
            yield from _strings(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)


def _find_characters(texts: Iterable[str]) -> set[str]:
    """Return the characters of texts, and those that JSON escapes in them stand for."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
        for high, low in _SURROGATE_ESCAPES.findall(text):
            characters.add(chr(0x10000 + ((int(high, 16) - 0xD800) << 10) + int(low, 16) - 0xDC00))
    return characters


def _json_escape(character: str) -> str:
    """Return a character as ASCII-only JSON writes it."""
    return json.dumps(character)[1:-1]
