"""The schemas within a JSON schema, and a rewrite of all of them.

A property may have the name of a keyword, and a constant may look like a schema. So only the places of schemas are
rewritten. Used by `engine.grammar.schemas.json_schema`, and by the chats, which relax the schemas of tools.
"""

from __future__ import annotations

from collections.abc import Callable

# Keywords that hold one schema, a list of schemas, and schemas by name.
_ONE = (
    *("items", "additionalItems", "additionalProperties", "unevaluatedItems", "unevaluatedProperties"),
    *("contains", "propertyNames", "not", "if", "then", "else"),
)
_LISTED = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

# The formats that llguidance enforces. Other formats are annotations, as JSON Schema defines.
KNOWN_FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"}
)

Schema = dict[str, object]


def rewrite_schema(schema: object, change: Callable[[Schema], Schema]) -> object:
    """Return a copy of a schema with a change applied to it and to all schemas within it, the outermost first.

    Args:
        change: changes the keywords of one schema. It returns the changed schema and leaves its argument unchanged.
    """
    if not isinstance(schema, dict):
        return schema
    found = dict(change(schema))
    for key, part in found.items():
        if key in _NAMED and isinstance(part, dict):
            found[key] = {name: rewrite_schema(inner, change) for name, inner in part.items()}
        elif key in _LISTED and isinstance(part, list):
            found[key] = [rewrite_schema(inner, change) for inner in part]
        elif key in _ONE:
            found[key] = rewrite_schema(part, change)
    return found


def without_unknown_formats(schema: Schema) -> Schema:
    """Return a schema without the formats that are annotations."""

    def change(node: Schema) -> Schema:
        format = node.get("format")
        if isinstance(format, str) and format not in KNOWN_FORMATS:
            return {key: part for key, part in node.items() if key != "format"}
        return node

    found = rewrite_schema(schema, change)
    assert isinstance(found, dict)
    return found
