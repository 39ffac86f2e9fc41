"""The JSON schema that a reply follows, in the two forms of OpenAI's APIs."""

from __future__ import annotations

from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError


def read_format(format: Json | None, where: str, within: str | None = None) -> Json | None:
    """Return the JSON schema of a format of type text, json_object or json_schema; None for text.

    A json_object may have a `schema`, as llama-server allows.

    Args:
        where: path of the field, for errors.
        within: name of the object that holds the schema of a json_schema; None for the format itself.

    Raises:
        ApiError: its type is unknown, or it has no schema.
    """
    kind = "text" if format is None else format.get("type")
    if format is None or kind == "text":
        return None
    declared = format.get(within) if within is not None else None
    schema = declared.get("schema") if isinstance(declared, dict) else format.get("schema")
    if kind == "json_object":
        schema = format.get("schema", {"type": "object"})
        if isinstance(schema, dict):
            return schema
        raise ApiError(
            "invalid_request", f"{where}.schema is {schema!r:.60}; send a JSON schema", param=f"{where}.schema"
        )
    if kind != "json_schema":
        where = f"{where}.type"
        message = f"{where} is {kind!r:.60}; it takes text, json_object and json_schema"
        raise ApiError("invalid_request", message, param=where)
    if not isinstance(schema, dict):
        where = f"{where}.{within}.schema" if within is not None else f"{where}.schema"
        raise ApiError("invalid_request", f"{where} is missing; send a JSON schema", param=where)
    return schema
