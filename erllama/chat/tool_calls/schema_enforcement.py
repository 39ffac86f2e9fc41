"""Schema enforcement: what a grammar can enforce of a tool's schema, and the validation of the rest.

A schema that llguidance cannot express, or that a family cannot write, is relaxed: the grammar allows more than the
schema, and the arguments are validated with `jsonschema` after the call is read. `constrained_calls`, `tools` and
`erllama.chat.family` call this.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from erllama.chat.tool_calls.parameter_schemas import find_allowed_types, get_properties, list_arguments
from erllama.chat.tool_calls.syntax import ArgumentSyntax
from erllama.engine.grammar.grammar import Grammar
from erllama.engine.grammar.schemas.subschemas import Schema, rewrite_schema
from erllama.engine.grammar.unsupported import NotSupported
from erllama.errors import GrammarError

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

# Keywords that llguidance does not support.
_NOT_ENFORCED = frozenset(
    {
        *("propertyNames", "uniqueItems", "contains", "minContains", "maxContains", "not", "if", "then", "else"),
        *("dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems"),
        *("$dynamicRef", "$recursiveRef"),
    }
)
_SHOWN = 200  # characters of a violation in an error message


@lru_cache(maxsize=1024)
def find_enforcement_problem(schema: str) -> str:
    """Return why a grammar cannot enforce a schema (JSON text); "" if it can."""
    try:
        Grammar.json_schema(schema)
    except GrammarError as error:
        return str(error)
    return ""


@lru_cache(maxsize=1024)
def find_schema_error(schema: str) -> str:
    """Return why no arguments can match a schema (JSON text); "" if some can, enforced or not."""
    problem = find_enforcement_problem(schema)
    if not problem:
        return ""
    try:
        _validator(schema)
    except ValueError as error:
        return str(error)
    try:
        Grammar.json_schema(_drop_unsupported(json.loads(schema)))
    except NotSupported:
        # A relaxed schema is enforced, and the arguments are validated.
        return ""
    except GrammarError as error:
        return str(error)
    return ""


def relax_schema(schema: Schema, syntax: ArgumentSyntax) -> Iterator[Schema | None]:
    """Yield schemas that allow more than a schema, the strictest first; None for any arguments.

    Args:
        syntax: how the family writes arguments.
    """
    relaxed = _drop_unsupported(schema)
    yield relaxed
    listing = list_arguments(relaxed)
    if syntax != "json":
        yield listing
    # The types are kept: a family writes values of different types differently.
    types = {name: find_allowed_types(part, relaxed) for name, part in get_properties(listing).items()}
    yield {**listing, "properties": {name: {"type": sorted(allowed)} for name, allowed in types.items()}}
    yield None


def find_violation(schema: Schema, arguments: object) -> str:
    """Return the place and the problem where arguments violate a schema; "" if they match it."""
    violation = next(iter(_find_violations(json.dumps(schema), arguments)), "")
    return violation if len(violation) <= _SHOWN else f"{violation[:_SHOWN]}…"


def _find_violations(schema: str, arguments: object) -> Iterator[str]:
    # Arguments that cannot be checked are violations: Python may not support a pattern, or a reference may be
    # broken.
    try:
        for error in _validator(schema).iter_errors(arguments):
            yield f"{error.json_path}: {error.message}"
    except Exception as error:
        yield f"they cannot be checked: {type(error).__name__}: {error}"


@lru_cache(maxsize=256)
def _validator(schema: str) -> Validator:
    """Return the validator of a schema (JSON text).

    Raises:
        ValueError: the text is not a JSON schema.
    """
    # Imported here: only tools whose schema no grammar enforces need it.
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    parsed = json.loads(schema)
    kind = validator_for(parsed, default=Draft202012Validator)
    try:
        kind.check_schema(parsed)
    except SchemaError as error:
        raise ValueError(f"{error.message} (at {error.json_path})") from None
    # The empty registry prevents references to other documents from being fetched.
    validator: Validator = kind(parsed, registry=Registry())
    return validator


def _drop_unsupported(schema: Schema) -> Schema:
    """Return a schema without the keywords that llguidance does not support. It allows what the original allows."""

    def change(node: Schema) -> Schema:
        supported = {key: part for key, part in node.items() if key not in _NOT_ENFORCED}
        pattern = supported.get("pattern")
        if isinstance(pattern, str) and find_enforcement_problem(
            json.dumps({"type": "string", "pattern": pattern})
        ):
            del supported["pattern"]
        if isinstance(supported.get("oneOf"), list):
            either = {"anyOf": supported.pop("oneOf")}
            if "anyOf" not in supported:
                return {**supported, **either}
            all_of = supported.get("allOf")
            return {**supported, "allOf": [*(all_of if isinstance(all_of, list) else []), either]}
        return supported

    relaxed = rewrite_schema(schema, change)
    assert isinstance(relaxed, dict)
    return relaxed
