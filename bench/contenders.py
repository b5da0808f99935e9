"""Who is measured: our backends and their peers, each importable or absent with the reason.

Every contender is one function `norm(x, weight, residual)` that returns y, or (y, x + residual),
and that autograd can differentiate. All work on the same tensors with the same eps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swathe.kernels.core.registry import registered
from swathe.kernels.norm import eager
from swathe.kernels.norm.api import OP, resolve_rms_norm, rms_norm
from swathe.kernels.norm.contract import EPS

Norm = Callable[[Tensor, Tensor, Tensor | None], Any]

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
)


@dataclass(frozen=True)
class Contender:
    """`prepare()` makes the function anew for every cell; `absent` says why there is none here.

    `ours` marks the backend that the comparison is about.
    """

    name: str
    prepare: Callable[[Tensor, Tensor, bool], Norm]
    absent: str | None = None
    ours: bool = False


def contenders(device: str, *, compiled: bool = True) -> list[Contender]:
    """Every contender on `device`, ours first: present ones and absent ones with their reason.

    `compiled=False` leaves torch.compile out, as a dry run does.
    """
    names = ("triton",) if device == "cuda" else ("cpp",)
    ours = [_backend(name) for name in names]
    no_compile = None if compiled else "left out of this run"
    peers = [
        Contender("eager", lambda x, w, r: _eager),
        Contender("torch", lambda x, w, r: _torch),
        Contender("compile", _compile, no_compile),
    ]
    if device == "cuda":
        peers += [_liger(), _quack()]
    return [*ours, *peers]


def _backend(name: str) -> Contender:
    def prepare(x: Tensor, weight: Tensor, residual: bool) -> Norm:
        choice = resolve_rms_norm(x, weight, name, residual=residual)
        return lambda x, w, r: rms_norm(x, w, EPS, residual=r, implementation=choice)

    return Contender(name, prepare, registered(OP)[name].missing(), ours=True)


def _eager(x: Tensor, weight: Tensor, residual: Tensor | None) -> Any:
    """What transformers' LlamaRMSNorm executes, op for op, after the decoder layer's addition."""
    return eager.rms_norm(x, weight, EPS, 0.0, "llama", residual)


def _torch(x: Tensor, weight: Tensor, residual: Tensor | None) -> Any:
    if residual is None:
        return F.rms_norm(x, weight.shape, weight, EPS)
    h = x + residual
    return F.rms_norm(h, weight.shape, weight, EPS), h


def _compile(x: Tensor, weight: Tensor, residual: bool) -> Norm:
    # fresh for every cell: a second shape would otherwise recompile to dynamic sizes
    torch._dynamo.reset()
    return torch.compile(_eager, dynamic=False, fullgraph=True)


def _liger() -> Contender:
    module, absent = peer("liger_kernel.transformers.functional")
    if absent or module is None:
        return Contender("liger", _nothing, absent)

    def norm(x: Tensor, weight: Tensor, residual: Tensor | None) -> Any:
        # in_place would overwrite dy, which every timed call shares
        if residual is None:
            return module.liger_rms_norm(x, weight, EPS, in_place=False)
        return module.liger_fused_add_rms_norm(x, residual, weight, EPS, in_place=False)

    return Contender("liger", lambda x, w, r: norm)


def _quack() -> Contender:
    module, absent = peer("quack.rmsnorm")
    if absent or module is None:
        return Contender("quack", _nothing, absent)

    def norm(x: Tensor, weight: Tensor, residual: Tensor | None) -> Any:
        return module.rmsnorm(x, weight, residual=residual, eps=EPS, prenorm=residual is not None)

    return Contender("quack", lambda x, w, r: norm)


def _nothing(x: Tensor, weight: Tensor, residual: bool) -> Norm:
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
