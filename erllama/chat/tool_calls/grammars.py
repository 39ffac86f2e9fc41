"""Grammars of tool calls: a family's syntax, as pieces of text, and tools' schemas, written as llguidance's Lark.

`erllama.chat.tool_calls.families` describes the families and calls `lark`. A piece is a
text as the model writes it, in which `~` stands for white space or none. What
a grammar made here accepts, the format's `parse` reads, into arguments that
the schema allows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from erllama.chat.tool_calls.payloads import GEMMA_KEY, GEMMA_QUOTE, PYTHON_KEY
from erllama.engine.grammar.schemas import json_schema as schemas
from erllama.engine.grammar.schemas.keywords import with_plain_counts
from erllama.errors import GrammarError

ID = "\0"
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_MAX_DEPTH = 100
JSON_TYPES = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})
_COMBINED = (
    *("anyOf", "oneOf", "allOf", "$ref", "if", "not", "dependentSchemas", "patternProperties"),
    *("minProperties", "maxProperties"),
)
# What Gemma's values are not kept to; and what is none of an alternative beside which it stands.
_NOT_GEMMAS = ("prefixItems", "patternProperties", "minProperties", "maxProperties")
_ALTERNATIVES = ("$ref", "anyOf", "oneOf", "const", "enum")


@dataclass(frozen=True, slots=True)
class Frame:
    """Pieces around calls: before the first, between two (None: there is only one), after the last."""

    begin: str = ""
    between: str | None = "~"
    end: str = ""


@dataclass(frozen=True, slots=True)
class Shape:
    """Pieces of one call: before the tool's name, between it and the arguments, after them. `ID` is a call's id."""

    before: str
    middle: str
    after: str = ""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Arguments one by one, each named: pieces before the name, between name and value, and after the value.

    Attributes:
        framed: the value is on lines of its own: one new line before it, and one after, are not part of it.
    """

    open: str
    middle: str
    close: str
    framed: bool = False


Arguments = Literal["json", "python", "gemma"] | Parameters


def lark(
    frames: Sequence[Frame],
    shapes: Sequence[Shape],
    arguments: Arguments,
    parameters: Mapping[str, dict[str, object] | None],
    *,
    parallel: bool,
    id: str,
    literal: Callable[[str], str],
) -> str:
    """The language of calls to tools, given by the schemas of their parameters.

    Args:
        parameters: the schema of each tool's arguments, by the tool's name; None for any arguments.
        id: a regular expression of calls' ids.
        literal: the Lark expression for a text in which special tokens may be spelled out.
    """
    writer = _Writer(literal, id)
    calls: list[str] = []
    for name, schema in parameters.items():
        written = writer.rule(writer.arguments(arguments, schema))
        calls += (
            f"{writer.piece(shape.before)} {literal(name)} {writer.piece(shape.middle)} {written} "
            f"{writer.piece(shape.after)}"
            for shape in shapes
        )
    call = writer.rule(*calls)
    spans = []
    for frame in frames:
        between = writer.piece(frame.between) if parallel and frame.between is not None else None
        several = "" if between is None else f"({between} {call})*"
        spans.append(f"{writer.piece(frame.begin)} {call} {several} {writer.piece(frame.end)}")
    return writer.source(spans)


