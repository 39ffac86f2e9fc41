"""JSON schemas as llguidance's compiler takes them: read, made safe to compile, and given their white space."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from erllama.engine.subschemas import without_unknown_formats
from erllama.errors import GrammarError

# One space, or a new line and its indentation: every common layout, and no white space without end.
_WHITE_SPACE = r"\x20|\r?\n[\x20\t]{0,40}"
# The JSON parser of the compiler stops there.
_MAX_NESTING = 120
# Levels of nesting that references lead through: each takes up to about 10 kB of the compiler's stack.
_MAX_LEVELS = 10_000


def source_of(schema: Mapping[str, object] | bool | str) -> str:
    """A schema as text; a text is taken as it is.

    Raises:
        GrammarError: it is no JSON.
    """
    if isinstance(schema, str):
        return schema
    if not isinstance(schema, Mapping | bool):
        raise GrammarError(f"a schema is a mapping, True, False or JSON text, not {type(schema).__name__}")
    try:
        return json.dumps(schema if isinstance(schema, bool) else dict(schema), allow_nan=False)
    except RecursionError:
        raise GrammarError("the schema is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise GrammarError(f"the schema is no JSON: {error}") from None


def compiled_from(source: str) -> dict[str, object]:
    """The schema that is compiled.

    Raises:
        GrammarError: the text is no JSON, with line and column, or no schema, or nested too deeply.
    """
    schema = _read(source)
    if schema is True:
        schema = {}
    if schema is False:
        raise GrammarError("the schema is false: no JSON has it")
    if not isinstance(schema, dict):
        raise GrammarError(f"a schema is an object or a boolean, not {json.dumps(schema)[:40]}")
    if _levels(schema) > _MAX_LEVELS:
        raise GrammarError("the schema's references lead too deep")
    if not _Endings(schema).found():
        raise GrammarError("no JSON that ends has the schema: it requires itself within itself")
    return {**without_unknown_formats(schema), "x-guidance": {"whitespace_pattern": _WHITE_SPACE}}


def _read(source: str) -> object:
    def refused(constant: str) -> object:
        raise GrammarError(f"the schema is no JSON: {constant}")

    try:
        found: object = json.loads(source, parse_constant=refused)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise GrammarError(f"{place}: {error.msg}", line=error.lineno, column=error.colno) from None
    except RecursionError:
        raise GrammarError("the schema is nested too deeply") from None
    except ValueError as error:
        raise GrammarError(f"the schema is no JSON: {error}") from None
    return found


def _levels(schema: dict[str, object]) -> int:
    """At most how deep the compiler goes: every target of a reference once, and all levels below it.

    Raises:
        GrammarError: nested too deeply.
    """
    if _height(schema) > _MAX_NESTING:
        raise GrammarError(f"the schema is nested too deeply: more than {_MAX_NESTING} levels")
    targets = [_target(schema, reference) for reference in _references(schema)]
    return sum(_height(schema if target is None else target) for target in [*targets, schema])


def _references(schema: object) -> set[str]:
    """The targets of all references in a schema."""
    nodes = (node for node, _ in _walk(schema) if isinstance(node, dict))
    return {reference for node in nodes if isinstance(reference := node.get("$ref"), str)}


def _walk(node: object) -> Iterator[tuple[object, int]]:
    """Everything in a schema, with its depth."""
    open_ = [(node, 1)]
    while open_:
        node, depth = open_.pop()
        yield node, depth
        parts = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        open_ += ((part, depth + 1) for part in parts if isinstance(part, dict | list))


def _height(node: object) -> int:
    return max(depth for _, depth in _walk(node))


def _target(schema: dict[str, object], reference: str) -> object:
    """What a reference points to; None where that is not plain."""
    node: object = schema
    for part in reference.removeprefix("#").split("/")[1:]:
        if not isinstance(node, dict) or part not in node:
            return None
        node = node[part]
    return node if reference == "#" or reference.startswith("#/") else None


class _Endings:
    """Which schemas have JSON that ends: not those that require themselves. What is not understood bars nothing."""

    def __init__(self, schema: dict[str, object]) -> None:
        self._schema = schema
        self._ending: set[str] = set()

    def found(self) -> bool:
        """The least fixed point: a reference is looked at again when one that it needs is found to end."""
        needed_by: dict[str, list[str]] = {reference: [] for reference in _references(self._schema)}
        for reference in needed_by:
            for other in _references(_target(self._schema, reference)):
                needed_by[other].append(reference)
        open_ = list(needed_by)
        while open_:
            reference = open_.pop()
            if reference not in self._ending and self._ends(_target(self._schema, reference)):
                self._ending.add(reference)
                open_ += needed_by[reference]
        return self._ends(self._schema)

    def _ends(self, schema: object) -> bool:
        if not isinstance(schema, dict):
            return schema is not False
        if "const" in schema or "enum" in schema:
            return True
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in self._ending:
            return False
        if not all(map(self._ends, _list(schema.get("allOf")))):
            return False
        for key in ("anyOf", "oneOf"):
            if key in schema and not any(map(self._ends, _list(schema[key]))):
                return False
        types = schema.get("type", "string")
        return any(self._of_type(type_, schema) for type_ in (_list(types) or [types]))

    def _of_type(self, type_: object, schema: dict[str, object]) -> bool:
        if type_ == "object":
            properties = schema.get("properties")
            others = schema.get("additionalProperties", True)
            known = properties if isinstance(properties, dict) else {}
            names = [name for name in _list(schema.get("required")) if isinstance(name, str)]
            return all(self._ends(known.get(name, others)) for name in names)
        if type_ == "array":
            least = schema.get("minItems", 0)
            first = _list(schema.get("prefixItems"))
            n = int(least) if isinstance(least, int | float) else 0
            return all(map(self._ends, first[:n])) and (n <= len(first) or self._ends(schema.get("items", True)))
        return True


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
