"""From the text of a chat template to code that runs on a `Machine`.

jinja2 parses and compiles; what is done here is to bound both, by counting what
is parsed and how deep it nests, to admit the statements and expressions that
chat templates have and no others, and to write calls of the machine around
those that the generated code would else do by itself: loops, comparisons,
slices, and lists that are written out. Nothing of a template is evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from io import StringIO
from types import CodeType
from typing import Final, NamedTuple, cast

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import TemplateRuntimeError, TemplateSyntaxError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.idtracking import VAR_LOAD_RESOLVE
from jinja2.parser import Parser
from jinja2.runtime import Undefined, identity
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import missing
from jinja2.visitor import NodeTransformer

from erllama.chat.templates.filters import TABLES
from erllama.chat.templates.limits import MAX_INT_BITS, LimitExceeded, Namespace
from erllama.chat.templates.methods import FUNCTIONS

# Characters of a template: the longest there are have some twenty thousand.
MAX_SOURCE: Final = 256 << 10
# Nodes of its syntax tree: the largest there are have some 1,300. In the worst case jinja2 takes a time that
# grows with the square of it: a second or two, at this number.
MAX_NODES: Final = 12_000
# How deep expressions and statements nest. Python nests brackets to 200, jinja2 works by recursion.
MAX_NESTING: Final = 80
# Digits of a number.
_LONG_NUMBER = re.compile(r"[0-9][0-9_]{1000}")

# The generated code's file, by which its frames are known in a traceback.
FILENAME: Final = "<chat template>"

_ADMITTED: Final = frozenset(
    {
        nodes.Add, nodes.And, nodes.Assign, nodes.AssignBlock, nodes.Break, nodes.Call, nodes.CallBlock,
        nodes.Compare, nodes.Concat, nodes.CondExpr, nodes.Const, nodes.Continue, nodes.Dict, nodes.Div,
        nodes.EnvironmentAttribute, nodes.Filter, nodes.FilterBlock, nodes.FloorDiv, nodes.For, nodes.Getattr,
        nodes.Getitem, nodes.If, nodes.Keyword, nodes.List, nodes.Macro, nodes.Mod, nodes.Mul, nodes.NSRef,
        nodes.Name, nodes.Neg, nodes.Not, nodes.Operand, nodes.Or, nodes.Output, nodes.Pair, nodes.Pos, nodes.Pow,
        nodes.Slice, nodes.Sub, nodes.Template, nodes.TemplateData, nodes.Test, nodes.Tuple, nodes.With,
    }
)  # fmt: skip


class TemplateCode(NamedTuple):
    """A compiled template.

    Attributes:
        root: the code of a generator function of (context, missing, environment).
        names: what that code finds besides what a machine gives it.
        lines: (line of the code, line of the template), descending.
        reads: names of variables that it looks up where the caller's are.
    """

    root: CodeType
    names: Mapping[str, object]
    lines: tuple[tuple[int, int], ...]
    reads: frozenset[str]


class _Generation(Extension):
    """`{% generation %}`: marks what the model writes, for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = nodes.Call(nodes.EnvironmentAttribute("generation"), [], [], None, None)
        return nodes.CallBlock(call, [], [], body).set_lineno(line)


class _Parser(Parser):
    """jinja2's, which works by recursion, with its depth and its work counted at each way back into itself."""

    _depth = 0
    _count = 0

    def _enter(self) -> None:
        # A bracket passes here three times, an expression twice.
        self._depth += 1
        self._count += 1
        if self._depth > 3 * MAX_NESTING or self._count > 3 * MAX_NODES:
            self.fail(_too_much(self._depth), self.stream.current.lineno)

    def parse_statement(self) -> nodes.Node | list[nodes.Node]:
        self._enter()
        parsed = super().parse_statement()
        self._depth -= 1
        return parsed

    def parse_condexpr(self) -> nodes.Expr:
        self._enter()
        parsed = super().parse_condexpr()
        self._depth -= 1
        return parsed

    def parse_not(self) -> nodes.Expr:
        self._enter()
        parsed = super().parse_not()
        self._depth -= 1
        return parsed

    def parse_unary(self, with_filter: bool = True) -> nodes.Expr:
        self._enter()
        parsed = super().parse_unary(with_filter)
        self._depth -= 1
        return parsed


class _Generator(CodeGenerator):
    """jinja2's, which evaluates nothing and keeps the names of the variables that are looked up."""

    reads: set[str]

    def enter_frame(self, frame: Frame) -> None:
        self.reads.update(name for action, name in frame.symbols.loads.values() if action == VAR_LOAD_RESOLVE)
        super().enter_frame(frame)

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: CodeGenerator._FinalizeInfo) -> str:
        if isinstance(node, nodes.TemplateData):
            return node.data
        raise nodes.Impossible


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})
    intercepted_unops = frozenset({"+", "-"})


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension])
    environment.filters = dict(TABLES.filters)
    environment.tests = dict(TABLES.tests)
    return environment


_ENVIRONMENT: Final = _environment()


class _Hooks(NodeTransformer):
    """Writes the machine's hooks into a tree, from its leaves up."""

    def visit(self, node: nodes.Node, *args: object, **kwargs: object) -> nodes.Node:
        self.generic_visit(node)
        rewrite = _REWRITES.get(type(node))
        return rewrite(node) if rewrite else node