def quoted(text: str) -> str:
    """A text as a string of Lark's: one of JSON's, without DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def types_of(schema: object, root: Mapping[str, object]) -> frozenset[str]:
    """The types that a schema allows a value to be of; all where that is not plain."""
    return _types(schema, root, {}, 0) or JSON_TYPES


def listing_of(parameters: Mapping[str, object]) -> dict[str, object]:
    """An object with all arguments that are named anywhere in the parameters' schema, and those always required."""
    properties: dict[str, object] = {}
    required: set[str] = set()
    known: set[tuple[str, bool]] = set()

    def collect(node: object, depth: int, *, always: bool) -> None:
        if not isinstance(node, Mapping) or depth > _MAX_DEPTH:
            return
        reference = node.get("$ref")
        if isinstance(reference, str) and (reference, always) not in known:
            known.add((reference, always))
            collect(target_of(parameters, reference), depth + 1, always=always)
        for name, part in properties_of(node).items():
            same = name not in properties or properties[name] == part
            properties[name] = part if same else {"anyOf": [properties[name], part]}
        required.update(_required(node) if always else ())
        for key in ("allOf", "anyOf", "oneOf"):
            for part in _list(node.get(key)):
                collect(part, depth + 1, always=always and key == "allOf")

    collect(parameters, 0, always=True)
    shared = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
    lacking: dict[str, object] = {name: {} for name in sorted(required) if name not in properties}
    return {**shared, "type": "object", "properties": {**properties, **lacking}, "required": sorted(required)}


def _plain_listing(parameters: Mapping[str, object]) -> Mapping[str, object]:
    """The schema that lists the arguments: the parameters', or what all of it refers to."""
    found: object = parameters
    for _ in range(_MAX_DEPTH):
        if not isinstance(found, Mapping) or not isinstance(found.get("$ref"), str):
            break
        found = target_of(parameters, str(found["$ref"]))
    return found if isinstance(found, Mapping) else {}


def properties_of(schema: Mapping[str, object]) -> dict[str, object]:
    found = schema.get("properties")
    return found if isinstance(found, dict) else {}


