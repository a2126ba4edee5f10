"""What can be wrong in a line of Python that runs: a comparison, a number, an ``and``, a call."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

FLIPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}

SAYS = frozenset(
    {
        "debug",
        "info",
        "warning",
        "warning_once",
        "error",
        "exception",
        "critical",
        "log",
        "logger",
        "print",
        "format",
        "join",
        "repr",
        "observe",
        "inc",
        "describe",
        "append_note",
        "add_note",
    }
)
"""Functions and methods that only say something: to call none of them is another kind of fault."""

SILENT = frozenset({"__repr__", "__str__", "describe"})
"""Functions whose result is only read by people."""


@dataclass(frozen=True)
class Fault:
    """One change of one expression or statement.

    Attributes:
        line: where it is.
        column: where in the line.
        kind: ``comparison``, ``number``, ``connective`` or ``call``.
        before: the code.
        after: the code that takes its place; ``pass`` for a call that is dropped.
    """

    line: int
    column: int
    kind: str
    before: str
    after: str

    def put_into(self, source: str) -> str:
        """The whole source with the fault in it, every other line as it was."""
        lines = source.splitlines(keepends=True)
        start = sum(map(len, lines[: self.line - 1]))
        start += len(lines[self.line - 1].encode()[: self.column].decode())
        assert source.startswith(self.before, start)
        return source[:start] + self.after + source[start + len(self.before) :]


def faults_of(source: str) -> list[Fault]:
    """Every fault that could be put into a module."""
    return list(_Finder(source).module(ast.parse(source)))


class _Finder:
    def __init__(self, source: str) -> None:
        self._source = source

    def module(self, node: ast.AST) -> Iterator[Fault]:
        if self._is_only_said(node):
            return
        yield from self._of(node)
        for child in ast.iter_child_nodes(node):
            yield from self.module(child)

    def _is_only_said(self, node: ast.AST) -> bool:
        """Messages, annotations, and what is for the type checker."""
        match node:
            case (
                ast.Raise() | ast.Assert() | ast.JoinedStr() | ast.arg() | ast.AnnAssign(value=None)
            ):
                return True
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                return name in SILENT
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                return True
            case ast.Call():
                return _name(node.func) in SAYS
            case ast.Subscript(value=ast.Name(id=name)):
                return name in {"Literal", "Annotated", "Callable"}
        return False

    def _of(self, node: ast.AST) -> Iterator[Fault]:
        match node:
            case ast.Compare(ops=[operator]):
                flipped = ast.Compare(node.left, [FLIPPED[type(operator)]()], node.comparators)
                yield self._fault("comparison", node, ast.unparse(flipped), bracketed=True)
            case ast.BoolOp(op=operator):
                other = ast.Or() if isinstance(operator, ast.And) else ast.And()
                yield self._fault(
                    "connective", node, ast.unparse(ast.BoolOp(other, node.values)), bracketed=True
                )
            case ast.Constant(value=int(number)) if not isinstance(number, bool):
                yield self._fault("number", node, str(number + 1))
            case ast.Expr(value=ast.Call(func=function)) if not _is_super(function):
                if _name(function) not in SAYS:
                    yield self._fault("call", node, "pass")
            case ast.Expr(value=ast.Await(value=ast.Call(func=function))):
                yield self._fault("call", node, "pass")

    def _fault(self, kind: str, node: ast.AST, after: str, *, bracketed: bool = False) -> Fault:
        before = ast.get_source_segment(self._source, node)
        assert before is not None
        position: ast.expr = node  # type: ignore[assignment]
        after = f"({after})" if bracketed else after
        return Fault(position.lineno, position.col_offset, kind, before, after)


def _name(function: ast.expr) -> str:
    match function:
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name
    return ""


def _is_super(function: ast.expr) -> bool:
    """``super().__init__(...)`` and the like: without it hardly anything works at all."""
    return isinstance(function, ast.Attribute) and function.attr == "__init__"
