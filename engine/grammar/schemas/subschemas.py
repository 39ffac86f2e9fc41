"""The parts of a JSON schema that are schemas themselves, and a schema rewritten in all of them.

A property may be called as a keyword is, and a constant may look like a schema:
only what stands where a schema stands is rewritten. Used by `engine.grammar.schemas.json_schema`
and by the chats, which relax the schemas of tools.
"""

from __future__ import annotations

from collections.abc import Callable

# Keywords with one schema, with a list of schemas, and with schemas by name.
_ONE = (
    *("items", "additionalItems", "additionalProperties", "unevaluatedItems", "unevaluatedProperties"),
    *("contains", "propertyNames", "not", "if", "then", "else"),
)
_LISTED = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

# Those that llguidance enforces; other formats are annotations, as JSON Schema has it.
KNOWN_FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"}
)

Schema = dict[str, object]


def rewritten(schema: object, change: Callable[[Schema], Schema]) -> object:
    """A copy of a schema with a change made in it and in all schemas within it, the outermost first.

    Args:
        change: of one schema, in its own keywords; it returns the changed schema and leaves the given one as it is.
    """
    if not isinstance(schema, dict):
        return schema
    found = dict(change(schema))
    for key, part in found.items():
        if key in _NAMED and isinstance(part, dict):
            found[key] = {name: rewritten(inner, change) for name, inner in part.items()}
        elif key in _LISTED and isinstance(part, list):
            found[key] = [rewritten(inner, change) for inner in part]
        elif key in _ONE:
            found[key] = rewritten(part, change)
    return found


def without_unknown_formats(schema: Schema) -> Schema:
    """A schema without the formats that are annotations."""

    def change(node: Schema) -> Schema:
        format = node.get("format")
        if isinstance(format, str) and format not in KNOWN_FORMATS:
            return {key: part for key, part in node.items() if key != "format"}
        return node

    found = rewritten(schema, change)
    assert isinstance(found, dict)
    return found