class _Writer:
    """Rules and terminals as they come to be needed."""

    def __init__(self, literal: Callable[[str], str], id: str) -> None:
        self._literal, self._id = literal, id
        self._rules: list[str] = []
        self._names: dict[str, str] = {}
        self._targets: dict[str, str] = {}

    def source(self, spans: Sequence[str]) -> str:
        space = "WS: /[\\x20\\t\\r\\n]{1,40}/"
        return "\n".join([f"start: {' | '.join(spans)}", space, *self._rules, ""])

    def rule(self, *alternatives: str) -> str:
        return self._named("r", " | ".join(f"({alternative})" for alternative in alternatives))

    def terminal(self, expression: str) -> str:
        return self._named("T", expression)

    def piece(self, text: str) -> str:
        """A piece as an expression."""
        parts = []
        for part in re.split(f"([~{ID}])", text):
            if part == "~":
                parts.append("WS?")
            elif part == ID:
                parts.append(self.terminal(f"/{self._id}/"))
            elif part:
                parts.append(self._literal(part))
        return " ".join(parts) or '""'

    def _json(self, schema: Mapping[str, object]) -> str:
        """JSON of a schema. Equal schemas share their rules."""
        expression, lines = schemas.to_lark(schemas.to_source(schema))
        self._rules += (line for line in lines if line not in self._rules)
        return expression

    def arguments(self, kind: Arguments, schema: dict[str, object] | None) -> str:
        if schema is None:
            return self._any_arguments(kind)
        if kind == "json":
            return self._json(schema)
        listing = _plain_listing(schema)
        if isinstance(kind, Parameters):
            _check_apart(list(_listed(listing)), kind.middle.partition("~")[0])
            return (
                " ".join(
                    self._parameter(kind, name, part, schema) + ("" if name in _required(listing) else "?")
                    for name, part in _listed(listing).items()
                )
                or '""'
            )
        if kind == "python":
            entries = {
                name: f"{_key(name, PYTHON_KEY, quoted(name), '=')} {self._python(part, schema)}"
                for name, part in _listed(listing).items()
            }
            return self._separated(entries, _required(listing), self.piece(",~"))
        return self._gemma_entries(listing, schema)

    def _any_arguments(self, kind: Arguments) -> str:
        """Arguments of which nothing is known but how they are written."""
        if kind == "json":
            return self._json({"type": "object"})
        if isinstance(kind, Parameters):
            mark = kind.middle.partition("~")[0]
            name = self.terminal(f"/(?s:.+)/ & ~/(?s:.*){_escaped(mark)}(?s:.*)/")
            if _QUOTED.fullmatch(self._literal(mark)):
                name = self.terminal(f"(/(?s:.+)/ & ~/(?s:.*){_escaped(mark)}(?s:.*)/) {self._literal(mark)}")
                middle = self.piece(kind.middle.removeprefix(mark))
            else:
                middle = self.piece(kind.middle)
            return (
                f"({self._with_value(f'{self.piece(kind.open)} {name} {middle}', kind, {'type': 'string'}, {})})*"
            )
        if kind == "python":
            entry = f'{self.terminal("/[A-Za-z_][A-Za-z0-9_]*/")} "=" {self._json({})}'
            return f"({entry} ({self.piece(',~')} {entry})*)?"
        entry = f'{self.terminal("/[A-Za-z_][A-Za-z0-9_]*/")} ":" {self._gemma_any()}'
        return f'({entry} ("," {entry})*)?'

    def _named(self, prefix: str, expression: str) -> str:
        known = f"{prefix}: {expression}"
        if known not in self._names:
            self._names[known] = f"{prefix}{len(self._names)}"
            self._rules.append(f"{self._names[known]}: {expression}")
        return self._names[known]

    def _separated(self, entries: Mapping[str, str], required: set[str], comma: str) -> str:
        """Entries in order with commas between; those not required may be left out."""
        # What may follow where nothing is written yet, and where something is; from the last entry to the first.
        first = after = '""'
        for name, entry in reversed(list(entries.items())):
            may_lack = name not in required
            first, after = (
                self.rule(f"{entry} {after}", *([first] if may_lack else [])),
                self.rule(f"{comma} {entry} {after}", *([after] if may_lack else [])),
            )
        return first

    def _parameter(self, kind: Parameters, name: str, schema: object, root: dict[str, object]) -> str:
        head = f"{self.piece(kind.open)} {quoted(name)} {self.piece(kind.middle)}"
        return self.rule(self._with_value(head, kind, schema, root))

    def _with_value(self, head: str, kind: Parameters, schema: object, root: dict[str, object]) -> str:
        """What begins an argument, and its value, and what ends it."""
        close, *rest = re.split("(~)", kind.close, maxsplit=1)
        line = "\n" if kind.framed else ""
        if is_raw(types_of(schema, root)):
            value = self._raw(schema, root, line, close)
        else:
            value = f"{self._json(_within(schema, root))} {self._literal(line + close)}"
        if line:
            value = f"{self._literal(line)} {value}"
        return f"{head} {value} {self.piece(''.join(rest))}"

    def _raw(self, schema: object, root: dict[str, object], line: str, close: str) -> str:
        """A text as it is, and what ends it."""
        found = _text(schema, root, close, 0)
        if found is None:
            raise GrammarError(
                f"the schema of a text allows none that this model can write: none without {close!r}"
            )
        if "null" in types_of(schema, root):
            # The text of null is null.
            found = f'(({found}) & ~/{_NULLS}/) | "null"'
        text = f"({found}) & ~/(?s:.*){_escaped(close)}(?s:.*)/"
        ending = self._literal(close)
        if _QUOTED.fullmatch(ending):
            # Text is read in lexemes, the longest first: one that ends with what ends it is read as it should be.
            return self.terminal(f"({text}) {quoted(line + close)}")
        return f"{self.terminal(f'({text}) {quoted(line)}' if line else text)} {ending}"

    # --- Values in other spellings -------------------------------------------------------------

    def _python(self, schema: object, root: dict[str, object]) -> str:
        types = types_of(schema, root)
        if types == {"boolean"} and _choices(schema) is None:
            return '("True" | "False")'
        return self._json(_within(schema, root))

    def _gemma_entries(self, schema: object, root: dict[str, object]) -> str:
        entries = {
            name: f"{self._gemma_key(name)} {self._gemma(part, root)}"
            # As the family's templates order them, which is what its models have seen.
            for name, part in sorted(_listed(schema).items(), key=lambda entry: entry[0].lower())
        }
        return self._separated(entries, _required(schema), self._literal(","))

    def _gemma(self, schema: object, root: dict[str, object]) -> str:
        """A value in Gemma's spelling."""
        if not isinstance(schema, Mapping):
            return self._gemma_any()
        _check_gemma(schema, types_of(schema, root))
        reference = schema.get("$ref")
        if isinstance(reference, str):
            # A rule for each target: a schema may be within itself.
            if reference not in self._targets:
                self._targets[reference] = f"g{len(self._targets)}"
                self._rules.append(f"{self._targets[reference]}: {self._gemma(target_of(root, reference), root)}")
            return self._targets[reference]
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return self.rule(*(self._gemma(part, root) for part in _list(schema[key])))
        choices = _choices(schema)
        if choices is not None:
            return self.rule(*map(self._gemma_value, choices))
        types = types_of(schema, root)
        if types == JSON_TYPES:
            return self._gemma_any()
        return self.rule(*(self._gemma_of(type_, schema, root) for type_ in sorted(types)))

    def _gemma_any(self) -> str:
        if "" not in self._targets:
            self._targets[""] = any_ = "g_any"
            scalars = [self._gemma_of(type_, {}, {}) for type_ in ("string", "number", "boolean", "null")]
            self._rules.append(f"{any_}: {' | '.join([*scalars, self._gemma_list(any_), self._gemma_pairs(any_)])}")
        return self._targets[""]

    def _gemma_of(self, type_: str, schema: Mapping[str, object], root: dict[str, object]) -> str:
        if type_ == "string":
            text = self._raw({**schema, "type": "string"}, root, "", GEMMA_QUOTE)
            return f"{self._literal(GEMMA_QUOTE)} {text}"
        if type_ == "array":
            item = self._gemma(schema.get("items"), root)
            return self._gemma_list(item, schema.get("minItems", 0), schema.get("maxItems"))
        if type_ == "object":
            others = schema.get("additionalProperties")
            if properties_of(schema) or others is False:
                return f'"{{" {self._gemma_entries(schema, root)} "}}"'
            return self._gemma_pairs(self._gemma(others, root))
        limits = {key: value for key, value in schema.items() if key in _NUMBER_LIMITS}
        return self._json({"type": type_, **limits})

    def _gemma_list(self, item: str, least: object = 0, most: object = None) -> str:
        if not isinstance(least, int) or not isinstance(most, int | None) or (most is not None and most < least):
            raise GrammarError("minItems and maxItems must be integers, the first not above the second")
        if most == 0:
            return '"[" "]"'
        rest = f"({self._literal(',')} {item}){{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
        if most == 1:
            rest = ""
        filled = f'"[" {item} {rest} "]"'
        return filled if least else f'({filled} | "[" "]")'

    def _gemma_pairs(self, value: str) -> str:
        pair = f'{self.terminal("/[A-Za-z_][A-Za-z0-9_]*/")} ":" {value}'
        return f'("{{" "}}" | "{{" {pair} ("," {pair})* "}}")'

    def _gemma_value(self, value: object) -> str:
        if isinstance(value, str):
            return self._gemma_string(value)
        if isinstance(value, list):
            return _joined("[", map(self._gemma_value, value), "]")
        if isinstance(value, Mapping):
            keys = sorted(map(str, value), key=str.lower)
            return _joined("{", (f"{self._gemma_key(key)} {self._gemma_value(value[key])}" for key in keys), "}")
        return quoted(json.dumps(value))

    def _gemma_string(self, text: str) -> str:
        if GEMMA_QUOTE in text:
            raise GrammarError(f"this model writes no text that has {GEMMA_QUOTE!r} in it, as {text!r:.60} has")
        quote = self._literal(GEMMA_QUOTE)
        if _QUOTED.fullmatch(quote):
            return quoted(f"{GEMMA_QUOTE}{text}{GEMMA_QUOTE}")
        return f"{quote} {quoted(text)} {quote}" if text else f"{quote} {quote}"

    def _gemma_key(self, name: str) -> str:
        return quoted(f"{name}:") if GEMMA_KEY.fullmatch(name) else f'{self._gemma_string(name)} ":"'


