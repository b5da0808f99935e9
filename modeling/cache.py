"""Keys and values of the tokens seen so far, under HF's method names.

Every layer holds one buffer (B, K, capacity, D) for keys and one for values. A buffer that is full
doubles, so n single-token updates copy O(n) elements, where concatenating would copy O(n^2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FIRST_CAPACITY = 64


class _Layer:
    """One layer's buffers and how many of their tokens are filled."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.length = 0

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.keys, self.values
        start, self.length = self.length, self.length + k.shape[2]
        if torch.is_grad_enabled() and (
            k.requires_grad or v.requires_grad or (keys is not None and keys.requires_grad)
        ):
            # autograd saved the tensors handed out before, so they must not be written into
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

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = change(self.keys), change(self.values)


def _grown(old: Tensor | None, new: Tensor, filled: int, needed: int) -> Tensor:
    capacity = needed if old is None else max(needed, 2 * old.shape[2], FIRST_CAPACITY)
    buffer = new.new_empty(new.shape[0], new.shape[1], capacity, new.shape[3])
    if old is not None:
        buffer[:, :, :filled] = old[:, :, :filled].detach()
    return buffer


class DynamicCache:
    """A cache that grows as tokens come; pass it as `past_key_values`.

    `update` returns views (B, K, S, D) of everything cached for a layer. They stay valid until
    the next update. With gradients wanted, tensors are concatenated instead of written in place.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self) -> None:
        self._layers: list[_Layer] = []

    def update(self, k: Tensor, v: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append k and v (B, K, T, D) to layer `layer_idx`; returns all its keys and values.

        Raises ValueError where shape, dtype or device differ from what the layer holds.
        """
        while len(self._layers) <= layer_idx:
            self._layers.append(_Layer())
        layer = self._layers[layer_idx]
        if layer.keys is not None:
            _check_fits(layer.keys, k, layer_idx)
        return layer.update(k, v)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens cached for a layer."""
        return self._layers[layer_idx].length if layer_idx < len(self._layers) else 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no maximum."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(keys a query of this length will see, position of the first of them)."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop tokens from the end: `crop(-n)` drops n, as in transformers 5."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"DynamicCache.crop: tokens_to_remove={tokens_to_remove}; pass a negative number, "
                "-n drops the last n tokens"
            )
        for layer in self._layers:
            layer.length = max(0, layer.length + tokens_to_remove)

    def reset(self) -> None:
        """Forget every token and free the buffers."""
        self._layers.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows of the batch, in the given order."""
        for layer in self._layers:
            layer.each(lambda t: t.index_select(0, indices.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch `repeats` times."""
        for layer in self._layers:
            layer.each(lambda t: t.repeat_interleave(repeats, dim=0))

    @property
    def batch_size(self) -> int | None:
        """Rows of the batch; None while nothing is cached."""
        keys = self._layers[0].keys if self._layers else None
        return None if keys is None else keys.shape[0]

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"DynamicCache(layers={len(self)}, tokens={self.get_seq_length()})"


def _check_fits(held: Tensor, k: Tensor, layer_idx: int) -> None:
    want = (held.shape[0], held.shape[1], held.shape[3], held.dtype, held.device)
    have = (k.shape[0], k.shape[1], k.shape[3], k.dtype, k.device)
    if have != want:
        raise ValueError(
            f"DynamicCache: layer {layer_idx} holds (batch, heads, head size, dtype, device) = "
            f"{want}, and was given {have}; use a new cache, or batch_select_indices to fit rows"
        )