def _count_loop(node: nodes.For) -> nodes.Node:
    # What the body may do without asking the machine, and the texts that it may lay by.
    size = sum(1 for part in (*node.body, *node.else_) for _ in part.find_all(nodes.Node))
    texts = sum(len(output.nodes) for output in node.find_all(nodes.Output))
    node.iter = _hook("(each)", node.iter, nodes.Const(1 + size // 8), nodes.Const(8 * texts))
    return node


def _pay_comparison(node: nodes.Compare) -> nodes.Node:
    # What is compared with a word of the template's own is soon found to be another.
    sides = [node.expr, *(operand.expr for operand in node.ops)]
    if len(node.ops) == 1 and node.ops[0].op in ("eq", "ne") and any(isinstance(s, nodes.Const) for s in sides):
        return node
    node.expr = _paid("(operand)", node.expr)
    for operand in node.ops:
        hook = "(container)" if operand.op in ("in", "notin") else "(operand)"
        operand.expr = _paid(hook, operand.expr)
    return node


def _pay_slice(node: nodes.Getitem) -> nodes.Node:
    if not isinstance(node.arg, nodes.Slice):
        return node
    bounds = [bound or nodes.Const(None) for bound in (node.arg.start, node.arg.stop, node.arg.step)]
    return _hook("(slice)", node.node, *bounds)


def _pay_key(node: nodes.Pair) -> nodes.Node:
    node.key = _paid("(key)", node.key)
    return node


def _pay_literal(node: nodes.Expr) -> nodes.Node:
    return node if getattr(node, "ctx", "load") == "store" else _hook("(built)", node)


_REWRITES: Final[Mapping[type[nodes.Node], Callable[..., nodes.Node]]] = {
    nodes.Compare: _pay_comparison,
    nodes.Dict: _pay_literal,
    nodes.For: _count_loop,
    nodes.Getitem: _pay_slice,
    nodes.List: _pay_literal,
    nodes.Pair: _pay_key,
    nodes.Tuple: _pay_literal,
}


def compile_template(source: str) -> TemplateCode:
    """Compile a template.

    Raises:
        TemplateSyntaxError: it does not parse, or asks for what templates do not have.
        LimitExceeded: it is too large.
        Exception: whatever else jinja2 and Python raise for code that they cannot compile.
    """
    if len(source) > MAX_SOURCE:
        raise LimitExceeded(f"the template has {len(source):,} characters; at most {MAX_SOURCE:,} may be")
    if _LONG_NUMBER.search(source):
        raise LimitExceeded("the template has a number of more than 1,000 digits")
    tree = _Parser(_ENVIRONMENT, source).parse()
    _check(tree)
    _Hooks().visit(tree)
    tree.set_environment(_ENVIRONMENT)
    generator = _Generator(_ENVIRONMENT, None, None, optimized=False)
    generator.reads = set()
    generator.visit(tree)
    names: dict[str, object] = {"environment": None}
    exec(compile(cast(StringIO, generator.stream).getvalue(), FILENAME, "exec"), names)
    return TemplateCode(
        root=names["root"].__code__,  # type: ignore[attr-defined]
        names=_NAMES,
        lines=tuple((code, line) for line, code in reversed(generator.debug_info)),
        reads=frozenset(generator.reads - FUNCTIONS.keys()),
    )


def _check(tree: nodes.Template) -> None:
    """Admit a tree, or raise; without recursion, however deep it is."""
    level: list[nodes.Node] = [tree]
    count = 0
    for depth in range(MAX_NESTING + 1):
        count += len(level)
        below: list[nodes.Node] = []
        for node in level:
            if type(node) not in _ADMITTED:
                raise TemplateSyntaxError(f"chat templates have no {type(node).__name__.lower()}", node.lineno)
            value = getattr(node, "value", None)
            if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
                raise TemplateSyntaxError(
                    f"the template has an integer of more than {MAX_INT_BITS} bits", node.lineno
                )
            below.extend(node.iter_child_nodes())
        if count + len(below) > MAX_NODES or (below and depth == MAX_NESTING):
            raise TemplateSyntaxError(_too_much(depth), below[0].lineno)
        level = below


def _too_much(depth: int) -> str:
    if depth >= MAX_NESTING:
        return f"the template nests more than {MAX_NESTING} deep"
    return f"the template is too large: more than {MAX_NODES:,} parts"


def _paid(hook: str, node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _hook(hook, node)


def _hook(name: str, node: nodes.Node, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(cast(nodes.Expr, node), name, list(args), [], None, None, lineno=node.lineno)


def _no_self(context: object) -> Undefined:
    return Undefined(name="self")


# All that generated code finds by name; `str`, `str_join`, `LoopContext` and `Macro` are the machine's.
_NAMES: Final[Mapping[str, object]] = {
    "__builtins__": {},
    "KeyError": KeyError,
    "Namespace": Namespace,
    "TemplateReference": _no_self,
    "TemplateRuntimeError": TemplateRuntimeError,
    "Undefined": Undefined,
    "dict": dict,
    "identity": identity,
    "inf": float("inf"),  # a number such as 1e999, as it is written
    "internalcode": identity,
    "isinstance": isinstance,
    "missing": missing,
}
