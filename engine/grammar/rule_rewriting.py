"""The rewriting of grammar rules: loops for tail recursion, and definitions for references.

Both keep the language and leave fewer recursive rules, so that more of a grammar fits into terminals. Called by
`engine.grammar.lark_writer`.
"""

from __future__ import annotations

from erllama.engine.grammar.expressions import (
    ExpressionKind,
    ExpressionPool,
    reachable_rules,
    referenced_rules,
    strongly_connected_components,
)
from erllama.engine.grammar.terminals import fits_terminal

# Characters of rules that are inlined. In a chain of rules, each rule contains all that follow.
_MAX_INLINED = 200_000


def eliminate_tail_recursion(pool: ExpressionPool, rules: dict[str, int]) -> dict[str, int]:
    """Rewrite `x ::= x a | b x | c` as `x ::= b* c a*`: the same language without recursion."""
    changed = {}
    for name, id in rules.items():
        itself = pool.reference(name)
        options = pool[id].parts if pool[id].kind is ExpressionKind.CHOICE else (id,)
        before: list[int] = []
        after: list[int] = []
        others: list[int] = []
        for option in options:
            parts = pool[option].parts if pool[option].kind is ExpressionKind.SEQUENCE else (option,)
            if parts == (itself,):
                continue
            if parts and parts[0] == itself and parts[-1] == itself:
                # The rule recurs at both ends, so no loop replaces it.
                others = [id]
                before = after = []
                break
            if parts and parts[0] == itself:
                after.append(pool.sequence(parts[1:]))
            elif parts and parts[-1] == itself:
                before.append(pool.sequence(parts[:-1]))
            else:
                others.append(option)
        loops = [pool.repeat(pool.choice(loop), 0, None) if loop else pool.empty_text for loop in (before, after)]
        changed[name] = pool.sequence([loops[0], pool.choice(others), loops[1]])
    return changed


def inline_rules(pool: ExpressionPool, rules: dict[str, int], root: str) -> dict[str, int]:
    """Replace references to rules without recursion by their definitions, and return the remaining rules."""
    names = list(rules)
    number = {name: at for at, name in enumerate(names)}
    calls = {number[name]: [number[other] for other in referenced_rules(pool, id)] for name, id in rules.items()}
    definitions: dict[int, int] = {}
    remaining: dict[str, int] = {}
    inlined = 0
    for component in strongly_connected_components(calls):
        recursive = len(component) > 1 or component[0] in calls[component[0]]
        for at in component:
            id = _substitute(pool, rules[names[at]], definitions)
            alias = pool[id].kind in (ExpressionKind.REFERENCE, ExpressionKind.TOKEN)
            fits = pool[id].regular and fits_terminal(pool, id) and inlined <= _MAX_INLINED
            if names[at] != root and not recursive and (alias or fits):
                inlined += pool[id].size
                definitions[pool.reference(names[at])] = id
            else:
                remaining[names[at]] = id
    return reachable_rules(pool, remaining, root)


def _substitute(pool: ExpressionPool, id: int, definitions: dict[int, int]) -> int:
    new: dict[int, int] = {}
    for part in pool.descendants(id):
        if part in definitions:
            new[part] = definitions[part]
        else:
            new[part] = pool.rebuild(part, [new[inner] for inner in pool[part].parts])
    return new[id]
