"""Which keys each query row sees, as data that every attention backend can read.

A query row t of T sits at key position t + S - T: the last row is aligned with the last key. Key
position s is visible to it where every part that is present agrees:

    causal        s <= t + S - T
    window        s >  t + S - T - window
    start, end    start <= s < end      int tensors (B,), or (B, T) for packed documents
    keys          keys[b, s]            bool (B, S): padding with holes, or not looked at
    allowed       allowed[b, h, t, s]   bool, broadcastable to (B, H, T, S)
    bias          bias[b, h, t, s]      added to the scores; its dtype's lowest value hides a key

The first three are row intervals: a kernel turns them into two integers a row and never forms a
(T, S) mask. A row that sees no key gives 0 and passes no gradient, on every backend.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Formed = tuple[Tensor, Tensor, Tensor | None]  # visible, dense, empty rows


@dataclass(frozen=True)
class Mask:
    """One description for all layers of a forward; see the module's docstring for the parts.

    Make one a forward and let it go: it keeps the (T, S) tensors that a backend made it form.
    `rows_may_be_empty=False` promises that every row sees a key, which saves work.
    """

    causal: bool = False
    window: int | None = None
    start: Tensor | None = None
    end: Tensor | None = None
    keys: Tensor | None = None
    allowed: Tensor | None = None
    bias: Tensor | None = None
    rows_may_be_empty: bool = True
    _formed: dict[tuple[int, int, torch.device], Formed] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def packed(cls, cu_seqlens: Tensor, length: int, *, causal: bool = True) -> Mask:
        """Documents laid end to end in one row; `cu_seqlens` (documents + 1,) holds the borders."""
        positions = torch.arange(length, device=cu_seqlens.device)
        document = torch.searchsorted(cu_seqlens, positions, right=True) - 1
        start, end = cu_seqlens[document], cu_seqlens[document + 1]
        return cls(causal=causal, start=start[None], end=end[None], rows_may_be_empty=False)

    @property
    def interval(self) -> bool:
        """Whether row intervals say everything, so that a kernel needs no (T, S) tensor."""
        return self.keys is None and self.allowed is None and self.bias is None

    @property
    def trivial(self) -> bool:
        """Whether nothing but causality is asked for."""
        return self.interval and self.window is None and self.start is None and self.end is None

    def with_causal(self) -> Mask:
        """The same mask, causal as well."""
        return self if self.causal else replace(self, causal=True)

    def visible(self, T: int, S: int, device: torch.device) -> Tensor:
        """Boolean (1 or B, 1 or H, T, S): True where a row sees a key. Formed once per mask."""
        return self._form(T, S, device)[0]

    def dense(self, T: int, S: int, device: torch.device) -> Tensor:
        """What torch's SDPA takes: `visible`, or with a bias the bias, -inf where hidden.

        Rows that see no key are opened to every key, so that no backend divides by zero; the
        caller zeroes their output (`empty_rows`).
        """
        return self._form(T, S, device)[1]

    def empty_rows(self, T: int, S: int, device: torch.device) -> Tensor | None:
        """Boolean (1 or B, 1 or H, T, 1): True where a row sees no key; None where none can be."""
        return self._form(T, S, device)[2]

    def _form(self, T: int, S: int, device: torch.device) -> Formed:
        key = T, S, device
        if key not in self._formed:
            visible = opened = self._visible(T, S, device)
            empty = None
            if self.rows_may_be_empty:
                empty = ~visible.any(-1, keepdim=True)
                opened = visible | empty
            if self.bias is not None:
                opened = self.bias.masked_fill(~opened, float("-inf"))
                opened = opened if empty is None else opened.masked_fill(empty, 0.0)
            self._formed[key] = visible, opened, empty
        return self._formed[key]

    def _visible(self, T: int, S: int, device: torch.device) -> Tensor:
        key = torch.arange(S, device=device)
        row = torch.arange(S - T, S, device=device)[:, None]
        visible = torch.ones(1, 1, T, S, dtype=torch.bool, device=device)
        if self.causal:
            visible = visible & (key <= row)
        if self.window is not None:
            visible = visible & (key > row - self.window)
        if self.start is not None:
            visible = visible & (key >= _as_rows(self.start))
        if self.end is not None:
            visible = visible & (key < _as_rows(self.end))
        if self.keys is not None:
            visible = visible & self.keys[:, None, None, :]
        if self.allowed is not None:
            visible = visible & self.allowed
        if self.bias is not None:
            visible = visible & (self.bias > torch.finfo(self.bias.dtype).min)
        return visible


def _as_rows(bound: Tensor) -> Tensor:
    """(B,) or (B, T) as (B, 1, T or 1, 1)."""
    return bound.view(bound.shape[0], 1, -1, 1)
