"""What a forward asks of a cache, so that transformers' caches serve as well as ours.

`past_key_values` may be any object with the methods of KeyValueCache. A layer asks
`get_mask_sizes` which keys it will be given, then `update` for them: all (DynamicCache), the last
ones (a sliding layer of transformers) or a buffer whose end is not filled yet (its static layers).
The mask of a forward is made for all keys so far and fitted to the layer's: `LayerMasks`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from swathe.kernels.attention.api import Mask


class KeyValueCache(Protocol):
    """The duck type: methods of transformers' Cache with its names and arguments."""

    def update(self, k: Tensor, v: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Add k and v (B, K, T, D) to a layer; the layer's keys and values, (B, K, length, D)."""
        ...

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:
        """Tokens that the layer has been given so far, those that it dropped included."""
        ...

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(length, offset): `update` with T tokens will return keys offset to offset + length."""
        ...


METHODS = ("update", "get_seq_length", "get_mask_sizes")


class CacheNames:
    """Names beside the methods that transformers' `generate` asks every cache for."""

    is_linear: tuple[bool, ...] = (False,)
    is_croppable: bool = True

    def activate_past_recording(self) -> None:
        """Nothing to do: what `crop` may drop is kept, or `is_croppable` says that it is not."""


class LayerMasks:
    """Fits the mask of a forward of T tokens to the keys that each layer of `cache` returns."""

    def __init__(self, cache: KeyValueCache, hidden: Tensor) -> None:
        self.cache, self.T, self.device = cache, hidden.shape[1], hidden.device
        self.total = int(cache.get_seq_length()) + self.T
        self._made: dict[tuple[int, int, int], Mask] = {}

    @classmethod
    def of(cls, cache: Any, hidden: Tensor) -> LayerMasks | None:
        """For new tokens (B, T, hidden); None where masks fit as they are, as in our caches."""
        return None if cache is None or isinstance(cache, CacheNames) else cls(cache, hidden)

    def fit(self, mask: Mask, layer_idx: int) -> Mask:
        """`mask`, for keys 0 to total, as the layer's keys need it; made once for equal layers."""
        length, offset = self.cache.get_mask_sizes(self.T, layer_idx)
        if (length, offset) == (self.total, 0):
            return mask
        key = (id(mask), length, offset)  # masks outlive this object: both last one forward
        if key not in self._made:
            self._made[key] = fitted(mask, self.T, self.total, length, offset, self.device)
        return self._made[key]


def fitted(mask: Mask, T: int, total: int, length: int, offset: int, device: torch.device) -> Mask:
    """A mask of T rows and `total` keys for keys offset to offset + length of them.

    Keys from `total` on are room that is not filled; no row sees them. Raises ValueError where the
    keys end before the newest.
    """
    room = offset + length - total
    if not 0 <= offset <= total or room < 0:
        raise ValueError(
            f"past_key_values.get_mask_sizes({T}, ...) says {length} keys from {offset} on, which "
            f"do not reach the {total} that the cache and the new tokens have; they must end there "
            "or later"
        )
    changes: dict[str, Any] = {}
    for name in ("start", "end", "places"):
        part: Tensor | None = getattr(mask, name)
        if part is not None:
            changes[name] = part - offset
    for name, hidden in (("keys", False), ("allowed", False), ("bias", 0.0)):
        part = getattr(mask, name)
        if part is not None and part.shape[-1] > 1:  # 1: the same for every key
            changes[name] = pad(part[..., offset:], (0, room), value=hidden)
    if room:
        if mask.places is None:  # else rows would be counted from the end of the room
            changes["places"] = torch.arange(T, device=device)[None] + (total - T - offset)
        if not mask.causal and mask.end is None:
            changes["end"] = torch.tensor([total - offset], device=device)
    return replace(mask, **changes)
