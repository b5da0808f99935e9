"""Attention's Gluon launchers called as the public function is, for the contract to measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

from torch import Tensor

from swathe.kernels.attention._triton_rows import Rows
from swathe.kernels.attention.contract import CONTRACT, spec_of
from swathe.kernels.attention.spec import AttentionSpec
from swathe.kernels.core.contract import Case, Contract, Problem, measure
from swathe.kernels.core.testing import Report


def rows_of(spec: AttentionSpec, q: Tensor, k: Tensor) -> Rows:
    """What launchers are given for a call without dropout."""
    mask = spec.mask
    first, last = mask.bounds_int32(q.shape[2], k.shape[2], q.device)
    places = None if mask.places is None else mask.places.int().contiguous()
    sinks = None if spec.sinks is None else spec.sinks.float().contiguous()
    alibi = None if spec.alibi is None else spec.alibi.float().contiguous()
    return Rows(
        first, last, places, mask.keys, mask.allowed, mask.bias, sinks, alibi, None,
        float(spec.scale), float(spec.softcap or 0.0), 0.0, mask.padded,
    )  # fmt: skip


def attend(launchers: ModuleType) -> Callable[..., tuple[Tensor, Tensor]]:
    """`contract.attend` by the launchers' forward; refuses what they do not serve."""

    def function(
        q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        del options["implementation"]
        given = {"q": q, "k": k, "v": v} | ({} if sinks is None else {"sinks": sinks})
        rows = rows_of(spec_of(Problem(given, {}, options)), q, k)
        reason = launchers.why_not(q, k, v, rows)
        assert reason is None, reason
        o, lse2 = launchers.forward(q, k, v, *rows)
        return o, lse2 * 0.6931471805599453

    return function


def forward_contract(launchers: ModuleType) -> Contract:
    """Attention's contract on the launchers' forward."""
    return replace(CONTRACT, function=attend(launchers))


def misses(launchers: ModuleType, problem: Problem) -> list[str]:
    """What the contract says of single elements of one problem's o and lse."""
    report = Report(problem.label)
    measure(forward_contract(launchers), report, Case("", problem), "gluon", backward=False)
    return report.misses
