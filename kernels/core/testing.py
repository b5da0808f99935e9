"""The numerical contract: what every backend of every op must reach, ours and third parties' alike.

    gold   the op in fp64 on the already rounded inputs
    ideal  gold, rounded once to the output's dtype
    eager  Hugging Face's eager code in that dtype
    rho_ideal = rms(ours - gold) / rms(ideal - gold)
    rho_eager = rms(ours - gold) / rms(eager - gold)

Both ratios are pooled over at least MIN_POOL elements for each output and dtype: on a small tensor
the ratio of two maxima is noise. Besides the pool, every single element is bounded, which needs no
eager code and sees one wrong element among a million.

An op describes itself in its folder's `contract.py`; this file knows no op.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

MIN_POOL = 10_000


class Bound(NamedTuple):
    """Largest allowed rho_ideal and rho_eager in bf16 and fp16."""

    ideal: float
    eager: float


# the one table of bounds; fp32 is held to FP32_EAGER instead
BOUNDS = {
    "row-wise": Bound(1.02, 0.80),
    "rounded once": Bound(1.02, 1.02),  # by eager too
    "linear_cross_entropy": Bound(1.05, 0.60),
    "attention.o": Bound(1.5, 0.75),
    "attention.dq": Bound(1.8, 0.85),
    "attention.dk": Bound(1.8, 0.85),
    "attention.dv": Bound(1.7, 0.85),
}
FP32_EAGER = 1.25

# unit roundoff: half the distance between 1 and the next number
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
_SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149}
# fp32 arithmetic between load and store, in units of 2^-24 of the formula on absolute values
_ARITHMETIC = 16


class ContractBroken(AssertionError):
    """A backend missed a bound; the message lists every miss of the run."""


@dataclass
class Pool:
    """Squared errors of one output in one dtype, gathered over many cases."""

    name: str
    dtype: torch.dtype
    count: int = 0
    ours: float = 0.0
    ideal: float = 0.0
    eager: float = 0.0

    def add(self, ours: Tensor, gold: Tensor, eager: Tensor) -> None:
        """Add one case; `gold` is fp64, the others are in the output's dtype."""
        self.count += gold.numel()
        self.ours += (ours.double() - gold).square().sum().item()
        self.ideal += (gold.to(self.dtype).double() - gold).square().sum().item()
        self.eager += (eager.double() - gold).square().sum().item()

    @property
    def rho_ideal(self) -> float:
        """rms error in units of a single rounding's."""
        return _root_ratio(self.ours, self.ideal)

    @property
    def rho_eager(self) -> float:
        """rms error in units of eager's."""
        return _root_ratio(self.ours, self.eager)

    def misses(self, bound: Bound) -> list[str]:
        """Every bound that this output misses; an empty list is a pass."""
        if self.count < MIN_POOL:
            return [f"{self}: pooled over {self.count} elements; {MIN_POOL} are needed"]
        if self.dtype == torch.float32:
            return self._over("rho_eager", self.rho_eager, FP32_EAGER)
        # eager code that itself rounds only once cannot be beaten by more than noise
        eager_limit = max(bound.eager, bound.ideal / _root_ratio(self.eager, self.ideal))
        return [
            *self._over("rho_ideal", self.rho_ideal, bound.ideal),
            *self._over("rho_eager", self.rho_eager, eager_limit),
        ]

    def _over(self, what: str, value: float, limit: float) -> list[str]:
        return [] if value <= limit else [f"{self}: {what} {value:.3f}, allowed {limit:.3f}"]

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"


@dataclass
class Report:
    """Outcome of one backend's run: a pool for each output and dtype, and every miss."""

    subject: str
    pools: dict[tuple[str, torch.dtype], Pool] = field(default_factory=dict)
    misses: list[str] = field(default_factory=list)

    def pool(self, name: str, dtype: torch.dtype) -> Pool:
        """The pool of one output, made on first use."""
        return self.pools.setdefault((name, dtype), Pool(name, dtype))

    def settle(self, bound: Callable[[str], Bound]) -> None:
        """Hold every pool to `bound(name)` and raise ContractBroken if anything was missed."""
        for pool in self.pools.values():
            self.misses += pool.misses(bound(pool.name))
        if self.misses:
            raise ContractBroken(f"{self.subject}:\n  " + "\n  ".join(self.misses))

    def rows(self) -> list[dict[str, str | float | int]]:
        """One record for each pool, for tables and JSON."""
        return [
            {
                "output": pool.name,
                "dtype": str(pool.dtype).removeprefix("torch."),
                "rho_ideal": round(pool.rho_ideal, 4),
                "rho_eager": round(pool.rho_eager, 4),
                "elements": pool.count,
            }
            for pool in self.pools.values()
        ]


def elementwise_miss(
    name: str,
    ours: Tensor,
    gold: Tensor,
    magnitude: Tensor,
    roundings: int = 1,
    share: float | None = None,
) -> str | None:
    """The worst element if one is further from gold than its roundings explain, else None.

    Allowed is 1.02 u |gold| for each rounding to the output's dtype, and 16 * 2^-24 of `magnitude`
    (the formula on absolute values) for the fp32 arithmetic before it; or, where what it is made
    of is rounded as well, a `share` of `magnitude`.
    """
    if share is None:
        unit = 0.0 if ours.dtype == torch.float32 else 1.02 * roundings * UNIT[ours.dtype]
        allowed = unit * gold.abs() + _ARITHMETIC * 2.0**-24 * magnitude
    else:
        allowed = share * magnitude
    allowed = allowed + _SMALLEST[ours.dtype]
    # gold beyond the dtype's range must round to infinity of the same sign
    over = gold.abs() > torch.finfo(ours.dtype).max
    infinite = over & (ours.double() == gold.to(ours.dtype).double())
    excess = torch.where(infinite, 0.0, ours.double() - gold).abs() - allowed
    if not (excess > 0).any() and not excess.isnan().any():
        return None
    at = int(excess.nan_to_num(nan=torch.inf).argmax())
    return (
        f"{name}: element {at} of {tuple(ours.shape)} is {ours.flatten()[at].item():.9g}, gold "
        f"{gold.flatten()[at].item():.9g}, allowed error {allowed.flatten()[at].item():.3g}"
    )


def _root_ratio(a: float, b: float) -> float:
    if b == 0.0:
        return 1.0 if a == 0.0 else float("inf")
    return (a / b) ** 0.5
