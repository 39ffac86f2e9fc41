"""The keywords of a JSON schema: their values, checked for form, with exact numbers.

`engine.grammar.schemas.rules` and `engine.grammar.schemas.json_schema` call this.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction

from erllama.engine.grammar.schemas.number_patterns import Bound
from erllama.engine.grammar.unsupported import NotSupported
from erllama.errors import GrammarError

# Doubles hold every integer up to here. An exclusive bound of this value leads to the next integer, which has no
# double.
_EXACT = 1 << 53
# The largest count of repetitions in a rule.
_MAX_ITEMS = 100_000
# The largest count that llguidance reads in every keyword.
_MAX_COUNT = (1 << 31) - 1
LOWER_COUNTS = ("minLength", "minItems", "minProperties")
UPPER_COUNTS = ("maxLength", "maxItems", "maxProperties")
LOWER = ("minimum", "exclusiveMinimum")
UPPER = ("maximum", "exclusiveMaximum")
NUMBERS = (*LOWER, *UPPER, "multipleOf")
TEXTS = ("minLength", "maxLength", "pattern", "format")
SIMPLE = frozenset({"null", "boolean", "string"})
_TYPES = frozenset({*SIMPLE, "integer", "number", "array", "object"})
# Keywords that do not change the meaning of a schema here.
ANNOTATIONS = (
    "$defs",
    "definitions",
    "$schema",
    "$id",
    "id",
    "$comment",
    "title",
    "description",
    "default",
    "examples",
)
# Keywords of drafts 4 to 2020-12 that neither llguidance nor the rules here can enforce.
UNSUPPORTED = (
    *("not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames"),
    *("dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties"),
    *("$dynamicAnchor", "$dynamicRef", "$recursiveAnchor", "$recursiveRef"),
)


def has_large_numbers(schema: object) -> bool:
    """Return whether a schema has, at any depth, a number that no double holds and llguidance would change."""
    pending = [schema]
    while pending:
        node = pending.pop()
        if isinstance(node, list):
            pending += node
        elif isinstance(node, Mapping):
            if _is_large(node):
                return True
            pending += node.values()
    return False


def _is_large(node: Mapping[str, object]) -> bool:
    """Return whether the schema's own keywords have a large number, without the schemas in it."""
    limits = any(is_beyond_doubles(node.get(key)) for key in (*LOWER, *UPPER))
    return limits or any(_has_large_integer(node[key]) for key in ("const", "enum") if key in node)


def _has_large_integer(value: object) -> bool:
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        elif isinstance(value, Mapping):
            pending += value.values()
        elif is_beyond_doubles(value):
            return True
    return False


def is_beyond_doubles(value: object) -> bool:
    """Return whether llguidance may change a number, because the next integer has no double."""
    return isinstance(value, int | float) and abs(value) >= _EXACT


def unsupported_error(key: str) -> NotSupported:
    return NotSupported(
        f"{key} is not supported in a schema that also has, in or beside it, numbers beyond 2**53; "
        "leave it out, or use smaller bounds"
    )


def without(schema: dict[str, object], keys: Sequence[str]) -> dict[str, object]:
    return {key: value for key, value in schema.items() if key not in keys}


def references_in(schema: object) -> set[str]:
    found: set[str] = set()
    pending = [schema]
    while pending:
        node = pending.pop()
        if isinstance(node, list):
            pending += node
        elif isinstance(node, Mapping):
            reference = node.get("$ref")
            if isinstance(reference, str):
                found.add(reference)
            pending += (value for key, value in node.items() if key not in ("const", "enum", *ANNOTATIONS))
    return found


def schemas_of(schema: dict[str, object], key: str) -> list[object]:
    found = schema[key]
    if not isinstance(found, list) or not found:
        raise GrammarError(f"{key} must be a list of schemas, and not empty")
    return found


def types_of(parts: Iterable[dict[str, object]]) -> frozenset[str]:
    types = _TYPES
    for part in parts:
        if "type" in part:
            listed = part["type"]
            names = listed if isinstance(listed, list) else [listed]
            if not all(isinstance(name, str) and name in _TYPES for name in names):
                raise GrammarError(
                    f"the type {json.dumps(listed)[:80]} is unknown; use {', '.join(sorted(_TYPES))}"
                )
            types &= {*names, *(["integer"] if "number" in names else [])}
    return types


def lists_numbers_or_containers(part: dict[str, object]) -> bool:
    if "const" in part:
        return True
    return "enum" in part and any(not isinstance(value, str | bool | None) for value in _values(part))


def _values(part: dict[str, object]) -> list[object]:
    values = part["enum"]
    if not isinstance(values, list):
        raise GrammarError(f"enum must be a list, not {json.dumps(values)[:80]}")
    return values


