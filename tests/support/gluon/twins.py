"""Twins of kernel modules: the same source, run against the emulator in Triton's place.

A twin is compiled from its module's file with three changes, each of which is what Triton does with
the source: a value that is assigned without a constexpr annotation is a run-time value from then
on, `range` counts in run-time integers, and // and % of constants that hardware would round
otherwise are refused.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from support.gluon import barriers, copies, language, matrix, memory
from support.gluon.schedule import fault
from support.gluon.tensors import Tensor, tensor

VOCABULARY = "swathe.kernels.core.gluon"
_twins: dict[Path, _Twin] = {}


class _Twin(NamedTuple):
    text: str
    module: ModuleType
    uses: dict[str, ModuleType]


def twin(name: str) -> ModuleType:
    """The twin of the module of that name, made anew where its file or one it uses has changed."""
    path = _file(name)
    assert path is not None, name
    text = path.read_text()
    known = _twins.get(path)
    same = known is not None and known.text == text
    if known and same and all(twin(used) is module for used, module in known.uses.items()):
        return known.module
    uses: dict[str, ModuleType] = {}
    module = ModuleType(name)
    module.__file__ = str(path)
    scope = module.__dict__
    scope["__builtins__"] = {**vars(builtins), "__import__": _importer(uses)}
    scope.update(_assigned=assigned, _range=count)
    tree = ast.fix_missing_locations(_Rewriter().visit(ast.parse(text, str(path))))
    exec(compile(tree, str(path), "exec", dont_inherit=True), scope)
    _twins[path] = _Twin(text, module, uses)
    return module


def _file(name: str) -> Path | None:
    # what has been put in a module's place counts: that is how a bug is planted
    loaded = sys.modules.get(name)
    file = getattr(loaded, "__file__", None)
    if loaded is None:
        spec = find_spec(name)
        file = spec.origin if spec is not None else None
    return Path(file) if file and file.endswith(".py") else None


def _is_gluon(name: str) -> bool:
    path = _file(name)
    return name != VOCABULARY and path is not None and VOCABULARY in path.read_text()


def _importer(uses: dict[str, ModuleType]) -> Callable[..., Any]:
    def take(name: str) -> Any:
        if name == VOCABULARY:
            return vocabulary()
        uses[name] = twin(name)
        return uses[name]

    def load(
        name: str, scope: Any = None, local: Any = None, names: Any = (), level: int = 0
    ) -> Any:
        if level == 0 and name.startswith("swathe.") and names:
            if name == VOCABULARY or _is_gluon(name):
                return take(name)
            inner = [n for n in names if _submodule(name, n)]
            if inner:
                package = builtins.__import__(name, scope, local, names, level)
                return SimpleNamespace(
                    **{n: take(f"{name}.{n}") if n in inner else getattr(package, n) for n in names}
                )
        return builtins.__import__(name, scope, local, names, level)

    return load


def _submodule(package: str, name: str) -> bool:
    full = f"{package}.{name}"
    try:
        return full == VOCABULARY or _is_gluon(full)
    except ModuleNotFoundError:
        return False


class _Rewriter(ast.NodeTransformer):
    """Rewrites the bodies of functions under @jit."""

    def __init__(self) -> None:
        self.inside = False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        jitted = any("jit" in ast.unparse(d).split("(")[0].split(".") for d in node.decorator_list)
        before, self.inside = self.inside, jitted
        node.body = [self.visit(statement) for statement in node.body]
        self.inside = before
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        self.generic_visit(node)
        if self.inside:
            node.value = _call("_assigned", node.value)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        self.generic_visit(node)
        if not self.inside or not isinstance(node.target, ast.Name):
            return node
        now = ast.copy_location(ast.Name(node.target.id, ast.Load()), node)
        value = ast.copy_location(ast.BinOp(now, node.op, node.value), node)
        return ast.copy_location(ast.Assign([node.target], _call("_assigned", value)), node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if self.inside and node.id == "range":
            return ast.copy_location(ast.Name("_range", node.ctx), node)
        return node


def _call(function: str, value: ast.expr) -> ast.expr:
    name = ast.copy_location(ast.Name(function, ast.Load()), value)
    return ast.copy_location(ast.Call(name, [value], []), value)


def assigned(value: Any) -> Any:
    """What a variable holds: constants become run-time values, in tuples too."""
    if isinstance(value, tuple):
        values = [assigned(v) for v in value]
        return type(value)(*values) if hasattr(value, "_fields") else tuple(values)
    return tensor(value) if isinstance(value, (bool, int, float)) else value


def count(*bounds: Any) -> Any:
    """A loop over run-time integers."""
    start, stop, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    at = tensor(start)
    while at < stop if not isinstance(step, int) or step > 0 else at > stop:
        yield at
        at = at + step


class Jitted:
    """A function under @jit: called by kernels, started by a launch."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.fn, self.__name__ = function, function.__name__
        self.__doc__ = function.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return assigned(self.fn(*args, **kwargs))

    def __getitem__(self, grid: Any) -> Any:
        raise fault("a kernel is launched by support.gluon.launch")


def jit(function: Any = None, **options: Any) -> Any:
    return Jitted(function) if function is not None else Jitted


def vocabulary() -> SimpleNamespace:
    """What stands in place of swathe.kernels.core.gluon."""
    from swathe.kernels.core.gluon import TensorDescriptor

    return SimpleNamespace(
        TensorDescriptor=TensorDescriptor,
        arrive_warpgroups=barriers.arrive_warpgroups,
        box_bytes=copies.box_bytes,
        constexpr_function=lambda function: function,
        fence_async_shared=memory.fence_async_shared,
        gl=language.language(),
        jit=jit,
        mbarrier=barriers.mbarrier,
        mbarriers=barriers.mbarriers,
        partition_barrier=barriers.partition_barrier,
        reinterpret=memory.reinterpret,
        sync_warpgroups=barriers.sync_warpgroups,
        tma_add=copies.tma_add,
        tma_load=copies.tma_load,
        tma_store=copies.tma_store,
        tma_store_wait=copies.tma_store_wait,
        warpgroup_mma=matrix.warpgroup_mma,
        warpgroup_mma_init=matrix.warpgroup_mma_init,
        warpgroup_mma_wait=matrix.warpgroup_mma_wait,
    )


__all__ = ["Jitted", "Tensor", "assigned", "twin"]
