"""What a patch changes on a model, and how all of it is put back.

A module gets a subclass of its class with another forward (`fused_class`). Nothing else about the
class differs, its name included: isinstance, state_dict keys, repr, `_no_split_modules` and FSDP's
wrapping by class name see what they saw before. Where accelerate's hooks are on, `forward` sits in
the instance and calls `_old_forward`; that is rebound too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from operator import is_
from types import MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from swathe.modeling.hf.patching.rebinding import rewired

Forward = Callable[..., Any]
# where accelerate's hooks keep a bound forward in an instance
_BOUND = ("forward", "_old_forward")


class Absent:
    """Stands for an attribute that was not there; a class, so that copies keep its identity."""


def why_not_swapped(module: nn.Module) -> str | None:
    """Why the module's class must stay as it is; None if it may be swapped."""
    cls, own = type(module), vars(module)
    if isinstance(module, PreTrainedModel):
        return f"{cls.__name__} is a PreTrainedModel, which transformers finds by its class"
    if "forward" in own:
        hooked_forward = getattr(own.get("_old_forward"), "__func__", None)
        if hooked_forward is not cls.forward:
            return "its forward was overridden on the instance"
    customs = ("__reduce__", "__reduce_ex__", "__deepcopy__", "__copy__")
    if not is_fused(cls) and any(_is_custom(cls, name) for name in customs):
        return f"{cls.__name__} has a way of its own to be copied or pickled"
    return None


def _is_custom(cls: type, name: str) -> bool:
    return getattr(cls, name, None) is not getattr(nn.Module, name, None)


def is_fused(cls: type) -> bool:
    """Whether `fused_class` made the class, or one that it derives from."""
    return hasattr(cls, "_swathe_made_of")


def fused_ops(cls: type) -> tuple[str, ...]:
    """The ops that `fused_class` was given for the class, none for any other class."""
    return tuple(op for _, op in getattr(cls, "_swathe_made_of", (cls, ()))[1])


def fused_class(cls: type[nn.Module], forward: Forward, *, op: str) -> type[nn.Module]:
    """The subclass of `cls` that runs `forward(self, ...)`: one for each pair, kept for ever.

    `forward` is a function of a module's top level, or one that a `recipe` made: instances are
    copied and pickled by naming it. Raises TypeError for a PreTrainedModel, which would silently
    lose its hidden states: transformers finds them by the class.
    """
    if issubclass(cls, PreTrainedModel):
        raise TypeError(f"{cls.__name__} is a PreTrainedModel; swap the class of a part of it")
    return _fused_class(cls, forward, op)  # type: ignore[arg-type]


@cache
def _fused_class(cls: type[nn.Module], forward: Forward, op: str) -> type[nn.Module]:
    base, steps = getattr(cls, "_swathe_made_of", (cls, ()))
    names = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce,
        "_swathe_made_of": (base, (*steps, (forward, op))),
        "forward": forward,
    }
    metaclass: Any = type(cls)
    made: type[nn.Module] = metaclass(cls.__name__, (cls,), names)
    return made


def recipe(make: Callable[..., Forward]) -> Callable[..., Forward]:
    """Decorate a function that makes forwards of hashable arguments; each is made once.

    A closure cannot be pickled, but the function that made it and its arguments can.
    """

    @cache
    def cooked(*args: Any) -> Forward:
        forward = make(*args)
        forward._swathe_recipe = cooked, args  # type: ignore[attr-defined]
        return forward

    # pickle finds the decorated function under the name of the bare one
    cooked.__module__, cooked.__qualname__ = make.__module__, make.__qualname__
    cooked.__doc__ = make.__doc__
    return cooked


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    return _rebuilt, (_Name.of(type(self)),), self.__getstate__()  # type: ignore[attr-defined]


def _rebuilt(name: _Name) -> nn.Module:
    """An empty instance for copy and pickle to fill."""
    cls = name.find()
    return cls.__new__(cls)


@dataclass(frozen=True)
class _Name:
    """What finds a fused class again. Its own name does not: that is the name of its base."""

    base: type[nn.Module]
    steps: tuple[tuple[Any, str], ...]

    @classmethod
    def of(cls, fused: type[nn.Module]) -> _Name:
        base, steps = getattr(fused, "_swathe_made_of", (fused, ()))
        return cls(base, tuple((getattr(f, "_swathe_recipe", f), op) for f, op in steps))

    def find(self) -> type[nn.Module]:
        cls = self.base
        for forward, op in self.steps:
            made = forward[0](*forward[1]) if isinstance(forward, tuple) else forward
            cls = fused_class(cls, made, op=op)
        return cls


def hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class says: then it must be called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


@dataclass
class _Change:
    """What stood in one object before a change; `cls` only where its class was swapped.

    `forward` is what was put in the place of one that accelerate's hooks may move about.
    """

    target: Any
    before: Mapping[str, Any]
    cls: _Name | None = None
    fused: _Name | None = None
    forward: Any = None


@dataclass
class Undo:
    """The ledger of one model's changes. It is copied and pickled together with the model."""

    changes: list[_Change] = field(default_factory=list)

    def swap_class(self, module: nn.Module, cls: type[nn.Module]) -> None:
        """Make `module` an instance of `cls`, a `fused_class` of its class.

        Raises ValueError, before anything changes, where `why_not_swapped` knows a reason.
        """
        reason = why_not_swapped(module)
        if reason is not None:
            raise ValueError(f"the class of {type(module).__name__} is not swapped: {reason}")
        if type(module) not in cls.__bases__:
            raise TypeError(f"{cls.__name__} was not made of the {type(module).__name__} it gets")
        own = vars(module)
        before = {name: own[name] for name in _BOUND if name in own}
        self.changes.append(_Change(module, before, _Name.of(type(module)), _Name.of(cls)))
        module.__class__ = cls
        if "_old_forward" in own:
            own["_old_forward"] = MethodType(cls.forward, module)

    def set(self, target: Any, name: str, value: Any) -> None:
        """`setattr(target, name, value)` on an instance, through a setter where there is one."""
        if isinstance(target, type):
            raise TypeError(f"a patch changes instances, not {target.__name__} for every model")
        parts = getattr(target, "_modules", {})
        before = dict(vars(target))
        if name in parts:
            self.changes.append(_Change(target, {name: parts[name]}))
            setattr(target, name, value)
            return
        setattr(target, name, value)
        after = vars(target)
        changed = {
            key: before.get(key, Absent)
            for key in {**before, **after}
            if before.get(key, Absent) is not after.get(key, Absent)
        }
        forward = value if name in _BOUND else None
        self.changes.append(_Change(target, changed, forward=forward))

    def restore(self) -> None:
        """Put everything back, the last change first.

        Raises RuntimeError, before anything changes, for a module that got yet another class
        meanwhile (FSDP2 does that): take that off first.
        """
        latest = {id(change.target): change for change in self.changes if change.cls}
        for change in latest.values():
            if change.fused is None or type(change.target) is not change.fused.find():
                raise RuntimeError(
                    f"cannot unpatch a {type(change.target).__name__}: its class was changed again "
                    "after the patch. Undo that first, or patch after it"
                )
        while self.changes:
            change = self.changes.pop()
            if change.cls is not None:
                _take_off(change.target, change.cls.find(), change.before.get("_old_forward"))
            else:
                _put_back(change)


def strip(model: nn.Module) -> None:
    """Give every module of the model its own class again: also copies, which no ledger knows."""
    for module in model.modules():
        made_of = vars(type(module)).get("_swathe_made_of")
        if made_of is not None:
            _take_off(module, made_of[0], None)


def _take_off(module: nn.Module, cls: type[nn.Module], old: Any) -> None:
    fused, own = type(module), vars(module)
    module.__class__ = cls
    bare = MethodType(cls.forward, module) if old is None else old
    for name in _BOUND:
        # hooks that came or went after the patch have moved our forward about
        if name in own:
            own[name] = rewired(own[name], partial(_runs, fused.forward), bare)


def _runs(forward: Forward, held: Any) -> bool:
    return getattr(held, "__func__", None) is forward


def _put_back(change: _Change) -> None:
    target, own = change.target, vars(change.target)
    for name, value in change.before.items():
        if change.forward is not None and own.get(name) is not change.forward:
            _put_back_moved(change, value)
        elif name in getattr(target, "_modules", {}):
            target._modules[name] = value
        elif value is Absent:
            own.pop(name, None)
        else:
            own[name] = value


def _put_back_moved(change: _Change, value: Any) -> None:
    """Where hooks came or went after the patch, leave theirs and replace ours."""
    target, own = change.target, vars(change.target)
    bare = MethodType(type(target).forward, target) if value is Absent else value
    for slot in _BOUND:
        if slot in own:
            own[slot] = rewired(own[slot], partial(is_, change.forward), bare)
