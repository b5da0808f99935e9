"""The honest interpreter: Triton kernels on a CPU with hardware's numerics, under a sanitizer.

`install()` replaces the stock interpreter's arithmetic (numerics.py), its memory accesses
(sanitizer.py) and its launch (here) for the process. `sanitized(...)` changes the switches for a
while. Works with triton 3.6 to 3.9; tests/support/test_interpreter.py is its proof.
"""

from __future__ import annotations

import dataclasses
import inspect
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as stock

from support import numerics, sanitizer
from support.numerics import SanitizerError
from support.sanitizer import GRID_LIMITS, Watch, watch

__all__ = ["SanitizerError", "Watch", "install", "sanitized", "virtual_tensor"]

_OPERATORS = [
    f"__{reflected}{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod")
    for reflected in ("", "r")
    if hasattr(tl.constexpr, f"__{reflected}{name}__")
]
_MAP_NORESERVE = 0x4000  # Linux; the module mmap names it from Python 3.13 on only

# the interpreter keeps the current program in a global, so launches take turns
_turn = threading.RLock()
_scopes: dict[frozenset[int], Any] = {}
_installed = False


def install() -> None:
    """Make this process's interpreter honest; further calls change nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    numerics.install()
    sanitizer.install()
    stock.GridExecutor.__call__ = _launch
    stock.InterpretedFunction.__call__ = _call_device_function
    stock._patch_lang_tensor = _patched_tensor(stock._patch_lang_tensor)
    stock._patch_lang_core = _patched_core(stock._patch_lang_core)
    for name in _OPERATORS:
        setattr(tl.constexpr, name, _unwrapping(getattr(tl.constexpr, name)))
    _check_overflow(False)


@contextmanager
def sanitized(
    *,
    bounds: bool = True,
    races: bool = True,
    order: str = "forward",
    seed: int = 0,
    overflow: bool = False,
) -> Iterator[Watch]:
    """Run with these switches; yields the counters of launches, programs and atomics."""
    if order not in ("forward", "reverse", "random"):
        raise ValueError(f"order={order!r}; allowed: 'forward', 'reverse', 'random'")
    before = dataclasses.replace(watch)
    watch.__dict__.update(Watch(bounds, races, order, seed).__dict__)
    _check_overflow(overflow)
    try:
        yield watch
    finally:
        watch.__dict__.update(before.__dict__)
        _check_overflow(False)


def virtual_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose pages take memory only once they are written: gigabytes at no cost."""
    size = prod(shape) * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    memory = mmap.mmap(-1, size, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _check_overflow(on: bool) -> None:
    # the stock assertion costs two fifths of the time and checks nothing: make it real or absent
    builder = stock.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=on, sanitize_overflow=on)


def _launch(self: Any, *args: Any, **kwargs: Any) -> None:
    names = inspect.getfullargspec(self.fn).args
    kwargs = {k: v for k, v in kwargs.items() if k in names}
    with _turn:
        # a descriptor reaches the tensor that it describes
        watch.begin([getattr(a, "base", a) for a in (*args, *kwargs.values())])
        scope = stock._patch_lang(self.fn)
        try:
            bound = inspect.getcallargs(self.fn, *args, **kwargs)
            converted = {
                name: arg if name in self.constexprs else stock._implicit_cvt(arg)
                for name, arg in bound.items()
            }
            _run_programs(self.fn, converted, _grid(self.grid, converted))
            watch.end()
        finally:
            scope.restore()
            while _scopes:
                _scopes.popitem()[1].restore()


def _grid(grid: Any, arguments: dict[str, Any]) -> tuple[int, int, int]:
    sizes = tuple(int(n) for n in (grid(arguments) if callable(grid) else grid))
    sizes = (*sizes, 1, 1)[:3]
    if any(size > limit for size, limit in zip(sizes, GRID_LIMITS, strict=True)):
        raise SanitizerError(f"grid {sizes}: the axes hold at most {GRID_LIMITS} programs")
    return sizes


def _run_programs(function: Any, arguments: dict[str, Any], grid: tuple[int, int, int]) -> None:
    order = np.arange(prod(grid))
    if watch.order == "reverse":
        order = order[::-1]
    elif watch.order == "random":
        order = np.random.default_rng(watch.seed).permutation(order)
    builder = stock.interpreter_builder
    builder.set_grid_dim(*grid)
    for program in map(int, order):
        watch.enter(program)
        builder.set_grid_idx(
            program % grid[0], program // grid[0] % grid[1], program // grid[0] // grid[1]
        )
        function(**arguments)


def _call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    # a helper's language modules are patched once a launch; the stock interpreter never undoes it
    modules = [
        v for v in self.fn.__globals__.values() if inspect.ismodule(v) and v in (tl, tl.core)
    ]
    key = frozenset(map(id, modules))
    if key not in _scopes:
        _scopes[key] = stock._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def _patched_tensor(original: Any) -> Any:
    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__bool__", _truth)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch


def _truth(self: Any) -> bool:
    if self.handle.data.size == 1:
        return bool(self.handle.data.item())
    caller = inspect.currentframe()
    assert caller is not None and caller.f_back is not None
    if "triton" in caller.f_back.f_globals.get("__name__", ""):
        return True
    raise SanitizerError("the truth value of a block: `if` takes a scalar")


def _unwrapping(original: Any) -> Any:
    # a constant times a block is a block; the stock interpreter wraps it as a constant
    def operator(self: Any, other: Any) -> Any:
        found = original(self, other)
        return found.value if isinstance(found.value, tl.tensor) else found

    return operator


def _patched_core(original: Any) -> Any:
    def patch(language: Any, scope: Any) -> None:
        original(language, scope)
        scope.set_attr(language, "multiple_of", sanitizer.multiple_of)
        scope.set_attr(language, "max_contiguous", sanitizer.max_contiguous)

    return patch
