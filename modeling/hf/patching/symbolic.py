"""A forward, run on symbols in place of tensors, as one canonical expression.

`trace(module)` calls the forward of the module's class on a stand-in of the module: its parameters
are symbols, its numbers, flags and functions are the real ones, so that branches on them are
taken as they will be. Activations, dropout and other parts without parameters are run through;
parts with parameters stay calls. A branch that depends on a tensor raises Unreadable.

An expression is a nested tuple, equal for forwards that compute the same in the same precision:

    ("input", i)  ("parameter", name)  ("call", part, argument, ...)
    ("to", dtype, e)       every cast; dtype is a torch.dtype or ("dtype", e)
    ("mul", ...) ("add", ...)   flat, sorted, numbers folded; a - b is a + (-1)b, a / b is a * b^-1
    ("pow", e, n)          square, sqrt, rsqrt, reciprocal and e * e too
    ("mean", e)            over the last dimension, which is kept
    ("piece", e, i, n)     the i-th of n equal parts of the last dimension
    (name, ...)            any other function of torch, by its name
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import CodeType, EllipsisType, GetSetDescriptorType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from swathe.modeling.hf.patching.canonical import Expression, canonical, dtype_of

# a forward that asks what its inputs are sees symbols, not tensors
_ASKING = frozenset(("isinstance", "is_tensor", "type", "hasattr", "id"))


class Unreadable(Exception):
    """The forward does what symbols cannot follow; the message completes "its forward ..."."""


@dataclass
class Trace:
    """What a forward computes. `inlined` are the parts that were run through, by name;
    `read_dtype` says that the dtype of a parameter was read, so that it may hold for that only."""

    expression: Expression
    inlined: tuple[str, ...]
    read_dtype: bool


@dataclass
class _Notes:
    inlined: list[str] = field(default_factory=list)
    read_dtype: bool = False


def trace(module: nn.Module) -> Trace:
    """What the forward of the module's class does with its required arguments.

    Raises Unreadable where it cannot be said, also where training and evaluation differ.
    """
    forward = type(module).forward
    required = _required(forward)
    found = []
    for training in (True, False):
        notes = _Notes()
        stand_in = _stand_in(module, "", notes, training)
        inputs = [Symbol(("input", i), notes) for i in range(required)]
        try:
            result = forward(stand_in, *inputs)
        except Unreadable:
            raise
        except Exception as error:
            raise Unreadable(f"cannot be read ({type(error).__name__})") from error
        if not isinstance(result, Symbol):
            raise Unreadable(f"returns a {type(result).__name__}")
        found.append(Trace(result._e, tuple(notes.inlined), notes.read_dtype))
    if found[0].expression != found[1].expression:
        raise Unreadable("differs between training and evaluation")
    return found[0]


def expression_of(function: Callable[..., Any], *arguments: Expression) -> Expression:
    """The expression of a plain function of tensors: what forms are compared with."""
    result = function(*(Symbol(e, _Notes()) for e in arguments))
    assert isinstance(result, Symbol)
    return result._e


def _required(forward: Callable[..., Any]) -> int:
    code = getattr(forward, "__code__", None)
    asking = _ASKING & _globals_of(code) if code is not None else None
    if asking:
        raise Unreadable(f"calls {min(asking)}()")
    empty, positional = inspect.Parameter.empty, inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return sum(p.default is empty and p.kind is positional for p in parameters)


@cache
def _globals_of(code: CodeType) -> frozenset[str]:
    loads = (i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL")
    return frozenset(loads)


def _stand_in(module: nn.Module, prefix: str, notes: _Notes, training: bool) -> nn.Module:
    """An instance of the same class whose parameters, buffers and parts are symbols."""
    made = object.__new__(type(module))
    own = dict(vars(module))
    for kind in ("_parameters", "_buffers"):
        own[kind] = {
            name: None if t is None else Symbol(("parameter", prefix + name), notes, t)
            for name, t in own[kind].items()
        }
    own["_modules"] = {
        name: None if part is None else _Part(part, prefix + name, notes, training)
        for name, part in own["_modules"].items()
    }
    own["training"] = training
    vars(made).update(own)
    return made


class _Part:
    """A submodule of a stand-in."""

    def __init__(self, module: nn.Module, name: str, notes: _Notes, training: bool) -> None:
        self._module, self._name, self._notes, self._training = module, name, notes, training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not [*self._module.parameters(), *self._module.buffers()]:
            self._notes.inlined.append(self._name)
            stand_in = _stand_in(self._module, f"{self._name}.", self._notes, self._training)
            return type(self._module).forward(stand_in, *args, **kwargs)
        return Symbol(("call", self._name, *_plain((*args, *kwargs.items()))), self._notes)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, Tensor):
            return Symbol(("parameter", f"{self._name}.{name}"), self._notes, value)
        return value


class Symbol:
    """Stands for a tensor, or for what is read of one (its shape, its dtype)."""

    def __init__(self, e: Expression, notes: _Notes, real: Tensor | None = None) -> None:
        self._e, self._notes, self._real = e, notes, real

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        first = next(a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Symbol))
        return first._apply(func.__name__, args, kwargs or {})

    def _apply(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace"):
            raise Unreadable(f"writes in place ({name})")
        if name in ("chunk", "split", "tensor_split"):
            return self._pieces(name, args, kwargs)
        return Symbol(canonical(name, _plain(args), dict(_plain(kwargs.items()))), self._notes)

    def _pieces(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        given = dict(zip(("input", "parts", "dim"), args, strict=False)) | dict(kwargs)
        parts = given.get("parts", given.get("chunks", given.get("split_size_or_sections")))
        if name == "split" and isinstance(parts, list | tuple):
            parts = len(parts) if len(set(parts)) == 1 else None
        elif name != "chunk":
            parts = None
        if not isinstance(parts, int) or given.get("dim", 0) != -1:
            raise Unreadable(f"cuts a tensor in a way that is not read ({name})")
        e = given["input"]._e
        return tuple(Symbol(("piece", e, i, parts), self._notes) for i in range(parts))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self._real is not None and name in ("dtype", "is_floating_point"):
            self._notes.read_dtype = True
            return getattr(self._real, name)
        if self._real is not None and name in ("shape", "ndim", "device"):
            return getattr(self._real, name)
        known = getattr(Tensor, name, None)
        if known is None:
            raise AttributeError(name)
        if name == "dtype":
            dtype = dtype_of(self._e)
            return dtype if isinstance(dtype, torch.dtype) else Symbol(dtype, self._notes)
        if isinstance(known, GetSetDescriptorType | property):
            return Symbol((name, self._e), self._notes)
        return lambda *args, **kwargs: self._apply(name, (self, *args), kwargs)

    def __getitem__(self, index: Any) -> Symbol:
        return Symbol(("item", self._e, repr(_plain(index))), self._notes)

    def _refuse(self, what: str) -> NoReturn:
        raise Unreadable(f"{what} {self._e[0]!r} of a tensor, which is known only when it runs")

    def __bool__(self) -> bool:
        self._refuse("branches on")

    def __iter__(self) -> Any:
        self._refuse("goes through")

    def __len__(self) -> int:
        self._refuse("counts")

    def __float__(self) -> float:
        self._refuse("needs the number")

    __int__ = __index__ = __float__  # type: ignore[assignment]
    __hash__ = object.__hash__


def _operator(name: str, swapped: bool = False) -> Callable[..., Any]:
    def apply(self: Symbol, *others: Any) -> Any:
        return self._apply(name, (*others, self) if swapped else (self, *others), {})

    return apply


def _in_place(self: Symbol, other: Any) -> NoReturn:
    raise Unreadable("writes in place")


for _name in ("add", "sub", "mul", "truediv", "pow", "matmul", "floordiv", "mod", "and", "or"):
    setattr(Symbol, f"__{_name}__", _operator(_name))
    setattr(Symbol, f"__r{_name}__", _operator(_name, swapped=True))
    setattr(Symbol, f"__i{_name}__", _in_place)
for _name in ("eq", "ne", "lt", "le", "gt", "ge", "neg", "invert"):
    setattr(Symbol, f"__{_name}__", _operator(_name))


def _plain(value: Any) -> Any:
    """Symbols replaced by their expressions, so that the result can be compared and hashed."""
    if isinstance(value, Symbol):
        return value._e
    if isinstance(value, slice):
        return ("slice", _plain(value.start), _plain(value.stop), _plain(value.step))
    if isinstance(value, str | int | float | torch.dtype | torch.device | EllipsisType | None):
        return value
    if isinstance(value, dict):
        return tuple(sorted((k, _plain(v)) for k, v in value.items()))
    try:
        return tuple(_plain(v) for v in value)
    except TypeError as error:
        raise Unreadable(f"uses a {type(value).__name__}") from error