# What reads as null where a text may be null.
_NULLS = r"[\x20\t\r\n]*(?:null|None)[\x20\t\r\n]*"
_NUMBER_LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_LIMITS = (
    *(*_NUMBER_LIMITS, "minLength", "maxLength", "pattern", "minItems", "maxItems", "items"),
    *("properties", "required", "additionalProperties"),
)


def _check_gemma(schema: Mapping[str, object], types: frozenset[str]) -> None:
    """Raise GrammarError for a schema that the grammar of Gemma's values would only partly enforce."""
    unknown = [key for key in _NOT_GEMMAS if key in schema]
    if isinstance(schema.get("items"), list):
        unknown.append("items")
    if "allOf" in schema and not is_raw(types):
        unknown.append("allOf")
    alternatives = [key for key in _ALTERNATIVES if key in schema]
    if alternatives:
        unknown += [key for key in (*alternatives[1:], *_LIMITS) if key in schema]
    if unknown:
        raise GrammarError(f"this model's values cannot be kept to {unknown[0]!r} in this place")


def _joined(begin: str, entries: Iterable[str], end: str) -> str:
    """Expressions with commas between them, in brackets."""
    return " ".join([quoted(begin), ' "," '.join(entries), quoted(end)])


def is_raw(types: frozenset[str]) -> bool:
    """Whether an argument of these types is written as it is, without quotes, where arguments are listed."""
    return bool(types) and types <= {"string", "null"}


