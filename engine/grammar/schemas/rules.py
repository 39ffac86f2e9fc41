"""JSON schemas that llguidance would change or refuse, as rules of Lark.

llguidance reads the numbers of a schema as doubles and changes integers beyond 2**53. This module writes rules for
the parts of a schema that have such numbers and for the parts that lead to them, with patterns from
`number_patterns`. It also writes rules for parts that refer to themselves and that a value must match together,
which llguidance would combine without end. All other parts stay schemas within the rules, and llguidance compiles
them. Keywords have the same meaning as in llguidance. The few that are not supported in these rules raise an error
that names them.

Called by `engine.grammar.schemas.json_schema`, which has checked the form of the schema.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from erllama.engine.grammar.schemas.keywords import (
    ANNOTATIONS,
    LOWER,
    NUMBERS,
    SIMPLE,
    TEXTS,
    UNSUPPORTED,
    UPPER,
    bounds_of,
    count_of,
    has_large_numbers,
    is_beyond_doubles,
    items_of,
    listed_values,
    lists_numbers_or_containers,
    properties_of,
    references_in,
    required_by,
    schemas_of,
    step_of,
    types_of,
    unsupported_error,
    without,
)
from erllama.engine.grammar.schemas.lark_rules import (
    JSON_STRING,
    Body,
    LarkFragment,
    Repetition,
    format_sequence,
    productive_rules,
    quoted_name,
    reachable,
)
from erllama.engine.grammar.schemas.number_patterns import NumberRange, number_patterns
from erllama.engine.grammar.schemas.one_of import check_exclusive
from erllama.engine.grammar.unsupported import EndlessIntersection, NotSupported
from erllama.errors import GrammarError

_MAX_RULES = 4000
_DEFINITIONS = ("#/$defs/", "#/definitions/")

# Schemas that a value must match together, by their numbers in `SchemaWriter._schemas`.
Conjunction = tuple[int, ...]


class SchemaWriter:
    """Writes one schema as rules.

    Args:
        root: the schema that references point into.
        prefix: the prefix of the names of rules, in lower case. It separates several schemas in one grammar.
        whitespace: a regular expression of the white space between the parts of the JSON.
        unsatisfiable: whether no JSON matches a schema that llguidance compiles; raises EndlessIntersection for one
            that it cannot combine.
        target: the target of a reference in `root`; None if it is unknown.
    """

    def __init__(
        self,
        root: dict[str, object],
        prefix: str,
        *,
        whitespace: str,
        unsatisfiable: Callable[[dict[str, object]], bool],
        target: Callable[[str], object],
    ) -> None:
        self._root, self._prefix, self._whitespace = root, prefix, whitespace
        self._unsatisfiable, self._target = unsatisfiable, target
        self._schemas: list[dict[str, object]] = []
        self._ids: dict[int, int] = {}
        self._derived: dict[tuple[int, str], int] = {}
        self._names: dict[Conjunction, str] = {}
        self._bodies: dict[str, Body] = {}
        self._open: list[tuple[str, Conjunction]] = []
        self._terminals: dict[str, str] = {}
        self._far = self._far_references()

    def to_lark(self) -> LarkFragment:
        """Return the schema in Lark.

        Raises:
            NotSupported: a keyword is not supported here, or takes too many rules.
            GrammarError: no JSON matches the schema.
        """
        start = self._rule([self._root])
        while self._open:
            name, conjunction = self._open.pop()
            self._bodies[name] = self._body(conjunction)
            if len(self._names) + len(self._bodies) > 2 * _MAX_RULES:
                raise NotSupported(
                    f"the schema has integers beyond 2**53 and takes more than {_MAX_RULES} rules; "
                    "use fewer combinations of anyOf, oneOf and allOf"
                )
        bodies = productive_rules(self._bodies)
        if start not in bodies:
            raise GrammarError("no JSON matches the schema: its keywords contradict each other")
        used = reachable(bodies, start)
        lines = [f"{name}: {' | '.join(map(format_sequence, bodies[name]))}" for name in used if name in bodies]
        lines += [f"{name}: {text}" for text, name in self._terminals.items() if name in used]
        return LarkFragment(start, lines)

    # --- parts that llguidance compiles

    def _far_references(self) -> set[str]:
        """Return the references that a schema within a rule cannot include.

        They lead to large numbers, or to places outside of the definitions.
        """
        needs = {reference: references_in(self._target(reference)) for reference in self._all_references()}
        far = {
            reference
            for reference in needs
            if not reference.startswith(_DEFINITIONS) or has_large_numbers(self._target(reference))
        }
        # Indexed by the needed reference, so that each dependency is visited once.
        users: dict[str, list[str]] = {}
        for reference, needed in needs.items():
            for other in needed:
                users.setdefault(other, []).append(reference)
        pending = list(far)
        while pending:
            for user in users.get(pending.pop(), ()):
                if user not in far:
                    far.add(user)
                    pending.append(user)
        return far

    def _all_references(self) -> set[str]:
        found: set[str] = set()
        pending = list(references_in(self._root))
        while pending:
            reference = pending.pop()
            if reference not in found:
                found.add(reference)
                pending += references_in(self._target(reference))
        return found

    def _is_near(self, schema: dict[str, object]) -> bool:
        return not has_large_numbers(without(schema, ANNOTATIONS)) and not (references_in(schema) & self._far)

    def _llguidance_body(self, conjunction: Sequence[dict[str, object]]) -> Body:
        """Return a part that llguidance compiles; empty if no JSON matches it."""
        plain = [without(schema, ANNOTATIONS) for schema in conjunction]
        whole: dict[str, object] = dict(plain[0]) if len(plain) == 1 else {"allOf": plain}
        if "$schema" in self._root:
            whole["$schema"] = self._root["$schema"]
        for key in ("$defs", "definitions"):
            needed = self._definitions(whole, key)
            if needed:
                whole[key] = needed
        whole["x-guidance"] = {"whitespace_pattern": self._whitespace}
        return [] if self._unsatisfiable(whole) else [[f"%json {json.dumps(whole)}"]]

    def _definitions(self, schema: dict[str, object], key: str) -> dict[str, object]:
        found: dict[str, object] = {}
        defined = self._root.get(key)
        pending = list(references_in(schema))
        done: set[str] = set()
        while pending and isinstance(defined, dict):
            reference = pending.pop()
            if reference in done:
                continue
            done.add(reference)
            if reference.startswith(f"#/{key}/"):
                name = reference.split("/")[2].replace("~1", "/").replace("~0", "~")
                if name in defined:
                    found[name] = defined[name]
                    pending += references_in(defined[name])
            else:
                pending += references_in(self._target(reference))
        return found

    # --- rules

    def _rule(self, schemas: Iterable[object]) -> str:
        """Return the name of the rule for the values that match all schemas."""
        found: dict[int, None] = {}
        for schema in schemas:
            if schema is True:
                continue
            if schema is False:
                return self._add_rule("no", [])
            if not isinstance(schema, dict):
                raise GrammarError(f"a schema is an object or a boolean, not {json.dumps(schema)[:40]}")
            found[self._id(schema)] = None
        conjunction = tuple(found)
        if conjunction not in self._names:
            name = self._names[conjunction] = f"{self._prefix}{len(self._names)}"
            self._open.append((name, conjunction))
        return self._names[conjunction]

    def _add_rule(self, suffix: str, body: Body) -> str:
        name = f"{self._prefix}{suffix}"
        self._bodies[name] = body
        return name

    def _id(self, schema: dict[str, object]) -> int:
        if id(schema) not in self._ids:
            self._ids[id(schema)] = len(self._schemas)
            # Kept here, so that no other object gets the same id().
            self._schemas.append(schema)
        return self._ids[id(schema)]

    def _without_keywords(self, schema: dict[str, object], keys: Sequence[str]) -> dict[str, object]:
        """Return a schema without some keywords; the same object each time, so that there are few conjunctions."""
        if not any(key in schema for key in keys):
            return schema
        key = (self._id(schema), " ".join(keys))
        if key not in self._derived:
            self._derived[key] = self._id(without(schema, keys))
        return self._schemas[self._derived[key]]

    def _body(self, conjunction: Conjunction) -> Body:
        schemas = [self._schemas[id] for id in conjunction]
        if all(map(self._is_near, schemas)):
            with suppress(EndlessIntersection):  # the rules below refer to each other instead
                return self._llguidance_body(schemas or [{}])
        parts = self._flatten(schemas)
        if parts is None:
            return []
        for key in ("anyOf", "oneOf"):
            at = next((at for at, part in enumerate(parts) if key in part), None)
            if at is not None:
                options = schemas_of(parts[at], key)
                if len(options) > _MAX_RULES:
                    raise NotSupported(
                        f"{key} has {len(options)} options, in or beside them integers beyond 2**53; "
                        f"at most {_MAX_RULES} are supported: use fewer options, or a list of constants as enum"
                    )
                if key == "oneOf":
                    check_exclusive(options, self._flatten)
                others = [*parts[:at], self._without_keywords(parts[at], [key]), *parts[at + 1 :]]
                return [[self._rule([*others, option])] for option in options]
        at = next((at for at, part in enumerate(parts) if lists_numbers_or_containers(part)), None)
        if at is not None:
            others = [*parts[:at], self._without_keywords(parts[at], ["const", "enum"]), *parts[at + 1 :]]
            return [[self._rule([*others, *value])] for value in listed_values(parts[at])]
        return self._body_by_type(parts)

    def _flatten(self, schemas: Iterable[object]) -> list[dict[str, object]] | None:
        """Return the schemas with allOf and references expanded into the list; None if one of them is false."""
        pending: deque[object] = deque(schemas)
        found: dict[int, dict[str, object]] = {}
        done: set[int] = set()
        while pending:
            schema = pending.popleft()
            if schema is False:
                return None
            if schema is True or id(schema) in done:
                continue
            if not isinstance(schema, dict):
                raise GrammarError(f"a schema is an object or a boolean, not {json.dumps(schema)[:40]}")
            done.add(id(schema))
            self._id(schema)
            for key in schema:
                if key in UNSUPPORTED:
                    raise unsupported_error(key)
            plain = self._without_keywords(schema, ["$ref", "allOf"])
            found[id(plain)] = plain
            inner = schemas_of(schema, "allOf") if "allOf" in schema else []
            if "$ref" in schema:
                inner = [self._resolve(schema["$ref"]), *inner]
            pending.extendleft(reversed(inner))
        return list(found.values())

    def _resolve(self, reference: object) -> object:
        found = self._target(reference) if isinstance(reference, str) else None
        if found is None:
            raise GrammarError(f"the reference {json.dumps(reference)[:80]} has no target in the schema")
        return found

    # --- values by their types

    def _body_by_type(self, parts: list[dict[str, object]]) -> Body:
        types = types_of(parts)
        simple = types & SIMPLE
        numeric = types & {"integer", "number"}
        if numeric and not any(is_beyond_doubles(part.get(key)) for part in parts for key in (*LOWER, *UPPER)):
            simple, numeric = simple | numeric, frozenset()
        body: Body = self._simple(parts, simple) if simple else []
        if any("enum" in part for part in parts):
            # Only strings remain in it.
            return body
        if numeric:
            body += self._numbers(parts, integer="number" not in numeric)
        if "array" in types:
            body += self._array(parts)
        if "object" in types:
            body += self._object(parts)
        return body

    def _simple(self, parts: list[dict[str, object]], types: frozenset[str]) -> Body:
        keys = (*TEXTS, "enum", *(NUMBERS if types - SIMPLE else ()))
        kept = [kept for part in parts if (kept := {key: part[key] for key in keys if key in part})]
        return self._llguidance_body([{"type": sorted(types)}, *kept])

    def _numbers(self, parts: list[dict[str, object]], *, integer: bool) -> Body:
        lows = [bound for part in parts for bound in bounds_of(part, *LOWER)]
        highs = [bound for part in parts for bound in bounds_of(part, *UPPER)]
        # Of two bounds of the same value, the exclusive one is stricter.
        low = max(lows, key=lambda bound: (bound.value, bound.exclusive), default=None)
        high = min(highs, key=lambda bound: (bound.value, not bound.exclusive), default=None)
        steps = tuple(step_of(part["multipleOf"]) for part in parts if "multipleOf" in part)
        found = number_patterns(NumberRange(low, high, integer, steps))
        return [[self._terminal(" & ".join(f"/{pattern}/" for pattern in patterns))] for patterns in found]

    def _array(self, parts: list[dict[str, object]]) -> Body:
        shapes = [items_of(part) for part in parts]
        minimum = max(count_of(part, "minItems", 0) or 0 for part in parts)
        maxima = [maximum for part in parts if (maximum := count_of(part, "maxItems", None)) is not None]
        maximum = min(maxima, default=None)
        if maximum is not None and maximum < minimum:
            return []
        n_first = max(len(first) for first, _ in shapes)
        if maximum is not None:
            n_first = min(n_first, maximum)
        first = [
            self._rule(first[at] if at < len(first) else rest for first, rest in shapes) for at in range(n_first)
        ]
        rest = self._rule(rest for _, rest in shapes)
        name = self._new_rule()
        space = self._space()
        for at in range(n_first):
            separator: list[str | Repetition] = [space, '","', space] if at else []
            end: Body = [[space, '"]"'] if at else ['"]"']] if at >= minimum else []
            self._bodies[f"{name}_{at}"] = [[*separator, first[at], f"{name}_{at + 1}"], *end]
        self._bodies[f"{name}_{n_first}"] = self._remaining_items(rest, n_first, minimum, maximum)
        return [['"["', space, f"{name}_0"]]

    def _remaining_items(self, item: str, written: int, minimum: int, maximum: int | None) -> Body:
        """Return the rule of the remaining items, which share a schema, and of the end of the array."""
        space = self._space()
        left, right = max(minimum - written, 0), None if maximum is None else maximum - written
        end: list[str | Repetition] = [space, '"]"']
        another = self._new_rule()
        self._bodies[another] = [[space, '","', space, item]]
        if written:
            return [[Repetition(another, left, right), *end]] if right != 0 else [end]
        empty: Body = [['"]"']] if minimum == 0 else []
        some: Body = [[item, Repetition(another, max(left - 1, 0), None if right is None else right - 1), *end]]
        return [*empty, *(some if right != 0 else [])]

    def _object(self, parts: list[dict[str, object]]) -> Body:
        for part in parts:
            if part.get("patternProperties"):
                raise unsupported_error("patternProperties")
        required = list(dict.fromkeys(name for part in parts for name in required_by(part)))
        listed = [name for part in parts for name in properties_of(part)]
        names = list(dict.fromkeys([*listed, *required]))
        minimum = max(count_of(part, "minProperties", 0) or 0 for part in parts)
        maxima = [maximum for part in parts if (maximum := count_of(part, "maxProperties", None)) is not None]
        maximum = min(maxima, default=None)
        n = len(required)
        if len(names) > n and (minimum > n or maximum is not None):
            raise unsupported_error("minProperties" if minimum > n else "maxProperties")
        if maximum is not None and maximum < max(minimum, n):
            return []
        name = self._new_rule()
        self._entries(name, parts, names, frozenset(required))
        self._others(name, parts, names, max(minimum - n, 0), None if maximum is None else maximum - n)
        return [['"{"', self._space(), f"{name}_a0"]]

    def _entries(self, name: str, parts: list[dict[str, object]], names: list[str], needed: frozenset[str]) -> None:
        """Add the rules of the listed properties: `name`_aN before the first one written, `name`_bN after one."""
        space = self._space()
        comma: list[str | Repetition] = [space, '","', space]
        for at, key in enumerate(names):
            value = self._rule(
                properties_of(part).get(key, part.get("additionalProperties", True)) for part in parts
            )
            entry = [self._terminal(f"/{quoted_name(key)}/"), space, '":"', space, value, f"{name}_b{at + 1}"]
            for written in "ab":
                skipped: Body = [] if key in needed else [[f"{name}_{written}{at + 1}"]]
                self._bodies[f"{name}_{written}{at}"] = [[*(comma if written == "b" else []), *entry], *skipped]

    def _others(
        self, name: str, parts: list[dict[str, object]], taken: list[str], minimum: int, maximum: int | None
    ) -> None:
        """Add the rules of the additional properties and of the end of the object, after those of `_entries`."""
        space, pair, another = self._space(), self._new_rule(), self._new_rule()
        value = self._rule(part.get("additionalProperties", True) for part in parts)
        self._bodies[pair] = [[self._key(taken), space, '":"', space, value]]
        self._bodies[another] = [[space, '","', space, pair]]
        end: list[str | Repetition] = [space, '"}"']
        self._bodies[f"{name}_b{len(taken)}"] = [[Repetition(another, minimum, maximum), *end]]
        tail = Repetition(another, max(minimum - 1, 0), None if maximum is None else maximum - 1)
        none: Body = [] if minimum else [['"}"']]
        some: Body = [] if maximum == 0 else [[pair, tail, *end]]
        self._bodies[f"{name}_a{len(taken)}"] = [*none, *some]

    def _key(self, taken: Sequence[str]) -> str:
        if not taken:
            return self._terminal(JSON_STRING)
        names = "|".join(map(quoted_name, taken))
        return self._terminal(f"{JSON_STRING} & ~/(?:{names})/")

    # --- symbols

    def _new_rule(self) -> str:
        name = f"{self._prefix}{len(self._bodies)}x"
        self._bodies[name] = []
        return name

    def _space(self) -> str:
        name = f"{self._prefix}ws"
        if name not in self._bodies:
            self._bodies[name] = [[], [self._terminal(f"/{self._whitespace}/")]]
        return name

    def _terminal(self, expression: str) -> str:
        return self._terminals.setdefault(expression, f"{self._prefix}t{len(self._terminals)}".upper())
