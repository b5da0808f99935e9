"""A forward with one of its global names bound to something else, or with another body.

The original function is left as it is, and so are its module's globals: other models of the same
class go on as before. Decorators stay: each wrapper is copied, with the new function in the cell
that held the old one.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator, Mapping
from types import CellType, CodeType, FunctionType
from typing import Any


def wrappers(forward: FunctionType) -> list[FunctionType]:
    """`forward` and what it wraps, outermost first; the last one is what its author wrote."""
    chain = [forward]
    while isinstance(wrapped := getattr(chain[-1], "__wrapped__", None), FunctionType):
        chain.append(wrapped)
    return chain


def why_not_rewrapped(forward: Any) -> str | None:
    """Why `rewrapped` cannot serve, None where it can."""
    if not isinstance(forward, FunctionType):
        return f"its forward is a {type(forward).__name__}, not a function"
    for outer, inner in zip((chain := wrappers(forward)), chain[1:], strict=False):
        if not any(_held(cell) is inner for cell in outer.__closure__ or ()):
            return f"its forward is wrapped by {outer.__code__.co_qualname}, which hides it"
    return None


def rewrapped(forward: FunctionType, inner: FunctionType) -> FunctionType:
    """`inner` in copies of the wrappers that `forward` has."""
    *outer, old = wrappers(forward)
    new = inner
    for wrapper in reversed(outer):
        cells = tuple(
            CellType(new) if _held(cell) is old else cell for cell in wrapper.__closure__ or ()
        )
        copied = _like(wrapper, wrapper.__code__, wrapper.__globals__, cells)
        copied.__wrapped__ = new  # type: ignore[attr-defined]
        old, new = wrapper, copied
    return new


def rebound(function: FunctionType, names: Mapping[str, Any]) -> FunctionType:
    """The code of `function` over a copy of its globals in which `names` are something else."""
    copied = {**function.__globals__, **names}
    # dynamo guards on what a global is in the module of this name, where nothing has changed
    copied.pop("__name__", None)
    return _like(function, function.__code__, copied, function.__closure__)


def with_body(function: FunctionType, body: FunctionType) -> FunctionType:
    """`body`, another function of the same parameters, named and documented as `function` is."""
    return _like(function, body.__code__, body.__globals__, body.__closure__)


def rewired(
    held: Any, is_ours: Callable[[Any], bool], own: Any, inside: tuple[Any, ...] = ()
) -> Any:
    """`own` for what `is_ours`, and copies of functions that keep such a thing in a cell.

    Whoever puts `forward` into an instance calls the one that it found there from its closure, as
    transformers' tensor parallelism does. `inside` are the functions around it.
    """
    if is_ours(held):
        return own
    recursive = any(held is function for function in inside)
    if recursive or not isinstance(held, FunctionType) or not held.__closure__:
        return held
    pairs = [(cell, _held(cell)) for cell in held.__closure__]
    news = [rewired(value, is_ours, own, (*inside, held)) for _, value in pairs]
    if all(new is value for new, (_, value) in zip(news, pairs, strict=True)):
        return held
    cells = (
        cell if new is value else CellType(new)
        for new, (cell, value) in zip(news, pairs, strict=True)
    )
    return _like(held, held.__code__, held.__globals__, tuple(cells))


def global_names(code: CodeType) -> Iterator[str]:
    """Names that the code looks up among its globals, in the functions inside it as well."""
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from global_names(constant)


def _held(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing yet
        return None


def _like(
    function: FunctionType,
    code: CodeType,
    names: dict[str, Any],
    cells: tuple[CellType, ...] | None,
) -> FunctionType:
    made = FunctionType(code, names, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__annotations__ = function.__annotations__
    made.__qualname__, made.__module__ = function.__qualname__, function.__module__
    made.__doc__ = function.__doc__
    made.__dict__.update(function.__dict__)
    return made