def _key(name: str, bare: re.Pattern[str], string: str, equals: str) -> str:
    """A name before its value: bare where it can be, else as a string."""
    return quoted(f"{name if bare.fullmatch(name) else string}{equals}")


def _check_apart(names: Sequence[str], mark: str) -> None:
    """Raise GrammarError where one name and what follows it may be the beginning of another name."""
    known = set(names)
    for name in names:
        at = name.find(mark)
        while at >= 0:
            if name[:at] in known:
                raise GrammarError(
                    f"the parameters {name[:at]!r} and {name!r} look alike as this model writes them"
                )
            at = name.find(mark, at + 1)


def _within(schema: object, root: Mapping[str, object]) -> dict[str, object]:
    """A part of a schema on its own, with what it may refer to."""
    if schema is True or schema == {}:
        return {}
    if not isinstance(schema, dict):
        raise GrammarError(f"a schema is an object or true, not {json.dumps(schema)[:40]}")
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return {**shared, **schema}


def _listed(schema: object) -> dict[str, object]:
    """The properties that arguments may have, where they are plainly listed."""
    if not isinstance(schema, dict):
        return {}
    combined = [key for key in _COMBINED if key in schema]
    lacking = _required(schema) - set(properties_of(schema))
    if combined or lacking:
        what = f"{combined[0]!r} in them" if combined else f"{min(lacking)!r} is required and not listed"
        raise GrammarError(f"this model writes arguments one by one, and the parameters do not list them: {what}")
    # What is false may not be there at all.
    return {name: part for name, part in properties_of(schema).items() if part is not False}


def _required(schema: object) -> set[str]:
    found = schema.get("required") if isinstance(schema, dict) else None
    return {name for name in found if isinstance(name, str)} if isinstance(found, list) else set()


def _choices(schema: object) -> list[object] | None:
    if isinstance(schema, Mapping):
        if "const" in schema:
            return [schema["const"]]
        if isinstance(schema.get("enum"), list):
            return list(schema["enum"])
    return None


