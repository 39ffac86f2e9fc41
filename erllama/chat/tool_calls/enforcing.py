"""Which schemas of tools a grammar can enforce, what is enforced of the others, and the check of what is not.

A schema that llguidance cannot express, or a family cannot write, is relaxed:
the grammar allows more than the schema, and the arguments are validated with
`jsonschema` after the call is read. `erllama.chat.tool_calls.tools` and
`erllama.chat.families` call this.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from erllama.chat.tool_calls.grammars import Arguments, listing_of, properties_of, types_of
from erllama.engine.grammar.grammar import Grammar
from erllama.engine.grammar.schemas.subschemas import Schema, rewrite_schema
from erllama.engine.grammar.unsupported import NotSupported
from erllama.errors import GrammarError

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

# Keywords that llguidance does not have.
_NOT_ENFORCED = frozenset(
    {
        *("propertyNames", "uniqueItems", "contains", "minContains", "maxContains", "not", "if", "then", "else"),
        *("dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems"),
        *("$dynamicRef", "$recursiveRef"),
    }
)
_SHOWN = 200  # characters of a violation


@lru_cache(maxsize=1024)
def problem_of(schema: str) -> str:
    """Why a schema, as JSON text, cannot be enforced by a grammar; empty where it can."""
    try:
        Grammar.json_schema(schema)
    except GrammarError as error:
        return str(error)
    return ""


@lru_cache(maxsize=1024)
def fault_of(schema: str) -> str:
    """Why no arguments can have a schema, as JSON text; empty where some can, though it may not be enforced."""
    problem = problem_of(schema)
    if not problem:
        return ""
    try:
        _validator(schema)
    except ValueError as error:
        return str(error)
    try:
        Grammar.json_schema(_loosened(json.loads(schema)))
    except NotSupported:
        # Less of it is enforced, and the arguments are validated.
        return ""
    except GrammarError as error:
        return str(error)
    return ""


def relaxations(schema: Schema, kind: Arguments) -> Iterator[Schema | None]:
    """What can be enforced of a schema instead of all of it, the most first; None for any arguments.

    Args:
        kind: how the family writes arguments.
    """
    loosened = _loosened(schema)
    yield loosened
    listing = listing_of(loosened)
    if kind != "json":
        yield listing
    # The types stay: they tell how a family writes a value.
    types = {name: types_of(part, loosened) for name, part in properties_of(listing).items()}
    yield {**listing, "properties": {name: {"type": sorted(found)} for name, found in types.items()}}
    yield None


def violation_of(schema: Schema, arguments: object) -> str:
    """How arguments violate a schema: the place and the problem. Empty where they do not."""
    found = next(iter(_violations(json.dumps(schema), arguments)), "")
    return found if len(found) <= _SHOWN else f"{found[:_SHOWN]}…"


def _violations(schema: str, arguments: object) -> Iterator[str]:
    # A pattern may be none of Python's, a reference may lead to nothing: what cannot be checked is not accepted.
    try:
        for error in _validator(schema).iter_errors(arguments):
            yield f"{error.json_path}: {error.message}"
    except Exception as error:
        yield f"they cannot be checked: {type(error).__name__}: {error}"


@lru_cache(maxsize=256)
def _validator(schema: str) -> Validator:
    """What validates by a schema, as JSON text.

    Raises:
        ValueError: it is none.
    """
    # Loaded for tools that no grammar enforces, and for them alone.
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    found = json.loads(schema)
    kind = validator_for(found, default=Draft202012Validator)
    try:
        kind.check_schema(found)
    except SchemaError as error:
        raise ValueError(f"{error.message} (at {error.json_path})") from None
    # An empty registry: a reference to another place is never fetched.
    validator: Validator = kind(found, registry=Registry())
    return validator


def _loosened(schema: Schema) -> Schema:
    """A schema without what llguidance does not have, in all its parts: it allows all that the schema does."""

    def change(node: Schema) -> Schema:
        found = {key: part for key, part in node.items() if key not in _NOT_ENFORCED}
        pattern = found.get("pattern")
        if isinstance(pattern, str) and problem_of(json.dumps({"type": "string", "pattern": pattern})):
            del found["pattern"]
        if isinstance(found.get("oneOf"), list):
            either = {"anyOf": found.pop("oneOf")}
            if "anyOf" not in found:
                return {**found, **either}
            all_of = found.get("allOf")
            return {**found, "allOf": [*(all_of if isinstance(all_of, list) else []), either]}
        return found

    found = rewrite_schema(schema, change)
    assert isinstance(found, dict)
    return found