def listed_values(part: dict[str, object]) -> list[list[object]]:
    """Return the values of const and enum as schemas: numbers by bounds, arrays and objects by their parts."""
    values = _values(part) if "enum" in part else [part["const"]]
    found: list[list[object]] = []
    texts = [value for value in values if isinstance(value, str | bool | None)]
    if texts:
        found.append([{"enum": texts}])
    found += ([_equal(value)] for value in values if not isinstance(value, str | bool | None))
    if "enum" in part and "const" in part:
        found = [[*schemas, {"const": part["const"]}] for schemas in found]
    return found


def _equal(value: object) -> dict[str, object]:
    """Return a schema that one value matches."""
    if isinstance(value, list):
        n = len(value)
        return {"type": "array", "prefixItems": [{"const": item} for item in value], "minItems": n, "maxItems": n}
    if isinstance(value, dict):
        properties = {name: {"const": item} for name, item in value.items()}
        return {
            "type": "object",
            "properties": properties,
            "required": list(value),
            "additionalProperties": False,
        }
    kind = "integer" if isinstance(value, int) else "number"
    return {"type": kind, "minimum": value, "maximum": value}


def constants_of(parts: Iterable[dict[str, object]]) -> frozenset[str] | None:
    """Return the values that const and enum allow, as JSON text; None without both keywords."""
    found: frozenset[str] | None = None
    for part in parts:
        if "const" in part or "enum" in part:
            values = frozenset(_text(value) for value in ([part["const"]] if "const" in part else _values(part)))
            found = values if found is None else found & values
    return found


def _text(value: object) -> str:
    # 1 and 1.0 are one number in JSON.
    plain = int(value) if isinstance(value, float) and value.is_integer() else value
    return json.dumps(plain, sort_keys=True)


def bounds_of(part: dict[str, object], inclusive: str, exclusive: str) -> list[Bound]:
    found: list[Bound] = []
    limit, other = part.get(inclusive), part.get(exclusive)
    if limit is not None:
        # In draft 4, a boolean makes the other keyword's bound exclusive.
        found.append(Bound(_decimal(limit, inclusive), other is True))
    if other is not None and not isinstance(other, bool):
        found.append(Bound(_decimal(other, exclusive), True))
    return found


def _decimal(value: object, key: str) -> Decimal:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise GrammarError(f"{key} must be a number, not {json.dumps(value)[:80]}")
    # The shortest text of a double is the text that the schema had.
    return Decimal(value) if isinstance(value, int) else Decimal(repr(value))


def step_of(value: object) -> Fraction:
    step = abs(Fraction(_decimal(value, "multipleOf")))
    if not step:
        raise GrammarError("multipleOf must be above 0")
    return step


def count_of(part: dict[str, object], key: str, default: int | None) -> int | None:
    if key not in part:
        return default
    value = part[key]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise GrammarError(f"{key} must be an integer of 0 or more, not {json.dumps(value)[:80]}")
    if value > _MAX_ITEMS and key in UPPER_COUNTS:
        # No text in a context reaches this count.
        return default
    if value > _MAX_ITEMS:
        raise NotSupported(f"{key} is {value}; at most {_MAX_ITEMS} is supported: use a smaller one")
    return value


def with_plain_counts(schema: dict[str, object]) -> dict[str, object]:
    """Return a schema with its own counts as integers, without upper counts that no text in a context reaches.

    Raises:
        NotSupported: a lower count is too large.
    """
    found = dict(schema)
    for key in (*LOWER_COUNTS, *UPPER_COUNTS):
        value = found.get(key)
        if isinstance(value, float) and value.is_integer():
            value = found[key] = int(value)
        if not isinstance(value, int) or value <= _MAX_COUNT:
            continue
        if key in LOWER_COUNTS:
            raise NotSupported(f"{key} is {value}; at most {_MAX_COUNT} is supported: use a smaller one")
        del found[key]
    return found


def items_of(part: dict[str, object]) -> tuple[list[object], object]:
    """Return the schemas of the first items, and the schema of the remaining items."""
    items = part.get("items", True)
    if isinstance(items, list):
        return items, part.get("additionalItems", True)
    first = part.get("prefixItems", [])
    if not isinstance(first, list):
        raise GrammarError(f"prefixItems must be a list, not {json.dumps(first)[:80]}")
    return first, items


def properties_of(part: dict[str, object]) -> dict[str, object]:
    found = part.get("properties", {})
    if not isinstance(found, dict):
        raise GrammarError(f"properties must be an object, not {json.dumps(found)[:80]}")
    return found


def required_by(part: dict[str, object]) -> list[str]:
    found = part.get("required", [])
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise GrammarError(f"required must be a list of names, not {json.dumps(found)[:80]}")
    return found
