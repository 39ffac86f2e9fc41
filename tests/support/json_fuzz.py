"""Hypothesis strategies of JSON values for the schemas of an OpenAPI document: right and nearly right ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

Schema = Mapping[str, Any]
Json = Any

TEXTS = st.text(max_size=20) | st.sampled_from(
    ["user", "assistant", "system", "tool", "function", "text", "auto", "none", "json_object", "json_schema", "<s>"]
)
NUMBERS = st.integers(-3, 40) | st.sampled_from([2**31, 2**63, -(2**63), 10**30])
SCALARS = st.none() | st.booleans() | NUMBERS | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
KEYS = st.sampled_from(
    ["role", "content", "type", "text", "function", "name", "parameters", "properties", "id", "arguments", "schema"]
)
ANYTHING: st.SearchStrategy[Json] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | TEXTS, inner, max_size=4),
    max_leaves=8,
)
# Values that reach the handlers' own checks more often than random ones do.
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", "developer"])},
        optional={
            "content": st.text(max_size=20) | st.none() | st.lists(ANYTHING, max_size=2),
            "tool_calls": st.lists(ANYTHING, max_size=2),
            "tool_call_id": TEXTS,
            "reasoning_content": TEXTS,
        },
    ),
    max_size=3,
)


def nearly(schema: Schema, components: Mapping[str, Schema]) -> st.SearchStrategy[Json]:
    """Return a strategy of values for a schema; now and then a part is of another type."""
    return st.one_of(*[_values(schema, components)] * 6, ANYTHING)


def _values(schema: Schema, components: Mapping[str, Schema]) -> st.SearchStrategy[Json]:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return st.deferred(lambda: _values(components[name], components))
    if "anyOf" in schema:
        return st.one_of(*(nearly(each, components) for each in schema["anyOf"]))
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema.get("type"):
        case "object":
            return _objects(schema, components)
        case "array":
            return st.lists(nearly(schema.get("items", {}), components), max_size=3)
        case "integer":
            return st.integers(schema.get("minimum", -3), schema.get("maximum", 40)) | NUMBERS
        case "number":
            return st.floats(-2, 3) | NUMBERS
        case "string":
            return TEXTS
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
    return ANYTHING


def _objects(schema: Schema, components: Mapping[str, Schema]) -> st.SearchStrategy[Json]:
    properties = schema.get("properties", {})
    if not properties:
        return st.dictionaries(KEYS | TEXTS, ANYTHING, max_size=4)
    values = {
        name: MESSAGES | nearly(each, components) if name == "messages" else nearly(each, components)
        for name, each in properties.items()
    }
    required = {name: values[name] for name in schema.get("required", ())}
    optional = {name: each for name, each in values.items() if name not in required}
    # A few at a time: with all of them, one wrong value would hide the rest.
    chosen = st.lists(st.sampled_from(sorted(optional)), max_size=4, unique=True) if optional else st.just([])
    return chosen.flatmap(
        lambda names: st.fixed_dictionaries({**required, **{name: optional[name] for name in names}})
    )
