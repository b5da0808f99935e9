"""Which keys each query row sees, as data that every attention backend can read.

A query row t of T sits at key position r = places[b, t], t + S - T where no places are given: the
last row is aligned with the last key. Key position s is visible where every part present agrees:

    start, end    start <= s < end      int tensors (B,), or (B, T) for packed documents
    causal        s <= r
    prefix        or s < start + prefix int tensor (B,): keys of a prompt that all its rows see
    window        s >  r - window       sliding, to the left
    ahead         s <= r + ahead        to the right, for rows that are not causal
    chunk         (s - start) // chunk == (r - start) // chunk
    keys          keys[b, s]            bool (B, S): padding with holes, or not looked at
    allowed       allowed[b, h, t, s]   bool, broadcastable to (B, H, T, S)
    bias          bias[b, h, t, s]      added to the scores; its dtype's lowest value hides a key

The first six are row intervals: a kernel turns them into two integers a row (`bounds`) and never
forms a (T, S) mask. A row that sees no key gives 0 and passes no gradient, on every backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

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
    ahead: int | None = None
    chunk: int | None = None
    start: Tensor | None = None
    end: Tensor | None = None
    prefix: Tensor | None = None
    keys: Tensor | None = None
    allowed: Tensor | None = None
    bias: Tensor | None = None
    places: Tensor | None = None
    rows_may_be_empty: bool = True
    _formed: dict[tuple[int, int, torch.device], Formed] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _bounds: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("ahead", 0), ("chunk", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"Mask: {name}={value}; it must be {least} or more, or None")
        if self.prefix is not None and not self.causal:
            raise ValueError(
                "Mask: prefix is given without causal=True; rows that are not causal see every "
                "key of the prompt already, so leave prefix out"
            )

    @classmethod
    def packed(cls, cu_seqlens: Tensor, length: int, *, causal: bool = True) -> Mask:
        """Documents laid end to end in one row; `cu_seqlens` (documents + 1,) holds the borders."""
        return cls(causal=causal).in_documents(cu_seqlens, length)

    @classmethod
    def cached(cls, lengths: Tensor, rows: int, *, causal: bool = True) -> Mask:
        """New tokens of a cache with room to spare: `of_lengths` of a mask that is only causal."""
        return cls(causal=causal).of_lengths(lengths, rows)

    def in_documents(self, borders: Tensor, rows: int, keys: Tensor | None = None) -> Mask:
        """The same mask within documents laid end to end, in a row of `rows` queries.

        `borders` (documents + 1,) are those of the queries, and of the keys unless `keys` gives
        them: the last query of a document is then aligned with its last key.
        """
        row = torch.arange(rows, device=borders.device)
        # rows past the last border belong to the last document
        document = torch.searchsorted(borders, row, right=True).clamp(max=len(borders) - 1) - 1
        if keys is None:
            begin, end = borders[document], borders[document + 1]
            empty = not self.interval  # else every row sees itself
            return replace(self, start=begin[None], end=end[None], rows_may_be_empty=empty)
        places = row - borders[document + 1] + keys[document + 1]
        begin, end = keys[document], keys[document + 1]
        return replace(self, start=begin[None], end=end[None], places=places[None])

    def of_lengths(self, lengths: Tensor, rows: int) -> Mask:
        """The same mask where sequence b holds `lengths[b]` keys and its queries are the last.

        lengths: int (B,). Keys past them are never looked at.
        """
        places = lengths[:, None] - rows + torch.arange(rows, device=lengths.device)
        return replace(self, end=lengths, places=places)

    def from_key(self, first: int) -> Mask:
        """The same mask over a cache that has dropped its first `first` keys.

        Raises ValueError for chunks without a start, which begin at the first key.
        """
        if not first:
            return self
        if self.start is None and self.chunk is not None:
            raise ValueError(
                f"Mask: chunk={self.chunk} counts from the first key, and the cache has dropped "
                f"{first}; give start, or use a cache that keeps all keys"
            )
        start, end, places = (
            None if t is None else t - first for t in (self.start, self.end, self.places)
        )
        if start is None and self.prefix is not None:
            start = torch.full_like(self.prefix, -first)
        keys, allowed, bias = (
            t if t is None or t.shape[-1] == 1 else t[..., first:]
            for t in (self.keys, self.allowed, self.bias)
        )
        return replace(
            self, start=start, end=end, places=places, keys=keys, allowed=allowed, bias=bias
        )

    @property
    def interval(self) -> bool:
        """Whether row intervals say everything, so that a kernel needs no (T, S) tensor."""
        return self.keys is None and self.allowed is None and self.bias is None

    @property
    def trivial(self) -> bool:
        """Whether nothing but causality is asked for."""
        parts = (self.window, self.ahead, self.chunk, self.start, self.end, self.prefix)
        return self.interval and self.places is None and all(part is None for part in parts)

    @property
    def padded(self) -> bool:
        """Whether keys past a sequence's own end may hold anything, NaN included."""
        return self.end is not None and self.end.dim() == 1

    def with_causal(self) -> Mask:
        """The same mask, causal as well."""
        return self if self.causal else replace(self, causal=True)

    def bounds(self, T: int, S: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The first key that each row sees and the one past its last, int64 (1 or B, 1 or T).

        They may lie outside [0, S), and the first past the last where a row sees none.
        """
        row = self.rows(T, S, device)
        none, whole = row.new_zeros(1, 1), row.new_full((1, 1), S)
        low = none if self.start is None else _as_rows(self.start).long()
        first, last = low, whole if self.end is None else _as_rows(self.end).long()
        if self.causal:
            seen = row + 1
            if self.prefix is not None:
                seen = torch.maximum(seen, low + _as_rows(self.prefix).long())
            last = torch.minimum(last, seen)
        if self.window is not None:
            first = torch.maximum(first, row - self.window + 1)
        if self.ahead is not None:
            last = torch.minimum(last, row + self.ahead + 1)
        if self.chunk is not None:
            begin = row - (row - low) % self.chunk
            first, last = torch.maximum(first, begin), torch.minimum(last, begin + self.chunk)
        return first, last

    def rows(self, T: int, S: int, device: torch.device) -> Tensor:
        """The key position that each row sits at, int64 (1 or B, T)."""
        if self.places is not None:
            return self.places.long()
        return torch.arange(S - T, S, device=device)[None]

    def bounds_int32(self, T: int, S: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """`bounds` as kernels read them: int32, of one shape. Made once per mask."""
        return self._once(self._bounds, self._bounds_int32, T, S, device)

    def _bounds_int32(self, T: int, S: int, device: torch.device) -> tuple[Tensor, Tensor]:
        first, last = torch.broadcast_tensors(*(b.int() for b in self.bounds(T, S, device)))
        return first.contiguous(), last.contiguous()

    def _once(
        self, kept: dict[Any, Any], make: Callable[..., Any], T: int, S: int, device: torch.device
    ) -> Any:
        if torch.compiler.is_compiling():
            return make(T, S, device)  # sizes may be symbols, which are no keys
        key = T, S, device
        if key not in kept:
            kept[key] = make(T, S, device)
        return kept[key]

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
        return self._once(self._formed, self._made, T, S, device)

    def _made(self, T: int, S: int, device: torch.device) -> Formed:
        visible = opened = self._visible(T, S, device)
        empty = None
        if self.rows_may_be_empty:
            empty = ~visible.any(-1, keepdim=True)
            opened = visible | empty
        if self.bias is not None:
            opened = self.bias.masked_fill(~opened, float("-inf"))
            opened = opened if empty is None else opened.masked_fill(empty, 0.0)
        return visible, opened, empty

    def _visible(self, T: int, S: int, device: torch.device) -> Tensor:
        key = torch.arange(S, device=device)
        first, last = (bound[:, None, :, None] for bound in self.bounds(T, S, device))
        visible = (key >= first) & (key < last)
        visible = visible.expand(-1, -1, T, -1)
        if self.keys is not None:
            visible = visible & self.keys[:, None, None, :]
        if self.allowed is not None:
            visible = visible & self.allowed
        if self.bias is not None:
            visible = visible & (self.bias > torch.finfo(self.bias.dtype).min)
        return visible


def _as_rows(bound: Tensor) -> Tensor:
    """(B,) or (B, T) as (B, T or 1)."""
    return bound.view(bound.shape[0], -1)
