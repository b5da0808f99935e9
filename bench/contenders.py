"""Who is measured: our backends and their peers, each importable or absent with the reason.

Every contender is one function that takes the op's own keywords and that autograd can
differentiate. All work on the same tensors with the same options.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.subject import Function, Peer, Subject
from swathe.kernels.core.contract import Problem
from swathe.kernels.core.registry import registered

# what a peer that does not fit this machine, this torch or this shape raises while it is prepared
PEER_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    ImportError,
    AssertionError,
    KeyError,
    OSError,
    NotImplementedError,
)

# our backends by device: the one that the comparison is about, and others beside it
OURS = {"cuda": ("triton", "gluon"), "cpu": ("cpp",)}


@dataclass(frozen=True)
class Contender:
    """`prepare()` makes the function anew for every cell; `absent` says why there is none here.

    `ours` marks the backend that the comparison is about.
    """

    name: str
    prepare: Callable[[Problem], Function]
    absent: str | None = None
    ours: bool = False


def contenders(of: Subject, device: str, *, compiled: bool = True) -> list[Contender]:
    """Every contender on `device`, ours first: present ones and absent ones with their reason.

    `compiled=False` leaves torch.compile out, as a dry run does.
    """
    ours, *more = OURS[device]
    known = registered(of.op)
    return [
        *([_backend(of, ours)] if ours in known else []),
        *(replace(_backend(of, name), ours=False) for name in more if name in known),
        Contender("eager", partial(_eager, of)),
        Contender("compile", partial(_compile, of), None if compiled else "left out of this run"),
        *(Contender(p.name, p.prepare, p.absent) for p in of.peers(device)),
    ]


def _backend(of: Subject, name: str) -> Contender:
    def prepare(problem: Problem) -> Function:
        return partial(of.contract.function, implementation=of.choose(problem, name))

    return Contender(name, prepare, registered(of.op)[name].missing(), ours=True)


def _eager(of: Subject, problem: Problem) -> Function:
    _unless_left_out(of, "eager", problem)
    return of.eager


def _unless_left_out(of: Subject, name: str, problem: Problem) -> None:
    reason = of.left_out(name, problem)
    if reason:
        raise NotImplementedError(f"{name}: {reason}")


def _compile(of: Subject, problem: Problem) -> Function:
    _unless_left_out(of, "compile", problem)
    # fresh for every cell: a second shape would otherwise recompile to dynamic sizes
    torch._dynamo.reset()
    return torch.compile(of.eager, dynamic=False, fullgraph=True)


def library(name: str, module: str, prepare: Callable[[ModuleType, Problem], Function]) -> Peer:
    """The peer `name` from `module`, where that can be imported."""
    found, absent = peer(module)
    if found is None:
        return Peer(name, nothing, absent)
    return Peer(name, partial(prepare, found))


def nothing(problem: Problem) -> Function:
    """What an absent peer would prepare."""
    raise AssertionError("an absent contender was prepared")


def peer(name: str) -> tuple[ModuleType | None, str | None]:
    """A peer's module, or why it cannot be used: not installed, or what its import raised."""
    package = name.partition(".")[0]
    if find_spec(package) is None:
        return None, f"package {package} is not installed"
    try:
        return import_module(name), None
    except PEER_ERRORS as error:
        first_line = str(error).partition("\n")[0]
        return None, f"import {name} raised {type(error).__name__}: {first_line}"


class _Instead(torch.autograd.Function):
    """Another tensor in the place of one, and another gradient in the place of its own."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, other: Tensor | None, gradient: Tensor | None) -> Tensor:
        ctx.gradient = gradient
        return t.view_as(t) if other is None else other.view_as(other)

    @staticmethod
    def backward(ctx: Any, *found: Tensor) -> tuple[Tensor, None, None]:
        return found[0] if ctx.gradient is None else ctx.gradient, None, None


def overwriting(function: Function, problem: Problem) -> Function:
    """A function that may overwrite its inputs and the gradients that arrive, made harmless.

    Every call is handed copies that were made here, at no cost to the call. The first call finds
    the problem's values in them, later ones what the last left there: times do not depend on it.
    """
    copies = problem.map(Tensor.clone)

    def call(**given: Any) -> Any:
        own = {k: _Instead.apply(given[k], t, None) for k, t in copies.inputs.items()}
        found = function(**{**given, **own})
        values = found if type(found) is tuple else (found,)
        arriving = copies.arriving.values()
        kept = tuple(
            _Instead.apply(v, None, g) if v.requires_grad else v
            for v, g in zip(values, arriving, strict=True)
        )
        return kept if type(found) is tuple else kept[0]

    return call
