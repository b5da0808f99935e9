"""What bench needs to know of one op; bench/ops/ holds one instance for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swathe.kernels.core.contract import Contract, Problem
from swathe.kernels.core.registry import Choice

Function = Callable[..., Any]
# in the order of a whole run: what trains and serves every model first, but attention, which takes
# longest and gets what the others leave
OPS = (
    "rms_norm",
    "rotary",
    "gated_mlp_act",
    "qk_norm_rotary",
    "linear_cross_entropy",
    "cross_entropy",
    "layer_norm",
    "attention",
)

# what a CPU is measured at: one token, a few and a sequence, of as many features as models have
ROWS, COLUMNS = (1, 16, 2048), (576, 2048, 4096)
HEADS = {576: (9, 3, 64), 2048: (32, 8, 64), 4096: (32, 8, 128)}  # of q, of k, their features


class Variant(NamedTuple):
    """What one timed call does; `form` tells the subject which kind of problem to draw.

    `alone`: the backward without its forward, which is made once beforehand.
    """

    name: str
    form: str
    backward: bool
    alone: bool = False

    def of(self, cost: Callable[[Problem, bool], int], problem: Problem) -> int:
        """Bytes or flops of this call, from cost(problem, backward)."""
        whole = cost(problem, self.backward)
        return whole - cost(problem, False) if self.alone else whole


@dataclass(frozen=True)
class Peer:
    """Another library's implementation, or why it is not here.

    `prepare(problem)` gives a function that takes the op's own keywords; it is asked anew for every
    cell and may raise for what the library does not serve.
    """

    name: str
    prepare: Callable[[Problem], Function]
    absent: str | None = None


@dataclass(frozen=True)
class Subject:
    """One op under measurement.

    draw     draw(shape, dtype, form, device, seed): random inputs, made on the device itself.
    eager    what transformers executes, with the op's keywords.
    peers    everyone else on a device, torch's own op included, torch.compile not.
    gpu, cpu, tiny   shapes by occasion, each a named tuple whose first field is its name; training
             shapes first. `probes` are small shapes that together run every kernel.
    quick    names of shapes of `cpu` that stand for all of them; the first with torch.compile.
    probed   the probe whose kernels a shape takes.
    traffic  fewest bytes a call can move: traffic(problem, backward).
    flops    of the matrix products that a call needs, where these and not bytes bound it.
    choose   the backend chosen once, as a layer does.
    timed    timed(shape, variant): whether the two are measured together.
    left_out left_out("eager" or "compile", problem): why that is not measured, None where it is.
    large    shapes of the contract's run on large tensors; `gpu` unless given.
    more     checks of the op's own by name, check(backend, device, dry), besides bench.parity's.
    """

    contract: Contract
    draw: Callable[[Any, torch.dtype, str, str, int], Problem]
    eager: Function
    peers: Callable[[str], list[Peer]]
    choose: Callable[[Problem, str], Choice]
    gpu: tuple[Any, ...]
    cpu: tuple[Any, ...]
    tiny: tuple[Any, ...]
    probes: Mapping[str, Any]
    probed: Callable[[Any], str]
    traffic: Callable[[Problem, bool], int]
    forms: tuple[str, ...] = ("",)
    quick: tuple[str, ...] = ()
    second_look: tuple[str, ...] = ()
    host: tuple[str, ...] = ()
    checked: Mapping[str, Any] = field(default_factory=dict)
    huge: Callable[[str, str, bool], str] | None = None
    flops: Callable[[Problem, bool], int] | None = None
    timed: Callable[[Any, Variant], bool] = lambda shape, variant: True
    left_out: Callable[[str, Problem], str | None] = lambda name, problem: None
    large: tuple[Any, ...] | None = None
    more: Mapping[str, Callable[[str, str, bool], str]] = field(default_factory=dict)

    @property
    def op(self) -> str:
        """The op's name in the registry."""
        return self.contract.op

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Forward and forward+backward of every form, and the backward alone of the first."""
        both = tuple(
            Variant(f"{form} {direction}".strip(), form, direction != "forward")
            for form in self.forms
            for direction in ("forward", "forward+backward")
        )
        first = self.forms[0]
        return (*both, Variant(f"{first} backward".strip(), first, backward=True, alone=True))

    def variants_of(self, shape: Any) -> tuple[Variant, ...]:
        """Those that a shape is measured in."""
        return tuple(variant for variant in self.variants if self.timed(shape, variant))

    def variant(self, name: str) -> Variant:
        """A variant by name."""
        return next(v for v in self.variants if v.name == name)

    def shape(self, name: str) -> Any:
        """A shape by name."""
        known = (self.gpu, self.cpu, self.tiny, self.probes.values(), self.checked.values())
        return next(s for s in chain(*known, self.large or ()) if s.name == name)


@lru_cache
def subject(op: str) -> Subject:
    """The subject of an op; ValueError for one that is not measured."""
    if op not in OPS:
        raise ValueError(f"no benchmark for op {op!r}; there are: {', '.join(OPS)}")
    return import_module(f"bench.ops.{op}").SUBJECT


def size(shape: Any) -> str:
    """A shape's numbers as tables show them."""
    return " x ".join(str(n) for n in shape[1:])


def grid(make: Callable[[str, int, int], Any]) -> tuple[Any, ...]:
    """make(name, rows, columns) for each of ROWS by each of COLUMNS."""
    return tuple(make(f"{rows}x{columns}", rows, columns) for columns in COLUMNS for rows in ROWS)


def head_grid(make: Callable[..., Any]) -> tuple[Any, ...]:
    """The grid for ops on heads: one sequence of as many tokens, q of as many features."""

    def of(name: str, rows: int, columns: int) -> Any:
        *heads, features = HEADS[columns]
        return make(name, 1, rows, *heads, features, features)

    return grid(of)


def on_grid(shape: Any, variant: Variant) -> bool:
    """A form beside the plain one is measured at the grid's middle columns only."""
    return not variant.form or not shape.name[0].isdigit() or shape.name.endswith("x2048")


def bytes_of(*tensors: Tensor | None) -> int:
    """What reading or writing each of these once moves."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def each_once(problem: Problem, backward: bool) -> int:
    """Every input and table read once, every output written once.

    A backward reads the inputs again and what arrives, and writes a gradient for each input.
    """
    inputs, outputs = bytes_of(*problem.inputs.values()), bytes_of(*problem.arriving.values())
    tables = bytes_of(*(v for v in problem.options.values() if isinstance(v, Tensor)))
    forward = inputs + tables + outputs
    return forward + (2 * inputs + tables + outputs) * backward
