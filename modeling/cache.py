"""Keys and values of the tokens seen so far, under HF's method names.

Every layer holds one buffer (B, K, capacity, D) for keys and one for values.

DynamicCache   a buffer that is full doubles, so n single-token updates copy O(n) elements, where
               concatenating would copy O(n^2). All sequences are as long, padding included. With
               the model's configuration, layers with a sliding window drop what it has passed.
StaticCache    the capacity is fixed, every sequence has a length of its own, on the device, and
               padding is not kept: no host synchronisation, and a captured graph serves any length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swathe.kernels.attention.api import Mask
from swathe.modeling.cache_layers import GrowingLayer, SlidingLayer
from swathe.modeling.cache_protocol import CacheNames
from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.masks import opaque


class DynamicCache(CacheNames):
    """A cache that grows as tokens come; pass it as `past_key_values`.

    `update` returns views (B, K, S, D) of everything cached for a layer. They stay valid until
    the next update. With gradients wanted, tensors are concatenated instead of written in place.

    With `config`, the model's configuration, layers that see a sliding window keep what later
    queries will see, and no more: S is then at most window - 1 and the new tokens, as
    `get_mask_sizes` says. Without one everything is kept.
    """

    is_compileable = False

    def __init__(self, *, config: PreTrainedConfig | None = None) -> None:
        self._layers: list[GrowingLayer] = []
        window, layers = getattr(config, "window", None), getattr(config, "num_hidden_layers", 0)
        self._windows: list[int | None] = [window(i) for i in range(layers)] if window else []
        self.is_croppable = not any(self.is_sliding)

    @property
    def is_sliding(self) -> list[bool]:
        """For each layer of the configuration, whether it drops tokens."""
        return [window is not None for window in self._windows]

    def update(self, k: Tensor, v: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append k and v (B, K, T, D) to layer `layer_idx`; returns its keys and values.

        Raises ValueError where shape, dtype or device differ from what the layer holds.
        """
        while (i := len(self._layers)) <= layer_idx:
            window = self._windows[i] if i < len(self._windows) else None
            self._layers.append(GrowingLayer() if window is None else SlidingLayer(window))
        layer = self._layers[layer_idx]
        if layer.keys is not None:
            _check_fits(layer.keys, k, layer_idx)
        return layer.update(k, v)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that a layer was given, those dropped since included."""
        return self._layers[layer_idx].length if layer_idx < len(self._layers) else 0

    def has_room(self, layers: int, batch: int, tokens: int) -> bool:
        """Whether layers 0 to `layers`, equally full, can take so many tokens; room is made.

        False for an empty cache, for layers that drop tokens, and where gradients are kept.
        """
        held = self._layers[:layers]
        if len(held) < layers or any(type(layer) is not GrowingLayer for layer in held):
            return False
        length = held[0].length
        fits = all(layer.length == length and layer.reserve(batch, tokens) for layer in held)
        return length > 0 and fits

    def buffers(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values (B, K, capacity, D), of which the first tokens are filled."""
        layer = self._layers[layer_idx]
        assert layer.keys is not None and layer.values is not None
        return layer.keys, layer.values

    def lengthen(self, layers: int, tokens: int) -> None:
        """Count tokens that were written into the buffers of layers 0 to `layers`."""
        for layer in self._layers[:layers]:
            layer.length += tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no maximum."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(keys a query of this length will be given, position of the first of them)."""
        passed = self._layers[layer_idx].passed if layer_idx < len(self._layers) else 0
        return self.get_seq_length(layer_idx) - passed + query_length, passed

    def crop(self, tokens_to_remove: int) -> None:
        """Drop tokens from the end: `crop(-n)` drops n, as in transformers 5.

        Raises ValueError where a sliding window would reach back to tokens that were dropped.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"DynamicCache.crop: tokens_to_remove={tokens_to_remove}; pass a negative number, "
                "-n drops the last n tokens"
            )
        lengths = [max(0, layer.length + tokens_to_remove) for layer in self._layers]
        for layer, length in zip(self._layers, lengths, strict=True):
            layer.check_crop(length)
        for layer, length in zip(self._layers, lengths, strict=True):
            layer.length = length

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


class StaticCache(CacheNames):
    """A cache of fixed capacity; pass it as `past_key_values` under torch.no_grad().

    Each forward writes a row's real tokens behind those that it holds, wherever padding stood, so
    prompts may be padded on either side. Buffers are made by the first forward and stay where they
    are. What a graph replays is not counted: a row that is full then drops its tokens.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, config: PreTrainedConfig, max_cache_len: int) -> None:
        if max_cache_len < 1:
            raise ValueError(f"StaticCache: max_cache_len={max_cache_len}; it must be 1 or more")
        self.max_cache_len = max_cache_len
        self.lengths: Tensor | None = None  # (B,) int64: tokens that each sequence holds
        layers: int = config.num_hidden_layers  # type: ignore[attr-defined]
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self._slots: Tensor | None = None
        self._given = self._most = 0  # tokens passed, padding included; the longest at most

    def advance(self, hidden: Tensor, attention_mask: Tensor | Mask | None) -> tuple[Mask, Tensor]:
        """Make room for the new tokens of `hidden` (B, T, ...): their Mask and positions (B, T).

        `attention_mask` (B, T), or (B, all tokens passed so far), is 0 on padding. Raises
        ValueError where it does not fit, and for more tokens than the cache holds.
        """
        B, T = hidden.shape[:2]
        lengths = hidden.new_zeros(B, dtype=torch.long) if self.lengths is None else self.lengths
        if lengths.shape[0] != B:
            raise ValueError(f"StaticCache: it holds {lengths.shape[0]} sequences, and {B} come")
        real = self._real(attention_mask, B, T)
        if real is None:
            places, longer = lengths[:, None] + torch.arange(T, device=hidden.device), lengths + T
        else:
            places, longer = lengths[:, None] + real.cumsum(1) - 1, lengths + real.sum(1)
        self._count(T, longer)
        lost = places >= self.max_cache_len
        # a row behind the last one takes what is not kept
        self._slots = places.masked_fill(lost if real is None else lost | ~real, self.max_cache_len)
        self.lengths = lengths.copy_(longer)
        mask = Mask(causal=True, places=places, rows_may_be_empty=real is not None)
        return mask, places.clamp(min=0)

    def _real(self, mask: Tensor | Mask | None, B: int, T: int) -> Tensor | None:
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.shape not in ((B, T), (B, self._given + T)):
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask is {shape}; a StaticCache keeps no padding and needs ({B}, {T}), "
                f"or ({B}, {self._given + T}) with the tokens passed before, 1 on real tokens"
            )
        return mask[:, -T:] != 0

    def _count(self, T: int, longer: Tensor) -> None:
        if opaque(longer):
            return
        most = self._most + T
        if most > self.max_cache_len:
            most = int(longer.max())  # padding was counted too
        if most > self.max_cache_len:
            raise ValueError(
                f"StaticCache: a sequence would hold {most} tokens, but max_cache_len is "
                f"{self.max_cache_len}; make it longer, or crop"
            )
        self._most, self._given = most, self._given + T

    def update(self, k: Tensor, v: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Write k and v (B, K, T, D) where `advance` said; returns the whole buffers of the layer.

        Raises ValueError without such a call, and where a gradient is wanted.
        """
        if self._slots is None or k.shape[2] != self._slots.shape[1]:
            raise ValueError(f"StaticCache: {k.shape[2]} tokens come; call advance for them first")
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise ValueError(
                "StaticCache passes no gradient; use torch.no_grad(), or a DynamicCache to learn"
            )
        pair = self._buffers[layer_idx]
        if pair is None:
            B, K, _, D = k.shape
            room = (B, K, self.max_cache_len + 1)
            # zeros: backends that weigh every key multiply what is not filled yet by 0
            pair = k.new_zeros(*room, D), v.new_zeros(*room, v.shape[3])
            self._buffers[layer_idx] = pair
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        slots = self._slots.to(k.device)  # of a model on several devices, layers are elsewhere
        for buffer, new in zip(pair, (k, v), strict=True):
            buffer.transpose(1, 2)[rows, slots] = new.transpose(1, 2)
        keys, values = (buffer[:, :, : self.max_cache_len] for buffer in pair)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest sequence; waits for the device. `lengths` has all, without."""
        return 0 if self.lengths is None else int(self.lengths.max())

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The capacity."""
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(keys a query will be given, position of the first of them)."""
        return self.max_cache_len, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop tokens from each sequence's end: `crop(-n)` drops n, as in transformers 5."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"StaticCache.crop: tokens_to_remove={tokens_to_remove}; pass a negative number"
            )
        if self.lengths is not None:
            self.lengths.add_(tokens_to_remove).clamp_(min=0)
            self._most = max(0, self._most + tokens_to_remove)
            self._given = max(0, self._given + tokens_to_remove)

    def reset(self) -> None:
        """Forget every token; the buffers stay."""
        self._given = self._most = 0
        self._slots = None
        if self.lengths is not None:
            self.lengths.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row `beam_idx[i]`, in place."""
        if self.lengths is not None:
            for t in (self.lengths, *(t for pair in self._buffers if pair for t in pair)):
                t.copy_(t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows of the batch, in the given order, in buffers of their own size.

        The new buffers lie elsewhere: a graph captured before writes to the old ones.
        """
        self._slots = None
        if self.lengths is not None:
            self.lengths = self.lengths.index_select(0, indices.to(self.lengths.device))
        for layer, pair in enumerate(self._buffers):
            if pair is not None:
                keys, values = (t.index_select(0, indices.to(t.device)) for t in pair)
                self._buffers[layer] = keys, values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch `repeats` times, as `batch_select_indices` does."""
        if self.lengths is not None:
            rows = torch.arange(self.lengths.shape[0], device=self.lengths.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def take_over(self, other: StaticCache) -> None:
        """Hold what `other` holds, which has as many rows and no more room, in the buffers here.

        Raises ValueError where it does not fit, or where one of the two has no buffers yet.
        """
        rows, held = self.batch_size, other.batch_size
        if rows is None or rows != held or other.max_cache_len > self.max_cache_len:
            raise ValueError(
                f"StaticCache.take_over: {held} rows of {other.max_cache_len} tokens do not fit "
                f"into {rows} of {self.max_cache_len}; both need a first forward, and equal rows"
            )
        self.reset()
        assert self.lengths is not None and other.lengths is not None
        self.lengths.copy_(other.lengths)
        self._given, self._most = other._given, other._most
        for mine, theirs in zip(self._buffers, other._buffers, strict=True):
            for into, taken in zip(mine or (), theirs or (), strict=True):
                into[:, :, : other.max_cache_len] = taken[:, :, : other.max_cache_len]

    @property
    def batch_size(self) -> int | None:
        """Rows of the batch; None before the first forward."""
        return None if self.lengths is None else self.lengths.shape[0]
