"""JSON schemas for llguidance's compiler: reading, checks of size and form, and white space.

This module checks a schema for everything that would take the compiler too long, exhaust its stack, or match no
JSON. `engine.grammar.grammar` calls this, and so do the chats for the schemas of tools.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from hashlib import sha256
from urllib.parse import unquote

from erllama.engine.grammar import llguidance_adapter
from erllama.engine.grammar.schemas.keywords import has_large_numbers, is_beyond_doubles, with_plain_counts
from erllama.engine.grammar.schemas.lark_rules import LarkFragment
from erllama.engine.grammar.schemas.rules import SchemaWriter
from erllama.engine.grammar.schemas.subschemas import rewrite_schema, without_unknown_formats
from erllama.engine.grammar.unsupported import EndlessIntersection, NotSupported
from erllama.errors import GrammarError

# One space, or a new line with indentation: every common layout, without endless white space.
_WHITE_SPACE = r"\x20|\r?\n[\x20\t]{0,40}"
# Levels at which the JSON parser of the compiler stops.
_MAX_NESTING = 120
# Levels of nesting, references included. Each takes up to about 10 kB of the compiler's stack.
_MAX_LEVELS = 10_000
# Properties of one object. Their time grows with their square, to some seconds here.
_MAX_PROPERTIES = 4000
# Characters of a character class in a regular expression. Their time grows likewise.
_MAX_CLASS = 20_000
_CLASS = re.compile(r"\[(?:[^\]\\]|\\.)*+", re.DOTALL)


def to_source(schema: Mapping[str, object] | bool | str) -> str:
    """Return a schema as JSON text. Text is returned unchanged.

    Raises:
        GrammarError: the schema is not JSON, or nested too deeply.
    """
    if isinstance(schema, str):
        return schema
    if not isinstance(schema, Mapping | bool):
        raise GrammarError(f"a schema must be a mapping, True, False or JSON text, not {type(schema).__name__}")
    try:
        return json.dumps(schema if isinstance(schema, bool) else dict(schema), allow_nan=False)
    except RecursionError:
        raise GrammarError("the schema is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise GrammarError(f"the schema is not JSON: {error}") from None


def check_classes(pattern: str) -> None:
    """Raise NotSupported if a text with regular expressions has a character class that is too long."""
    longest = max((found.end() - found.start() for found in _CLASS.finditer(pattern)), default=0)
    if longest > _MAX_CLASS:
        raise NotSupported(
            f"a character class of {longest} characters; at most {_MAX_CLASS} are supported: "
            "use ranges, such as [a-z], or classes, such as \\p{Han}"
        )


def _check_sizes(schema: dict[str, object]) -> None:
    for node, _ in _walk(schema):
        if not isinstance(node, dict):
            continue
        properties, pattern = node.get("properties"), node.get("pattern")
        if isinstance(properties, dict) and len(properties) > _MAX_PROPERTIES:
            raise NotSupported(
                f"an object of {len(properties)} properties; at most {_MAX_PROPERTIES} are supported: "
                "use additionalProperties, or objects within the object"
            )
        patterns = node.get("patternProperties")
        for text in (pattern, *(patterns if isinstance(patterns, dict) else ())):
            if isinstance(text, str):
                check_classes(text)


def to_lark(source: str) -> LarkFragment:
    """Return a schema in llguidance's Lark.

    Raises:
        GrammarError: the text is not JSON, with line and column; or not a schema, or one that cannot be enforced.
    """
    schema = prepare(source)
    if not has_large_numbers(schema) and not _intersects_endlessly(schema):
        return LarkFragment(f"%json {json.dumps(schema)}", [])
    del schema["x-guidance"]
    return SchemaWriter(
        schema,
        f"j{sha256(source.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}_",
        whitespace=_WHITE_SPACE,
        unsatisfiable=_is_unsatisfiable,
        target=lambda reference: _target(schema, reference),
    ).to_lark()


def _problem(schema: dict[str, object]) -> str:
    return llguidance_adapter.validate(f"start: %json {json.dumps(schema)}")


def _intersects_endlessly(schema: dict[str, object]) -> bool:
    """Return whether llguidance cannot combine parts of a schema, because they refer to themselves."""
    return bool(_references(schema)) and llguidance_adapter.is_endless_intersection(_problem(schema))


def _is_unsatisfiable(schema: dict[str, object]) -> bool:
    problem = _problem(schema)
    if llguidance_adapter.is_endless_intersection(problem):
        raise EndlessIntersection(llguidance_adapter.describe_error(problem).text)
    if problem and "Unsatisfiable schema" not in problem:
        kind = NotSupported if llguidance_adapter.is_unsupported(problem) else GrammarError
        raise kind(llguidance_adapter.describe_error(problem).text)
    return bool(problem)


def prepare(source: str) -> dict[str, object]:
    """Read a schema, check it, and rewrite it for the compiler.

    Raises:
        GrammarError: the text is not JSON, with line and column; or not a schema, or nested too deeply.
    """
    schema = _read(source)
    if schema is True:
        schema = {}
    if schema is False:
        raise GrammarError("the schema is false: no JSON matches it")
    if not isinstance(schema, dict):
        raise GrammarError(f"a schema is an object or a boolean, not {json.dumps(schema)[:40]}")
    _check_sizes(schema)
    counted = rewrite_schema(schema, with_plain_counts)
    assert isinstance(counted, dict)
    schema = counted
    if _levels(schema) > _MAX_LEVELS:
        raise NotSupported("the schema's references are nested too deeply")
    fault = _FinitenessCheck(schema).fault()
    if fault is not None:
        raise GrammarError(f"no JSON matches the schema: {fault}")
    return {**without_unknown_formats(schema), "x-guidance": {"whitespace_pattern": _WHITE_SPACE}}


def _read(source: str) -> object:
    def refuse(constant: str) -> object:
        raise GrammarError(f"the schema is not JSON: {constant}")

    def parse_float(digits: str) -> float | int:
        number = float(digits)
        if math.isinf(number):
            raise GrammarError(
                f"the schema has the number {digits[:40]}; the largest that is supported is 1.79e308"
            )
        if number.is_integer() and is_beyond_doubles(number) and (exact := Decimal(digits)) == int(exact):
            return int(exact)
        return number

    try:
        found: object = json.loads(source, parse_constant=refuse, parse_float=parse_float)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise GrammarError(f"{place}: {error.msg}", line=error.lineno, column=error.colno) from None
    except RecursionError:
        raise GrammarError("the schema is nested too deeply") from None
    except ValueError as error:
        raise GrammarError(f"the schema is not JSON: {error}") from None
    return found


def _levels(schema: dict[str, object]) -> int:
    """Return an upper bound of the compiler's recursion: every target of a reference once, and all levels below it.

    Raises:
        GrammarError: the schema is nested too deeply.
    """
    if _height(schema) > _MAX_NESTING:
        raise GrammarError(f"the schema is nested too deeply: more than {_MAX_NESTING} levels")
    targets = [_target(schema, reference) for reference in _references(schema)]
    return sum(_height(schema if target is None else target) for target in [*targets, schema])


def _references(schema: object) -> set[str]:
    """Return the targets of all references in a schema."""
    nodes = (node for node, _ in _walk(schema) if isinstance(node, dict))
    return {reference for node in nodes if isinstance(reference := node.get("$ref"), str)}


def _walk(node: object) -> Iterator[tuple[object, int]]:
    """Yield all values in a schema, with their depth."""
    pending = [(node, 1)]
    while pending:
        node, depth = pending.pop()
        yield node, depth
        parts = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        pending += ((part, depth + 1) for part in parts if isinstance(part, dict | list))


def _height(node: object) -> int:
    return max(depth for _, depth in _walk(node))


def _target(schema: dict[str, object], reference: str) -> object:
    """Return the target of a reference; None if it is not a plain pointer into the schema."""
    if reference != "#" and not reference.startswith("#/"):
        return None
    node: object = schema
    for part in unquote(reference).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict) and key in node:
            node = node[key]
        elif isinstance(node, list) and key.isdecimal() and int(key[:9]) < len(node):
            node = node[int(key[:9])]
        else:
            return None
    return node


class _FinitenessCheck:
    """Finds the schemas that have finite JSON. A schema that requires itself has none.

    Keywords that are not understood do not count against a schema.
    """

    def __init__(self, schema: dict[str, object]) -> None:
        self._schema = schema
        self._finite: set[str] = set()

    def fault(self) -> str | None:
        """Return why no JSON matches the schema; None if no reason was found."""
        needed_by: dict[str, list[str]] = {reference: [] for reference in _references(self._schema)}
        # First assume that every reference has finite JSON. A fault is then a contradiction, not a recursion.
        self._finite = set(needed_by)
        contradiction = self._fault(self._schema)
        if contradiction is not None:
            return contradiction
        # The least fixed point: a reference is visited again when one that it needs is found to be finite.
        self._finite = set()
        for reference in needed_by:
            for other in _references(_target(self._schema, reference)):
                needed_by[other].append(reference)
        pending = list(needed_by)
        while pending:
            reference = pending.pop()
            if reference not in self._finite and self._fault(_target(self._schema, reference)) is None:
                self._finite.add(reference)
                pending += needed_by[reference]
        return self._fault(self._schema)

    def _fault(self, schema: object) -> str | None:
        if not isinstance(schema, dict):
            return "a schema that is false matches no value" if schema is False else None
        if "const" in schema or "enum" in schema:
            return None
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in self._finite:
            return f"{reference!r:.80} requires itself, or a schema that no JSON matches"
        faults = (self._fault(part) for part in _list(schema.get("allOf")))
        found = next((fault for fault in faults if fault is not None), None)
        for key in ("anyOf", "oneOf"):
            options = [self._fault(part) for part in _list(schema.get(key))]
            if found is None and options and None not in options:
                found = f"no option of {key} is possible: {options[0]}"
        if found is not None:
            return found
        types = schema.get("type", "string")
        kinds = [self._fault_of(type_, schema) for type_ in (_list(types) or [types])]
        return None if None in kinds else kinds[0]

    def _fault_of(self, type_: object, schema: dict[str, object]) -> str | None:
        if type_ == "object":
            properties = schema.get("properties")
            others = schema.get("additionalProperties", True)
            known = properties if isinstance(properties, dict) else {}
            for name in _list(schema.get("required")):
                if name not in known and schema.get("patternProperties"):
                    # A pattern may have its schema.
                    continue
                if name not in known and others is False:
                    return f"the property {name!r:.80} is required, but neither listed nor allowed as additional"
                fault = self._fault(known.get(name, others)) if isinstance(name, str) else None
                if fault is not None:
                    return f"the property {name!r:.80} is required: {fault}"
        if type_ == "array":
            minimum = schema.get("minItems", 0)
            first = _list(schema.get("prefixItems"))
            n = int(minimum) if isinstance(minimum, int | float) else 0
            needed = [*first[:n], *([schema.get("items", True)] if n > len(first) else [])]
            faults = (self._fault(item) for item in needed)
            fault = next((fault for fault in faults if fault is not None), None)
            return None if fault is None else f"minItems is {n}, and an item is not possible: {fault}"
        return None


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