def _text(schema: object, root: Mapping[str, object], without: str, depth: int) -> str | None:
    """What a text without quotes may be, as a terminal, where a schema has strings and null; None for nothing."""
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return None if schema is False else "/(?s:.*)/"
    choices = _choices(schema)
    listed = schema.get("type", "string")
    types = _list(listed) or [listed]
    if choices is not None:
        texts = [choice for choice in choices if isinstance(choice, str) and without not in choice]
        texts += ["null"] if None in choices else []
        needed = [" | ".join(map(quoted, texts))]
    else:
        kinds = [_lengths(schema)] if "string" in types else []
        needed = [" | ".join([*kinds, *(['"null"'] if "null" in types else [])])]
    for key in ("anyOf", "oneOf"):
        if key in schema:
            parts = (_text(part, root, without, depth + 1) for part in _list(schema[key]))
            needed.append(" | ".join(part for part in parts if part))
    needed += (_text(part, root, without, depth + 1) or "" for part in _list(schema.get("allOf")))
    if isinstance(schema.get("$ref"), str):
        needed.append(_text(target_of(root, str(schema["$ref"])), root, without, depth + 1) or "")
    return " & ".join(f"({part})" for part in needed) if all(needed) else None


def _lengths(schema: Mapping[str, object]) -> str:
    """The texts that a schema's limits and its pattern allow."""
    counts = with_plain_counts(dict(schema))
    least, most = counts.get("minLength"), counts.get("maxLength")
    limits = f"{{{least if isinstance(least, int) else 0},{most if isinstance(most, int) else ''}}}"
    found = f"/(?s:.{limits})/" if limits != "{0,}" else "/(?s:.*)/"
    pattern = schema.get("pattern")
    if isinstance(pattern, str):
        # A schema's pattern may match anywhere.
        begun, closed = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
        inner = pattern[begun : len(pattern) - closed].replace("\\/", "/").replace("/", "\\/")
        inner = inner.replace("\n", "\\n")
        found += f" & /{'' if begun else '(?s:.*)'}(?:{inner}){'' if closed else '(?s:.*)'}/"
    return found


def _escaped(text: str) -> str:
    return "".join(f"\\x{{{ord(letter):x}}}" if not letter.isalnum() else letter for letter in text)


def target_of(root: Mapping[str, object], reference: str) -> object:
    """What a reference within a schema points to; {} where that is not plain."""
    node: object = root
    for part in reference.removeprefix("#").split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(node, Mapping) or part not in node:
            return {}
        node = node[part]
    return node if reference.startswith("#") else {}


def _types(
    schema: object, root: Mapping[str, object], known: dict[str, frozenset[str]], depth: int
) -> frozenset[str]:
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return JSON_TYPES

    def parts(key: str) -> list[frozenset[str]]:
        return [_types(part, root, known, depth + 1) for part in _list(schema.get(key))]

    found = JSON_TYPES
    if "type" in schema:
        listed = schema["type"]
        found &= {type_ for type_ in _list(listed) or [listed] if isinstance(type_, str)}
    choices = _choices(schema)
    if choices is not None:
        found &= frozenset(map(_type_of, choices))
    for key in ("anyOf", "oneOf"):
        if key in schema:
            found &= frozenset().union(*parts(key))
    for types in parts("allOf"):
        found &= types
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference not in known:
            # Within itself a schema allows nothing that it does not allow elsewhere.
            known[reference] = frozenset()
            known[reference] = _types(target_of(root, reference), root, known, depth + 1)
        found &= known[reference]
    return found


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _type_of(value: object) -> str:
    for type_, name in ((bool, "boolean"), (str, "string"), (int, "integer"), (float, "number"), (list, "array")):
        if isinstance(value, type_):
            return name
    return "object" if isinstance(value, Mapping) else "null"
