"""What launchers take of a mask and of the scores, as kernels want it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from swathe.kernels.attention.op import strides_of
from swathe.kernels.core.rows import unit_rows


class Rows(NamedTuple):
    """What the launchers take of a mask and of the scores, in the order of the operators."""

    first: Tensor
    last: Tensor
    places: Tensor | None
    keys: Tensor | None
    allowed: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    alibi: Tensor | None
    seed: Tensor | None
    scale: float
    softcap: float
    dropout: float
    padded: bool

    @property
    def masks(self) -> tuple[Tensor | None, ...]:
        """Tensors from alibi to seed, as kernels take them."""
        keys = None if self.keys is None else unit_rows(self.keys).view(torch.uint8)
        allowed = None if self.allowed is None else self.allowed.view(torch.uint8)
        return self.alibi, keys, allowed, self.bias, self.seed

    def strides(self, heads: int) -> tuple[int, ...]:
        """Of places, alibi, keys, allowed and bias, 0 where they are broadcast."""
        return (
            0 if self.places is None or self.places.shape[0] == 1 else self.places.stride(0),
            heads if self.alibi is not None and self.alibi.dim() == 2 else 0,
            0 if self.keys is None or self.keys.shape[0] == 1 else unit_rows(self.keys).stride(0),
            *strides_of(self.allowed),
            *strides_of(self.bias),
        )

    @property
    def bounds(self) -> tuple[int, ...]:
        """Strides of first and last, which have one shape."""
        return tuple(
            0 if n == 1 else stride
            for n, stride in zip(self.first.shape, self.first.stride(), strict=True)
        )

    def numbers(self, q: Tensor, k: Tensor) -> tuple[int | float, ...]:
        """What kernels take unspecialised."""
        (_, H, T, _), (_, K, S, _) = q.shape, k.shape
        lowest = 0.0 if self.bias is None else torch.finfo(self.bias.dtype).min
        scores = (float(self.scale), float(self.softcap), lowest, float(self.dropout))
        return (T, S, H, H // K, S - T, *scores)

    @property
    def dense(self) -> bool:
        """Whether every weight has a number of its own, of a mask, a bias or dropout."""
        return not (self.allowed is None and self.bias is None and self.seed is None)

    @property
    def flags(self) -> tuple[bool, bool]:
        """SCORED: whether scores need more than a positive scale; SOFTCAP."""
        plain = self.softcap == 0.0 and self.alibi is None and self.bias is None
        return not plain or self.scale <= 0.0, self.softcap != 0.0
