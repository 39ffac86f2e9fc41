"""Grammar of Gemma's argument values, which differ from JSON in strings and keys.

`call_grammar` uses `GemmaWriter` for formats whose arguments are "gemma".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from erllama.chat.tool_calls.literals import GEMMA_KEY, GEMMA_QUOTE
from erllama.chat.tool_calls.parameter_schemas import (
    JSON_TYPES,
    as_list,
    find_allowed_types,
    get_choices,
    get_listed_properties,
    get_properties,
    get_required_names,
    is_unquoted,
    resolve_reference,
)
from erllama.chat.tool_calls.rule_writer import RuleWriter, is_quoted, quote
from erllama.errors import GrammarError

# Keywords that the grammar of Gemma's values does not enforce.
_NOT_ENFORCED = ("prefixItems", "patternProperties", "minProperties", "maxProperties")
# Keywords that are enforced only if no other keyword restricts the value.
_ALTERNATIVES = ("$ref", "anyOf", "oneOf", "const", "enum")
_NUMBER_LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_LIMITS = (
    *(*_NUMBER_LIMITS, "minLength", "maxLength", "pattern", "minItems", "maxItems", "items"),
    *("properties", "required", "additionalProperties"),
)


class GemmaWriter:
    """Writes the expressions of Gemma's values with a `RuleWriter`."""

    def __init__(self, rules: RuleWriter) -> None:
        self._rules = rules
        # Names of the rules of `$ref` targets; "" for any value.
        self._targets: dict[str, str] = {}

    def write_entries(self, schema: object, root: dict[str, object]) -> str:
        """Return the expression of an object's keys and values, without its braces."""
        entries = {
            name: f"{self._key(name)} {self._value(part, root)}"
            # The family's templates order keys in this way, so its models have seen this order.
            for name, part in sorted(get_listed_properties(schema).items(), key=lambda entry: entry[0].lower())
        }
        return self._rules.write_separated(entries, get_required_names(schema), self._rules.literal(","))

    def write_any_entries(self) -> str:
        """Return the expression of any keys and values, without braces."""
        entry = f'{self._rules.add_terminal("/[A-Za-z_][A-Za-z0-9_]*/")} ":" {self._any_value()}'
        return f'({entry} ("," {entry})*)?'

    def _value(self, schema: object, root: dict[str, object]) -> str:
        if not isinstance(schema, Mapping):
            return self._any_value()
        _check_enforceable(schema, find_allowed_types(schema, root))
        reference = schema.get("$ref")
        if isinstance(reference, str):
            # One rule for each target, since a schema may refer to itself.
            if reference not in self._targets:
                self._targets[reference] = name = f"g{len(self._targets)}"
                self._rules.add_named_rule(name, self._value(resolve_reference(root, reference), root))
            return self._targets[reference]
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return self._rules.add_rule(*(self._value(part, root) for part in as_list(schema[key])))
        choices = get_choices(schema)
        if choices is not None:
            return self._rules.add_rule(*map(self._constant, choices))
        types = find_allowed_types(schema, root)
        if types == JSON_TYPES:
            return self._any_value()
        return self._rules.add_rule(*(self._value_of_type(type_, schema, root) for type_ in sorted(types)))

    def _any_value(self) -> str:
        if "" not in self._targets:
            self._targets[""] = name = "g_any"
            scalars = [self._value_of_type(type_, {}, {}) for type_ in ("string", "number", "boolean", "null")]
            self._rules.add_named_rule(name, " | ".join([*scalars, self._array(name), self._object(name)]))
        return self._targets[""]

    def _value_of_type(self, type_: str, schema: Mapping[str, object], root: dict[str, object]) -> str:
        if type_ == "string":
            text = self._rules.write_unquoted({**schema, "type": "string"}, root, "", GEMMA_QUOTE)
            return f"{self._rules.literal(GEMMA_QUOTE)} {text}"
        if type_ == "array":
            item = self._value(schema.get("items"), root)
            return self._array(item, schema.get("minItems", 0), schema.get("maxItems"))
        if type_ == "object":
            others = schema.get("additionalProperties")
            if get_properties(schema) or others is False:
                return f'"{{" {self.write_entries(schema, root)} "}}"'
            return self._object(self._value(others, root))
        limits = {key: value for key, value in schema.items() if key in _NUMBER_LIMITS}
        return self._rules.write_json({"type": type_, **limits})

    def _array(self, item: str, min_items: object = 0, max_items: object = None) -> str:
        if (
            not isinstance(min_items, int)
            or not isinstance(max_items, int | None)
            or (max_items is not None and max_items < min_items)
        ):
            raise GrammarError("minItems and maxItems must be integers, and minItems must not exceed maxItems")
        if max_items == 0:
            return '"[" "]"'
        repeats = f"{{{max(min_items - 1, 0)},{'' if max_items is None else max_items - 1}}}"
        rest = f"({self._rules.literal(',')} {item}){repeats}"
        if max_items == 1:
            rest = ""
        filled = f'"[" {item} {rest} "]"'
        return filled if min_items else f'({filled} | "[" "]")'

    def _object(self, value: str) -> str:
        pair = f'{self._rules.add_terminal("/[A-Za-z_][A-Za-z0-9_]*/")} ":" {value}'
        return f'("{{" "}}" | "{{" {pair} ("," {pair})* "}}")'

    def _constant(self, value: object) -> str:
        if isinstance(value, str):
            return self._string(value)
        if isinstance(value, list):
            return _joined("[", map(self._constant, value), "]")
        if isinstance(value, Mapping):
            keys = sorted(map(str, value), key=str.lower)
            return _joined("{", (f"{self._key(key)} {self._constant(value[key])}" for key in keys), "}")
        return quote(json.dumps(value))

    def _string(self, text: str) -> str:
        if GEMMA_QUOTE in text:
            raise GrammarError(f"this model cannot write {text!r:.60}, which contains its quote {GEMMA_QUOTE!r}")
        mark = self._rules.literal(GEMMA_QUOTE)
        if is_quoted(mark):
            return quote(f"{GEMMA_QUOTE}{text}{GEMMA_QUOTE}")
        return f"{mark} {quote(text)} {mark}" if text else f"{mark} {mark}"

    def _key(self, name: str) -> str:
        return quote(f"{name}:") if GEMMA_KEY.fullmatch(name) else f'{self._string(name)} ":"'


def _check_enforceable(schema: Mapping[str, object], types: frozenset[str]) -> None:
    """Raise GrammarError for a schema that the grammar of Gemma's values would enforce only in part."""
    unknown = [key for key in _NOT_ENFORCED if key in schema]
    if isinstance(schema.get("items"), list):
        unknown.append("items")
    if "allOf" in schema and not is_unquoted(types):
        unknown.append("allOf")
    alternatives = [key for key in _ALTERNATIVES if key in schema]
    if alternatives:
        unknown += [key for key in (*alternatives[1:], *_LIMITS) if key in schema]
    if unknown:
        raise GrammarError(f"the grammar of this model's values cannot enforce {unknown[0]!r} here")


def _joined(begin: str, entries: Iterable[str], end: str) -> str:
    """Return expressions separated by commas, in brackets."""
    return " ".join([quote(begin), ' "," '.join(entries), quote(end)])
