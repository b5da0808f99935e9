"""Attention of any length in fp64, a tile of rows at a time, and how much arithmetic a call takes.

The definition's (T, S) tensors would not fit where what is timed is long: 32k tokens of 32 heads
are 275 GB in fp64. Serves masks that are row intervals, and scores that are only scaled.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from swathe.kernels.attention.contract import spec_of
from swathe.kernels.attention.spec import AttentionSpec
from swathe.kernels.core.contract import Outputs, Problem

TILE = 1 << 27  # scores at a time


def whole(problem: Problem) -> Problem:
    """The same call as the contract knows it: with lse, at which nothing arrives."""
    q = problem.inputs["q"]
    lse = torch.zeros(q.shape[:3], dtype=torch.float32, device=q.device)
    options = {name: value for name, value in problem.options.items() if name != "lse"}
    return replace(problem, options=options, arriving={**problem.arriving, "lse": lse})


def gold(problem: Problem) -> Outputs:
    """o and the gradients of q, k and v."""
    exact = whole(problem).to(torch.float64)
    spec, do = spec_of(exact), exact.arriving["o"]
    q, k, v = (exact.inputs[name] for name in ("q", "k", "v"))
    (B, H, T), (K, S), E = q.shape[:3], k.shape[1:3], v.shape[3]
    bounds = tuple(b.expand(B, T) for b in spec.mask.bounds(T, S, q.device))
    o, dq, dk, dv = q.new_zeros(B, T, H, E), *(torch.zeros_like(t) for t in (q, k, v))
    step = max(1, TILE // max(1, S * (H // K)))
    for b in range(B):
        for g in range(K):
            heads = slice(g * (H // K), (g + 1) * (H // K))
            for start in range(0, T, step):
                rows = slice(start, min(T, start + step))
                visible = _visible(bounds[0][b, rows], bounds[1][b, rows], S)
                o[b, rows, heads], dq[b, heads, rows], dk_part, dv_part = _tile(
                    q[b, heads, rows], k[b, g], v[b, g], do[b, rows, heads], visible, spec.scale
                )
                dk[b, g] += dk_part
                dv[b, g] += dv_part
    return {"o": o, "dq": dq, "dk": dk, "dv": dv}


def _visible(first: Tensor, last: Tensor, S: int) -> Tensor:
    key = torch.arange(S, device=first.device)
    return (key >= first[:, None]) & (key < last[:, None])


def _tile(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o (R, G, E) and dq (G, R, D) of rows that share keys, and what they add to dk and dv."""
    z = (scale * (q @ k.mT)).masked_fill_(~visible, -torch.inf)
    p = torch.softmax(z, -1).masked_fill_(~visible, 0.0)  # a row that sees nothing is NaN before
    del z
    o, do = p @ v, do.transpose(0, 1)
    dz = p * (do @ v.mT - (do * o).sum(-1, keepdim=True))
    dv, dk = (p.mT @ do).sum(0), scale * (dz.mT @ q).sum(0)
    return o.transpose(0, 1), scale * (dz @ k), dk, dv


def pairs(spec: AttentionSpec, q: Tensor, S: int) -> int:
    """How often a query sees a key, over all sequences and heads."""
    B, H, T, _ = q.shape
    first, last = spec.mask.bounds(T, S, q.device)
    seen = (last.clamp(max=S) - first.clamp(min=0)).clamp(min=0).expand(B, T)
    return int(seen.sum()) * H


def flops(problem: Problem, backward: bool) -> int:
    """Of the matrix products that a call cannot do without: two forward, five more backward."""
    (q, k, v), spec = problem.inputs.values(), spec_of(whole(problem))
    D, E = q.shape[3], v.shape[3]
    each = D + E + (3 * D + 2 * E) * backward
    return 2 * pairs(spec, q, k.shape[2]) * each
