"""Analysis of tools' parameter schemas: which arguments a schema lists, and which types it allows.

All functions are pure and bounded in depth. Grammars, the reader of calls and schema enforcement use them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from erllama.errors import GrammarError

MAX_DEPTH = 100
JSON_TYPES = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})
_COMBINED = (
    *("anyOf", "oneOf", "allOf", "$ref", "if", "not", "dependentSchemas", "patternProperties"),
    *("minProperties", "maxProperties"),
)


def find_allowed_types(schema: object, root: Mapping[str, object]) -> frozenset[str]:
    """Return the JSON types that a schema allows; all types if it allows no type or cannot be analysed.

    Args:
        root: the schema that `$ref` refers to.
    """
    return _types(schema, root, {}, 0) or JSON_TYPES


def get_properties(schema: Mapping[str, object]) -> dict[str, object]:
    """Return a schema's `properties`; {} if it has none."""
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def get_required_names(schema: object) -> set[str]:
    """Return the names in a schema's `required`."""
    required = schema.get("required") if isinstance(schema, dict) else None
    return {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()


def get_choices(schema: object) -> list[object] | None:
    """Return the values that `const` or `enum` allow; None if a schema has neither."""
    if isinstance(schema, Mapping):
        if "const" in schema:
            return [schema["const"]]
        if isinstance(schema.get("enum"), list):
            return list(schema["enum"])
    return None


def is_unquoted(types: frozenset[str]) -> bool:
    """Return whether a listed argument of these types is written without quotes."""
    return bool(types) and types <= {"string", "null"}


def list_arguments(parameters: Mapping[str, object]) -> dict[str, object]:
    """Return an object schema that lists all arguments named anywhere in a schema.

    Only the arguments that are always required are required in the result.
    """
    properties: dict[str, object] = {}
    required: set[str] = set()
    known: set[tuple[str, bool]] = set()

    def collect(node: object, depth: int, *, always: bool) -> None:
        if not isinstance(node, Mapping) or depth > MAX_DEPTH:
            return
        reference = node.get("$ref")
        if isinstance(reference, str) and (reference, always) not in known:
            known.add((reference, always))
            collect(resolve_reference(parameters, reference), depth + 1, always=always)
        for name, part in get_properties(node).items():
            same = name not in properties or properties[name] == part
            properties[name] = part if same else {"anyOf": [properties[name], part]}
        required.update(get_required_names(node) if always else ())
        for key in ("allOf", "anyOf", "oneOf"):
            for part in as_list(node.get(key)):
                collect(part, depth + 1, always=always and key == "allOf")

    collect(parameters, 0, always=True)
    shared = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
    missing: dict[str, object] = {name: {} for name in sorted(required) if name not in properties}
    return {**shared, "type": "object", "properties": {**properties, **missing}, "required": sorted(required)}


def resolve_root(parameters: Mapping[str, object]) -> Mapping[str, object]:
    """Return the schema itself, or the schema that it refers to as a whole."""
    schema: object = parameters
    for _ in range(MAX_DEPTH):
        if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
            break
        schema = resolve_reference(parameters, str(schema["$ref"]))
    return schema if isinstance(schema, Mapping) else {}


def resolve_reference(root: Mapping[str, object], reference: str) -> object:
    """Return the schema that a reference within `root` points to; {} if it points elsewhere."""
    node: object = root
    for part in reference.removeprefix("#").split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(node, Mapping) or part not in node:
            return {}
        node = node[part]
    return node if reference.startswith("#") else {}


def add_definitions(schema: object, root: Mapping[str, object]) -> dict[str, object]:
    """Return a part of a schema as a separate schema, with the definitions of `root`."""
    if schema is True or schema == {}:
        return {}
    if not isinstance(schema, dict):
        raise GrammarError(f"a schema must be an object or true, not {json.dumps(schema)[:40]}")
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return {**shared, **schema}


def get_listed_properties(schema: object) -> dict[str, object]:
    """Return the properties of a schema that lists all its arguments in `properties`.

    Raises:
        GrammarError: the schema combines others, or requires an argument that it does not list.
    """
    if not isinstance(schema, dict):
        return {}
    combined = [key for key in _COMBINED if key in schema]
    missing = get_required_names(schema) - set(get_properties(schema))
    if combined or missing:
        what = f"{combined[0]!r} in them" if combined else f"{min(missing)!r} is required and not listed"
        raise GrammarError(f"this model writes arguments one by one, and the parameters do not list them: {what}")
    # A property whose schema is false must be absent.
    return {name: part for name, part in get_properties(schema).items() if part is not False}


def as_list(value: object) -> list[object]:
    """Return a list as it is, and [] for any other value."""
    return value if isinstance(value, list) else []


def _types(
    schema: object, root: Mapping[str, object], known: dict[str, frozenset[str]], depth: int
) -> frozenset[str]:
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return JSON_TYPES

    def parts(key: str) -> list[frozenset[str]]:
        return [_types(part, root, known, depth + 1) for part in as_list(schema.get(key))]

    types = JSON_TYPES
    if "type" in schema:
        declared = schema["type"]
        types &= {type_ for type_ in as_list(declared) or [declared] if isinstance(type_, str)}
    choices = get_choices(schema)
    if choices is not None:
        types &= frozenset(map(_type_of, choices))
    for key in ("anyOf", "oneOf"):
        if key in schema:
            types &= frozenset().union(*parts(key))
    for part_types in parts("allOf"):
        types &= part_types
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference not in known:
            # A reference to itself adds no type, so it counts as none while it is resolved.
            known[reference] = frozenset()
            known[reference] = _types(resolve_reference(root, reference), root, known, depth + 1)
        types &= known[reference]
    return types


def _type_of(value: object) -> str:
    for type_, name in ((bool, "boolean"), (str, "string"), (int, "integer"), (float, "number"), (list, "array")):
        if isinstance(value, type_):
            return name
    return "object" if isinstance(value, Mapping) else "null"
