"""Attention's Gluon launchers differentiated as the public function is, for the contract.

The forward is a formula in fp32 unless a test wants the kernel's, which has tests of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from support.attention_gluon import rows_of
from swathe.kernels.attention._triton_rows import Rows
from swathe.kernels.attention.contract import CONTRACT, spec_of
from swathe.kernels.attention.eager import expand_heads
from swathe.kernels.attention.op import fused
from swathe.kernels.core.contract import Case, Contract, Problem, measure
from swathe.kernels.core.testing import Report

LOG2E = 1.4426950408889634
_numbers = count()


def formula(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """o (B, T, H, E) and lse2 of row intervals, softcap, ALiBi and sinks, by fp32 arithmetic."""
    rows, (H, T), S = Rows(*rest), q.shape[1:3], k.shape[2]
    wide_k, wide_v = expand_heads(k.float(), H), expand_heads(v.float(), H)
    z, n = rows.scale * q.float() @ wide_k.mT, torch.arange(S)
    if rows.softcap:
        z = rows.softcap * torch.tanh(z / rows.softcap)
    if rows.alibi is not None:
        place = torch.arange(T) + S - T if rows.places is None else rows.places
        z = z + rows.alibi.view(-1, H, 1, 1) * (n - place[..., None]).view(-1, 1, T, S)
    seen = (n >= rows.first[..., None]) & (n < rows.last[..., None])
    z = z.masked_fill(~seen[:, None], -torch.inf)
    sinks = torch.full((H,), -torch.inf) if rows.sinks is None else rows.sinks
    lse = torch.logsumexp(torch.cat((z, sinks.view(1, H, 1, 1).expand(*z.shape[:3], 1)), -1), -1)
    p = torch.exp(z - lse.where(lse > -torch.inf, 0.0)[..., None])
    return (p @ wide_v).transpose(1, 2).contiguous().to(q.dtype), lse * LOG2E


def contract_of(
    backward: Callable[..., Any], forward: Callable[..., tuple[Tensor, Tensor]] = formula
) -> Contract:
    """Attention's contract on these two launchers, with op.py's autograd around them."""
    name = f"gluon_launchers_{next(_numbers)}"
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(forward=forward, backward=backward)
    attention = fused(name, name)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None, **options: Any
    ) -> Any:
        del options["implementation"]
        given = {"q": q, "k": k, "v": v} | ({} if sinks is None else {"sinks": sinks})
        return attention(q, k, v, spec_of(Problem(given, {}, options)))

    return replace(CONTRACT, function=attend)


def misses(contract: Contract, problem: Problem) -> list[str]:
    """What the contract says of single elements of one problem, gradients included."""
    report = Report(problem.label)
    measure(contract, report, Case("", problem), "gluon")
    return report.misses


class Call(NamedTuple):
    """Arguments of the launcher, whose last are the fields of Rows."""

    do: Tensor
    dlse: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor
    rows: Rows

    @property
    def arguments(self) -> tuple[Any, ...]:
        return *self[:7], *self.rows


def call_of(problem: Problem) -> Call:
    """A call for the gradients that arrive at a problem's outputs."""
    q, k, v = (problem.inputs[name] for name in "qkv")
    rows = rows_of(spec_of(problem), q, k)
    o, lse = formula(q, k, v, *rows)
    return Call(problem.arriving["o"], problem.arriving["lse"].contiguous(), q, k, v, o, lse, rows)
