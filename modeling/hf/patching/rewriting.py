"""The source of a forward, in which a sum and the norm of that sum become one call.

    h = residual + h              h, normed = add_norm(self.norm, residual, h)
    residual = h             ->   residual = h
    h = self.norm(h)              h = normed

    h = self.norm(h + x)     ->   h = add_norm(self.norm, h, x)[1]

The operands of the sum stay the expressions they are, a dropout or a factor included. The norm must
be called in the statement after the sum, copies of it aside, and whatever happens: not in a branch.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from types import FunctionType
from typing import Any

from swathe.modeling.hf.patching.sources import Flags, blocks, compiled, parsed, self_call

_CALL = "_swathe_add_norm"
_NORMED = "_swathe_normed"
# what is computed only sometimes, or later
_MAYBE = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp)
_MAYBE_TOO = (ast.GeneratorExp, ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom, ast.Compare)


@dataclass(frozen=True)
class Site:
    """A sum and the norm that takes it: `self.norm(left + right)`, perhaps over two statements.

    `flags` are the attributes of the module on which branches around it depend.
    """

    norm: str
    text: str
    flags: Flags

    def reached(self, module: Any) -> bool:
        """Whether the module's flags are such that it may run."""
        return all(bool(getattr(module, name, wanted)) is wanted for name, wanted in self.flags)


@cache
def sites(function: FunctionType) -> tuple[Site, ...]:
    """Every sum in `function` that a method `self.name(sum)` of one argument takes next.

    Whether that is a norm is not known here. Raises Unreadable where there is no source, or another
    than what `function` was compiled of.
    """
    tree = parsed(function)
    return tuple(Site(pair.name, pair.text, flags) for pair, flags in _pairs(tree))


@cache
def in_place(function: FunctionType) -> tuple[str, ...]:
    """Names of what is called with a sum formed in place (`h += x`), which no call replaces."""
    found = []
    for block, _ in blocks(parsed(function)):
        for statement, following in pairwise(block):
            if isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Add):
                names = {statement.target.id} if isinstance(statement.target, ast.Name) else set()
                call = _call_of(following, names)
                found += [call.func.attr] if call is not None else []  # type: ignore[attr-defined]
    return tuple(found)


def rewritten(
    function: FunctionType, calls: Mapping[str, Callable[..., Any]], title: str
) -> FunctionType:
    """`function` with each site of a norm in `calls` made one call, `calls[norm](norm, a, b)`.

    Tracebacks show the new source as a file called `title`.
    """
    tree = parsed(function)
    used: dict[str, Callable[..., Any]] = {}
    for number, (pair, _) in enumerate(list(_pairs(tree))):
        if pair.name in calls:
            name = f"{_CALL}_{pair.name}"
            used[name] = calls[pair.name]
            pair.join(name, f"{_NORMED}_{number}")
    for block, _ in list(blocks(tree)):
        block[:] = [s for statement in block for s in (statement, *_dropped(statement))]
    return compiled(tree, function, used, title)


@dataclass
class _Pair:
    """A sum and the call that takes it, and how both are written as one."""

    name: str
    text: str
    total: ast.BinOp
    call: ast.Call
    assignment: ast.Assign | None  # of the sum, where the call takes it by name
    statement: ast.AST  # that has the call inside

    def join(self, function: str, normed: str) -> None:
        """Change the tree that the pair was found in."""
        joined = ast.Call(
            ast.Name(function, ast.Load()), [self.call.func, self.total.left, self.total.right], []
        )
        if self.assignment is None:
            new: ast.expr = ast.Subscript(joined, ast.Constant(1), ast.Load())
        else:
            targets = [self.assignment.targets[0], ast.Name(normed, ast.Store())]
            self.assignment.targets = [ast.Tuple(targets, ast.Store())]  # type: ignore[list-item]
            self.assignment.value = joined
            new = ast.Name(normed, ast.Load())
        _Replace(self.call, new).visit(self.statement)


def _dropped(statement: ast.stmt) -> Iterator[ast.stmt]:
    """`del normed`, after the statement that reads it: what was normed would live on otherwise."""
    for node in ast.walk(statement) if isinstance(statement, ast.Assign | ast.Expr) else ():
        read = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        if read and node.id.startswith(_NORMED):  # type: ignore[attr-defined]
            yield ast.Delete([ast.Name(node.id, ast.Del())])  # type: ignore[attr-defined]


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self.new if node is self.old else super().visit(node)


def _pairs(tree: ast.FunctionDef) -> Iterator[tuple[_Pair, Flags]]:
    for block, flags in blocks(tree):
        for i, statement in enumerate(block):
            for call in _calls(statement):
                argument = call.args[0]
                if isinstance(argument, ast.BinOp) and isinstance(argument.op, ast.Add):
                    yield _pair(argument, call, None, statement), flags
            total = _sum(statement)
            if total is None or not isinstance(statement, ast.Assign):
                continue
            names = {statement.targets[0].id}  # type: ignore[attr-defined]
            for following in block[i + 1 :]:
                if _copies(following, names):
                    continue
                taking = _call_of(following, names)
                if taking is not None:
                    yield _pair(total, taking, statement, following), flags
                break


def _pair(
    total: ast.BinOp, call: ast.Call, assignment: ast.Assign | None, statement: ast.AST
) -> _Pair:
    name: str = call.func.attr  # type: ignore[attr-defined]
    text = f"self.{name}({ast.unparse(total)})"
    return _Pair(name, text, total, call, assignment, statement)


def _sum(statement: ast.stmt) -> ast.BinOp | None:
    """The sum in `name = a + b`."""
    good = (
        isinstance(statement, ast.Assign)
        and len(statement.targets) == 1
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(statement.value, ast.BinOp)
        and isinstance(statement.value.op, ast.Add)
    )
    return statement.value if good else None  # type: ignore[attr-defined]


def _copies(statement: ast.stmt, names: set[str]) -> bool:
    """Whether it is `other = name`; `other` is then one of the names."""
    if (
        isinstance(statement, ast.Assign)
        and isinstance(statement.value, ast.Name)
        and statement.value.id in names
        and all(isinstance(target, ast.Name) for target in statement.targets)
    ):
        names |= {target.id for target in statement.targets}  # type: ignore[attr-defined]
        return True
    return False


def _call_of(statement: ast.stmt, names: set[str]) -> ast.Call | None:
    """The first `self.method(name)` in a simple statement, if it is always reached."""
    for call in _calls(statement):
        if isinstance(call.args[0], ast.Name) and call.args[0].id in names:
            return call
    return None


def _calls(statement: ast.stmt) -> Iterator[ast.Call]:
    """Every `self.method(argument)` that a simple statement always reaches."""
    if isinstance(statement, ast.Assign | ast.Expr | ast.Return):
        yield from _calls_in(statement)


def _calls_in(node: ast.AST) -> Iterator[ast.Call]:
    if isinstance(node, _MAYBE + _MAYBE_TOO):
        return
    if self_call(node) is not None:
        yield node  # type: ignore[misc]
    for child in ast.iter_child_nodes(node):
        yield from _calls_in(child)
