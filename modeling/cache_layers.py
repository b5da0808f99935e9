"""The buffers of one layer of a DynamicCache: (B, K, capacity, D) for keys and for values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FIRST_CAPACITY = 64


class GrowingLayer:
    """Buffers that double, and how many tokens the layer was given."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.length = 0

    @property
    def passed(self) -> int:
        """Tokens that no later query sees."""
        return 0

    def learns(self, k: Tensor, v: Tensor) -> bool:
        """Whether gradients are wanted: tensors handed out before must not be written into."""
        held = self.keys is not None and self.keys.requires_grad
        return torch.is_grad_enabled() and (held or k.requires_grad or v.requires_grad)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, K, T, D); all of them so far."""
        keys, values = self.keys, self.values
        start, self.length = self.length, self.length + k.shape[2]
        if self.learns(k, v):
            if keys is not None and values is not None:
                k = torch.cat((keys[:, :, :start], k), dim=2)
                v = torch.cat((values[:, :, :start], v), dim=2)
            self.keys, self.values = k, v
            return k, v
        if keys is None or values is None or self.length > keys.shape[2] or keys.requires_grad:
            keys = self.keys = _grown(keys, k, start, self.length)
            values = self.values = _grown(values, v, start, self.length)
        keys[:, :, start : self.length] = k
        values[:, :, start : self.length] = v
        return keys[:, :, : self.length], values[:, :, : self.length]

    def reserve(self, batch: int, tokens: int) -> bool:
        """Make room for so many tokens of `batch` sequences; False where none can be made."""
        keys, values, needed = self.keys, self.values, self.length + tokens
        if keys is None or values is None or keys.requires_grad or keys.shape[0] != batch:
            return False
        if needed > keys.shape[2]:
            self.keys = _grown(keys, keys, self.length, needed)
            self.values = _grown(values, values, self.length, needed)
        return True

    def check_crop(self, length: int) -> None:
        """Raise ValueError unless the layer can go back to its first `length` tokens."""

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the buffers by what `change` makes of them."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = change(self.keys), change(self.values)


class SlidingLayer(GrowingLayer):
    """A layer whose queries see `window` tokens; the buffers hold the last ones.

    A buffer has room for twice what the window reaches back to. When it is full this part alone
    moves on, so a token costs O(1) copies and a layer O(window) memory.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.dropped = 0  # tokens before the buffers' first

    @property
    def passed(self) -> int:
        """Tokens that the window has passed."""
        return max(0, self.length - self.window + 1)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v; they, and before them those that the window reaches back to."""
        keys, values = self.keys, self.values
        begin, start, first = self.passed - self.dropped, self.length - self.dropped, self.passed
        self.length += k.shape[2]
        end = self.length - self.dropped
        if keys is not None and values is not None:
            if end <= keys.shape[2] and not (keys.requires_grad or self.learns(k, v)):
                keys[:, :, start:end] = k
                values[:, :, start:end] = v
                return keys[:, :, begin:end], values[:, :, begin:end]
            k = torch.cat((keys[:, :, begin:start], k), dim=2)
            v = torch.cat((values[:, :, begin:start], v), dim=2)
        if self.learns(k, v):
            self.keys, self.values, self.dropped = k, v, first
        else:
            self.dropped = self.passed
            self.keys, self.values = (_tail(t, self.length - self.dropped) for t in (k, v))
        return k, v

    def check_crop(self, length: int) -> None:
        """Raise ValueError where the window would then reach back to what was dropped."""
        if self.dropped > max(0, length - self.window + 1):
            raise ValueError(
                f"DynamicCache.crop: {length} of {self.length} tokens would stay, but a layer with "
                f"a window of {self.window} has dropped the first {self.dropped}, some of which "
                "the next query would see; use DynamicCache() without a configuration, which "
                "keeps all, or begin anew"
            )


def _tail(t: Tensor, count: int) -> Tensor:
    """A buffer with room for more that begins with the last `count` tokens of t (B, K, T, D)."""
    B, K, T, D = t.shape
    buffer = t.new_empty(B, K, max(2 * count, FIRST_CAPACITY), D)
    buffer[:, :, :count] = t[:, :, T - count :]
    return buffer


def _grown(old: Tensor | None, new: Tensor, filled: int, needed: int) -> Tensor:
    capacity = needed if old is None else max(needed, 2 * old.shape[2], FIRST_CAPACITY)
    buffer = new.new_empty(new.shape[0], new.shape[1], capacity, new.shape[3])
    if old is not None:
        buffer[:, :, :filled] = old[:, :, :filled].detach()
    return buffer
