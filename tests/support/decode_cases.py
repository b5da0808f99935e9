"""Caches under test for decoding kernels: calls, what they must give, and the same in pages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from support.tensors import DEVICE, rows
from swathe.kernels.attention.eager import attention
from swathe.kernels.attention.mask import Mask
from swathe.kernels.attention.spec import AttentionSpec

NAN = float("nan")


class Case(NamedTuple):
    """B sequences of `lengths`, T new tokens of H heads, a cache of S keys of K heads."""

    lengths: tuple[int, ...]
    H: int
    K: int
    T: int
    S: int
    D: int
    E: int
    dtype: torch.dtype

    @property
    def mask(self) -> Mask:
        return Mask.cached(torch.tensor(self.lengths, device=DEVICE), self.T)

    def inputs(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q, and k and v that are NaN where a sequence has no keys, as views of (B, S, K, D)."""
        B = len(self.lengths)
        q, k, v = (
            rows(B, n, heads, d, dtype=self.dtype, seed=seed + i).transpose(1, 2)
            for i, (n, heads, d) in enumerate(
                ((self.T, self.H, self.D), (self.S, self.K, self.D), (self.S, self.K, self.E))
            )
        )
        for b, n in enumerate(self.lengths):
            k[b, :, n:], v[b, :, n:] = NAN, NAN
        return q, k, v


def check(
    o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask, **scores: Any
) -> tuple[Tensor, Tensor]:
    """Every element within 4 u of the sum of absolute terms; returns gold and eager."""
    scale = scores.pop("scale", q.shape[3] ** -0.5)
    spec = AttentionSpec(mask, scale, lse=True, **scores)
    k, v = k.nan_to_num(0.0), v.nan_to_num(0.0)
    wide = replace(spec, mask=replace(mask, bias=None if mask.bias is None else _wide(mask.bias)))
    q64, k64, v64 = q.double(), k.double(), v.double()
    gold, gold_lse = attention(q64, k64, v64, wide)
    size, _ = attention(q64, k64, v64.abs(), wide)
    u = torch.finfo(q.dtype).eps / 2
    # scores are fp32, and their error is their own size times its rounding
    reach = q64.norm(dim=-1).max() * k64.norm(dim=-1).max() * abs(scale)
    assert (lse.isinf() == gold_lse.isinf()).all()
    error = (lse - gold_lse).nan_to_num(0.0).abs()
    assert (error <= 1e-5 * (1 + reach)).all()
    assert ((o.double() - gold).abs() <= (4 * u + reach * 2**-23) * size + 1e-30).all()
    return gold, attention(q, k, v, spec)[0]


def _wide(bias: Tensor) -> Tensor:
    hidden = bias == torch.finfo(bias.dtype).min
    return bias.double().masked_fill(hidden, torch.finfo(torch.float64).min)


def paged(k: Tensor, v: Tensor, page: int, lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The same cache in shuffled pages; table entries past a sequence's keys are garbage."""
    B, K, S, _ = k.shape
    need = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(need) + 2, generator=torch.Generator().manual_seed(3)).tolist()
    of_k = torch.full((sum(need) + 2, page, K, k.shape[3]), NAN, dtype=k.dtype, device=k.device)
    of_v = torch.full((sum(need) + 2, page, K, v.shape[3]), NAN, dtype=v.dtype, device=v.device)
    table = torch.full((B, -(-S // page)), 2**31 - 1, dtype=torch.int32, device=k.device)
    table[:, ::2] = -1
    for b in range(B):
        for i in range(need[b]):
            table[b, i] = at = order.pop()
            begin, end = i * page, min((i + 1) * page, S)
            of_k[at, : end - begin] = k[b, :, begin:end].transpose(0, 1)
            of_v[at, : end - begin] = v[b, :, begin:end].transpose(0, 1)
    return of_k.transpose(1, 2), of_v.transpose(1, 2), table
