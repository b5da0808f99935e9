"""The Gluon launcher for caches, emulated."""

from __future__ import annotations

import math

from torch import Tensor

from support.gluon import Stats, emulated
from swathe.kernels.attention import _gluon_decode as decoding
from swathe.kernels.attention.mask import Mask


def run(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, table: Tensor | None = None,
    seed: int = 0, scale: float | None = None, softcap: float | None = None,
    alibi: Tensor | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Stats]:  # fmt: skip
    """o and lse, in a schedule that the seed picks, and what the kernel did."""
    T, S = q.shape[2], k.shape[2] * (1 if table is None else table.shape[1])
    bounds = mask.bounds_int32(T, S, q.device)
    places = None if mask.places is None else mask.places.int()
    scale = q.shape[3] ** -0.5 if scale is None else scale
    planes = (None, None, None)
    assert decoding.why_not(q, k, v, *planes, alibi, table) is None
    with emulated(seed=seed) as stats:
        o, lse2 = decoding.decode(
            q, k, v, *bounds, places, *planes, sinks, alibi, table, scale, softcap or 0.0
        )
    return o, lse2 * math.log(2.0), stats
