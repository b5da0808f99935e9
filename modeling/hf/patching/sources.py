"""The source of a function as a tree, and a tree as a function again.

The new function has the globals, the defaults and what the old one closed over, and closes over
what the change needs besides. It is compiled from text that tracebacks and inspect can show.
"""

from __future__ import annotations

import ast
import dis
import inspect
import linecache
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from types import CellType, CodeType, FunctionType
from typing import Any

from swathe.modeling.hf.patching.rebinding import with_body

# attributes of the module, and what they must be for a branch to be taken
Flags = tuple[tuple[str, bool], ...]
_LAYOUT = ("PUSH_NULL", "PRECALL", "CACHE", "NOP", "EXTENDED_ARG")


class Unreadable(ValueError):
    """Why a forward cannot be rewritten."""


def self_call(node: ast.AST) -> str | None:
    """`name`, if the node is `self.name(argument)`."""
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "self"
        and len(node.args) == 1
        and not node.keywords
    ):
        return node.func.attr
    return None


def blocks(tree: ast.AST, flags: Flags = ()) -> Iterator[tuple[list[ast.stmt], Flags]]:
    """Lists of statements that run one after another; not those of functions and classes inside."""
    for field in ("body", "orelse", "finalbody"):
        block = getattr(tree, field, None)
        if isinstance(block, list) and block:
            inside = (*flags, *_flag(tree, field == "body"))
            yield block, inside
            for statement in block:
                if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    yield from blocks(statement, inside)


def _flag(tree: ast.AST, wanted: bool) -> Flags:
    """The attribute that `if self.name:` or `if not self.name:` depends on."""
    if not isinstance(tree, ast.If):
        return ()
    test = tree.test
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        test, wanted = test.operand, not wanted
    is_flag = isinstance(test, ast.Attribute) and ast.unparse(test.value) == "self"
    return ((test.attr, wanted),) if is_flag else ()  # type: ignore[attr-defined]


def parsed(function: FunctionType) -> ast.FunctionDef:
    """The definition, without its decorators and annotations. Raises Unreadable."""
    try:
        text = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError) as error:
        raise Unreadable("its source is not to be had") from error
    try:
        (tree,) = ast.parse(text).body
    except (SyntaxError, ValueError) as error:
        raise Unreadable("its source is no function of its own") from error
    if not isinstance(tree, ast.FunctionDef):
        raise Unreadable("its source is no plain function")
    if any(_is_private(node) for node in ast.walk(tree)):
        raise Unreadable("it reads names that are private to its class")
    tree.decorator_list, tree.returns = [], None
    parameters = tree.args
    for a in ast.walk(parameters):
        if isinstance(a, ast.arg):
            a.annotation = None
    # the values are taken from the function itself
    parameters.defaults = [ast.Constant(None) for _ in parameters.defaults]
    parameters.kw_defaults = [d and ast.Constant(None) for d in parameters.kw_defaults]
    made = _made(compile(_outer(tree, function, ()), "<as it is>", "exec"), function, {})
    if list(_steps(made.__code__)) != list(_steps(function.__code__)):
        raise Unreadable("its source is not what it was compiled of")
    return tree


def _steps(code: CodeType) -> Iterator[Any]:
    """What the code does, however it was laid out; whether a module's function is called as a
    method depends on how the module was imported."""
    yield code.co_varnames, code.co_freevars, code.co_cellvars
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if isinstance(instruction.argval, CodeType):
            yield from _steps(instruction.argval)
        elif name not in _LAYOUT and instruction.opcode not in dis.hasjrel + dis.hasjabs:
            yield name.replace("LOAD_METHOD", "LOAD_ATTR"), instruction.argval


def _is_private(node: ast.AST) -> bool:
    name = getattr(node, "attr", getattr(node, "id", ""))
    return isinstance(name, str) and name.startswith("__") and not name.endswith("__")


def compiled(
    tree: ast.FunctionDef, function: FunctionType, used: Mapping[str, Any], title: str
) -> FunctionType:
    """`function` with the body of `tree`, which may read the names in `used` besides.

    Tracebacks show the new source as a file called `title`.
    """
    text = ast.unparse(_outer(tree, function, used))
    linecache.cache[title] = (len(text), None, text.splitlines(keepends=True), title)
    return with_body(
        function, _made(compile(text, title, "exec", dont_inherit=True), function, used)
    )


def _outer(tree: ast.FunctionDef, function: FunctionType, used: Iterable[str]) -> ast.Module:
    """A module with a function `make` whose parameters are what `tree`, inside it, closes over."""
    names = (*function.__code__.co_freevars, *used)
    outer: Any = ast.parse(f"def make({', '.join(names)}):\n    pass").body[0]
    outer.body = [tree, ast.Return(ast.Name(tree.name, ast.Load()))]
    return ast.fix_missing_locations(ast.Module([outer], []))


def _made(module: CodeType, function: FunctionType, used: Mapping[str, Any]) -> FunctionType:
    """The function that is defined inside the one function of a module, which is not run."""
    (outer,) = (c for c in module.co_consts if isinstance(c, CodeType))
    code = next(
        c for c in outer.co_consts if isinstance(c, CodeType) and c.co_name == function.__name__
    )
    cells = {name: CellType(value) for name, value in used.items()}
    free = function.__code__.co_freevars
    cells |= dict(zip(free, function.__closure__ or (), strict=True))
    closure = tuple(cells[name] for name in code.co_freevars)
    return FunctionType(code, function.__globals__, code.co_name, None, closure)
