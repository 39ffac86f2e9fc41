"""The compiler of chat templates: from a template's text to code that runs on a `Machine`.

jinja2 parses and compiles. This module bounds both by counting nodes and nesting, and admits only the statements
and expressions that chat templates use. It also inserts calls of the machine into operations that generated code
would otherwise run unchecked: loops, comparisons, slices and written-out lists. Compilation evaluates no part of a
template. `ChatTemplate` calls `compile_template`.
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
from erllama.chat.templates.limits import MAX_INT_BITS, LimitExceeded
from erllama.chat.templates.methods import FUNCTIONS
from erllama.chat.templates.values import Namespace

# Characters of a template. The longest known templates have about twenty thousand.
MAX_SOURCE: Final = 256 << 10
# Nodes of a template's syntax tree. The largest known trees have about 1,300. In the worst case jinja2 takes time
# proportional to the square of this number: a second or two at this limit.
MAX_NODES: Final = 12_000
# Nesting depth of expressions and statements. Python nests brackets up to 200, and jinja2 works by recursion.
MAX_NESTING: Final = 80
# A number with too many digits.
_LONG_NUMBER = re.compile(r"[0-9][0-9_]{1000}")

# File name of the generated code, by which tracebacks identify its frames.
FILENAME: Final = "<chat template>"

_ALLOWED_NODES: Final = frozenset(
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
        root: code of a generator function of (context, missing, environment).
        names: global names of that code, besides those of a machine.
        lines: pairs (line of the code, line of the template), descending.
        reads: names of the caller's variables that the template reads.
    """

    root: CodeType
    names: Mapping[str, object]
    lines: tuple[tuple[int, int], ...]
    reads: frozenset[str]


class _Generation(Extension):
    """The statement `{% generation %}`, which marks a model's output for training. Renders as its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = nodes.Call(nodes.EnvironmentAttribute("generation"), [], [], None, None)
        return nodes.CallBlock(call, [], [], body).set_lineno(line)


class _Parser(Parser):
    """jinja2's parser, with depth and work counted wherever it recurses."""

    _depth = 0
    _count = 0

    def _enter(self) -> None:
        # A bracket is counted three times, and an expression twice.
        self._depth += 1
        self._count += 1
        if self._depth > 3 * MAX_NESTING or self._count > 3 * MAX_NODES:
            self.fail(_size_error(self._depth), self.stream.current.lineno)

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
    """jinja2's code generator, without constant folding. Collects the names of variables that are read."""

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


class _HookInserter(NodeTransformer):
    """Inserts the machine's hooks into a tree, from its leaves up."""

    def visit(self, node: nodes.Node, *args: object, **kwargs: object) -> nodes.Node:
        self.generic_visit(node)
        rewrite = _REWRITES.get(type(node))
        return rewrite(node) if rewrite else node


def _charge_loop(node: nodes.For) -> nodes.Node:
    # Steps of the body that do not call the machine, and bytes of the texts that it collects.
    size = sum(1 for part in (*node.body, *node.else_) for _ in part.find_all(nodes.Node))
    texts = sum(len(output.nodes) for output in node.find_all(nodes.Output))
    node.iter = _hook("(loop)", node.iter, nodes.Const(1 + size // 8), nodes.Const(8 * texts))
    return node


def _charge_comparison(node: nodes.Compare) -> nodes.Node:
    # A comparison with a constant of the template takes little time.
    sides = [node.expr, *(operand.expr for operand in node.ops)]
    if len(node.ops) == 1 and node.ops[0].op in ("eq", "ne") and any(isinstance(s, nodes.Const) for s in sides):
        return node
    node.expr = _charged("(operand)", node.expr)
    for operand in node.ops:
        hook = "(container)" if operand.op in ("in", "notin") else "(operand)"
        operand.expr = _charged(hook, operand.expr)
    return node


def _charge_slice(node: nodes.Getitem) -> nodes.Node:
    if not isinstance(node.arg, nodes.Slice):
        return node
    bounds = [bound or nodes.Const(None) for bound in (node.arg.start, node.arg.stop, node.arg.step)]
    return _hook("(slice)", node.node, *bounds)


def _charge_key(node: nodes.Pair) -> nodes.Node:
    node.key = _charged("(key)", node.key)
    return node


def _charge_literal(node: nodes.Expr) -> nodes.Node:
    return node if getattr(node, "ctx", "load") == "store" else _hook("(literal)", node)


_REWRITES: Final[Mapping[type[nodes.Node], Callable[..., nodes.Node]]] = {
    nodes.Compare: _charge_comparison,
    nodes.Dict: _charge_literal,
    nodes.For: _charge_loop,
    nodes.Getitem: _charge_slice,
    nodes.List: _charge_literal,
    nodes.Pair: _charge_key,
    nodes.Tuple: _charge_literal,
}


def compile_template(source: str) -> TemplateCode:
    """Compile a template.

    Raises:
        TemplateSyntaxError: the template does not parse, or uses syntax that chat templates do not support.
        LimitExceeded: the template is too large.
        Exception: any other error that jinja2 or Python raises for code that it cannot compile.
    """
    if len(source) > MAX_SOURCE:
        raise LimitExceeded(f"the template has {len(source):,} characters; the limit is {MAX_SOURCE:,}")
    if _LONG_NUMBER.search(source):
        raise LimitExceeded("the template has a number with more than 1,000 digits")
    tree = _Parser(_ENVIRONMENT, source).parse()
    _check(tree)
    _HookInserter().visit(tree)
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
    """Raise unless a tree is admitted. Works without recursion, since the tree may be deep."""
    level: list[nodes.Node] = [tree]
    count = 0
    for depth in range(MAX_NESTING + 1):
        count += len(level)
        below: list[nodes.Node] = []
        for node in level:
            if type(node) not in _ALLOWED_NODES:
                raise TemplateSyntaxError(
                    f"chat templates do not support {type(node).__name__.lower()}", node.lineno
                )
            value = getattr(node, "value", None)
            if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
                raise TemplateSyntaxError(
                    f"the template has an integer with more than {MAX_INT_BITS} bits", node.lineno
                )
            below.extend(node.iter_child_nodes())
        if count + len(below) > MAX_NODES or (below and depth == MAX_NESTING):
            raise TemplateSyntaxError(_size_error(depth), below[0].lineno)
        level = below


def _size_error(depth: int) -> str:
    if depth >= MAX_NESTING:
        return f"the template nests more than {MAX_NESTING} deep"
    return f"the template is too large: more than {MAX_NODES:,} parts"


def _charged(hook: str, node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _hook(hook, node)


def _hook(name: str, node: nodes.Node, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(cast(nodes.Expr, node), name, list(args), [], None, None, lineno=node.lineno)


def _no_self(context: object) -> Undefined:
    return Undefined(name="self")


# All global names of generated code, besides `str`, `str_join`, `LoopContext` and `Macro`, which are the machine's.
_NAMES: Final[Mapping[str, object]] = {
    "__builtins__": {},
    "KeyError": KeyError,
    "Namespace": Namespace,
    "TemplateReference": _no_self,
    "TemplateRuntimeError": TemplateRuntimeError,
    "Undefined": Undefined,
    "dict": dict,
    "identity": identity,
    "inf": float("inf"),  # how a number such as 1e999 is written
    "internalcode": identity,
    "isinstance": isinstance,
    "missing": missing,
}
