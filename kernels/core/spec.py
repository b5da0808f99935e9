"""What a call asks for (`Spec`) and what a backend can do (`Capabilities`), as plain facts.

`Capabilities.reasons(spec)` compares the two. It returns sentences rather than a truth value: the
same list is the error a user reads, the row `explain` prints and the condition tests rely on.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from swathe.kernels.core.device import arch

ANY = "any"  # in `Capabilities.features`: every value of that feature is served
FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})
FLOATS_AND_DOUBLE = FLOATS | {torch.float64}


@dataclass(frozen=True, slots=True)
class Spec:
    """The facts one call, or one module, presents to a backend.

    `size` is the op's own measure (row length of a norm, head size of attention), `arch` the
    compute capability times ten. `features` are the op's options that are not at their default.
    """

    op: str
    device: str
    dtype: torch.dtype
    size: int
    arch: int | None = None
    grad: bool = False
    compiled: bool = False
    features: tuple[tuple[str, Hashable], ...] = ()

    @classmethod
    def of(
        cls,
        op: str,
        x: Tensor,
        *,
        size: int,
        grad: bool,
        compiled: bool = False,
        **features: Hashable,
    ) -> Spec:
        """Facts of a call on tensor `x`; features that are None or False are left out."""
        return cls.on(op, x.device, x.dtype, size=size, grad=grad, compiled=compiled, **features)

    @classmethod
    def on(
        cls,
        op: str,
        device: torch.device,
        dtype: torch.dtype,
        *,
        size: int,
        grad: bool,
        compiled: bool = False,
        **features: Hashable,
    ) -> Spec:
        """The same from a device and a dtype, where there is no tensor yet."""
        asked = tuple(
            (k, v) for k, v in sorted(features.items()) if v is not None and v is not False
        )
        return cls(op, device.type, dtype, size, arch(device), grad, compiled, asked)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        where = f"{self.device} sm_{self.arch}" if self.arch else self.device
        asked = "".join(f", {k}={_name(v)}" for k, v in self.features)
        return f"{self.op}({dtype} on {where}, size {self.size}{asked}, grad={self.grad})"


@dataclass(frozen=True)
class Capabilities:
    """What a backend serves. A feature that is not named here is not served.

    `features` maps a feature's name to the values served, or to ANY. `max_size=None` is no limit.
    `deterministic` and `graph_capture` are promises that the contract suite checks.
    """

    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    features: Mapping[str, frozenset[Hashable] | str] = field(default_factory=dict)
    backward: bool = True
    deterministic: bool = True
    graph_capture: bool = True
    min_arch: int | None = None
    max_size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", MappingProxyType(dict(self.features)))

    def reasons(self, spec: Spec) -> list[str]:
        """Every reason why `spec` is not served; an empty list means that it is."""
        found = []
        if spec.device not in self.devices:
            found.append(f"runs on {_list(self.devices)}, not on {spec.device}")
        if spec.arch is not None and self.min_arch is not None and spec.arch < self.min_arch:
            found.append(f"needs sm_{self.min_arch} or later, not sm_{spec.arch}")
        if spec.dtype not in self.dtypes:
            found.append(f"takes {_list(self.dtypes)}, not {_name(spec.dtype)}")
        if spec.grad and not self.backward:
            found.append("has no backward")
        if self.max_size is not None and spec.size > self.max_size:
            found.append(f"takes sizes up to {self.max_size}, not {spec.size}")
        for name, value in spec.features:
            served = self.features.get(name)
            if served is None:
                found.append(f"does not serve {name}={_name(value)}")
            elif served != ANY and value not in served:
                found.append(f"serves {name}={_list(served)}, not {_name(value)}")
        return found


def _name(value: object) -> str:
    return str(value).removeprefix("torch.") if not isinstance(value, (str, tuple)) else repr(value)


def _list(values: object) -> str:
    assert isinstance(values, frozenset)
    return " or ".join(sorted(map(_name, values)))
