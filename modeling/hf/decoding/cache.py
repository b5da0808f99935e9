"""A cache of fixed room for transformers' own forwards: the step after a prefill never changes.

transformers' StaticCache has layers that decide by numbers of the host's (a sliding window that is
full or not) and so change their calls from step to step. Here each layer that holds keys has room
for all tokens, and a window is its mask's alone; how many tokens are held stands on the device.

The first forward, the prefill, is one over an empty growing cache: its attention is given the new
keys and no more, and its mask is the one that transformers makes there. Then each forward takes one
token, and its attention the whole room.

Memory  a sliding layer has room for all tokens, not for its window.
Padding stays where it was, as in transformers' own loop; `mask` (B, room) is 0 there.
"""
# the layers of transformers' caches differ by version, and have no types of their own
# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false
# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import cache_utils as theirs

_Linear: Any = theirs.LinearAttentionLayer


class NotFixed(ValueError):
    """A model whose cache has layers that cannot have a fixed room."""


class Filling:
    """How full the layers of a cache are: `held` () int64 tokens, on the device.

    `empty` until the first forward has ended. `slots` (1,) is a view of `held`: where a token goes.
    """

    def __init__(self, device: torch.device) -> None:
        self.held = torch.zeros((), dtype=torch.long, device=device)
        self.slots = self.held.view(1)
        self.empty = True


class FixedLayer(theirs.StaticLayer):
    """Keys and values (B, K, room, D) of one layer, in buffers that stay where they are."""

    keys: Any
    values: Any

    def __init__(self, room: int, filling: Filling, is_sliding: bool) -> None:
        super().__init__(room)
        self.filling, self.is_sliding = filling, is_sliding

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Keep keys and values (B, K, T, D): T of a prefill, given back as they are, else 1."""
        if self.keys is None:
            # zeros: backends that weigh every key multiply what is not filled yet by 0
            self.keys, self.values = (
                t.new_zeros(*t.shape[:2], self.max_cache_len, t.shape[3])
                for t in (key_states, value_states)
            )
            self.is_initialized, self.device = True, key_states.device
        pairs = ((self.keys, key_states), (self.values, value_states))
        if self.filling.empty:
            for buffer, new in pairs:
                buffer[:, :, : new.shape[2]] = new
            return key_states, value_states
        for buffer, new in pairs:
            buffer.index_copy_(2, self.filling.slots.to(new.device), new)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that `update` will return, the first of them)."""
        return query_length if self.filling.empty else self.max_cache_len, 0

    def get_seq_length(self) -> Any:
        """Tokens held; of the device's, once there are any."""
        return 0 if self.filling.empty else self.filling.held

    def reset(self) -> None:
        """Zeros again: a NaN of an earlier text, weighed by 0, would be seen."""
        if self.is_initialized:
            self.keys.zero_()
            self.values.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row `beam_idx[i]`, in buffers that lie elsewhere."""
        if self.is_initialized:
            self.keys, self.values = (
                t.index_select(0, beam_idx.to(t.device)) for t in (self.keys, self.values)
            )

    def take_over(self, other: FixedLayer) -> None:
        """Hold what `other` holds, which has as many rows and no more room."""
        self.keys[:, :, : other.max_cache_len] = other.keys
        self.values[:, :, : other.max_cache_len] = other.values


class HybridLayer(_Linear, FixedLayer):
    """A layer with attention and a recurrent state, whose shape never changes anyway."""

    def __init__(self, room: int, filling: Filling, is_sliding: bool, **states: int) -> None:
        FixedLayer.__init__(self, room, filling, is_sliding)
        _Linear.__init__(self, **states)

    def get_max_length(self) -> int:
        """The room."""
        return self.max_cache_len

    def reset(self) -> None:
        """Forget keys and states."""
        FixedLayer.reset(self)
        _Linear.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row `beam_idx[i]`."""
        FixedLayer.reorder_cache(self, beam_idx)
        _Linear.reorder_cache(self, beam_idx)  # type: ignore[arg-type]

    def take_over(self, other: FixedLayer) -> None:
        """Hold the keys and states of `other`."""
        super().take_over(other)
        _copy_states(self, other)


class IndexedLayer(FixedLayer):
    """A layer with a second cache, of the keys by which it chooses the tokens to see."""

    indexer_keys: Tensor | None = None

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Keep keys (B, T, D), as `update` does."""
        new = indexer_key_states
        if self.indexer_keys is None:
            self.indexer_keys = new.new_zeros(new.shape[0], self.max_cache_len, new.shape[2])
        if self.filling.empty:
            self.indexer_keys[:, : new.shape[1]] = new
            return new
        return self.indexer_keys.index_copy_(1, self.filling.slots.to(new.device), new)

    def reset(self) -> None:
        """Forget both."""
        super().reset()
        if self.indexer_keys is not None:
            self.indexer_keys.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row `beam_idx[i]`."""
        super().reorder_cache(beam_idx)
        if self.indexer_keys is not None:
            self.indexer_keys = self.indexer_keys.index_select(0, beam_idx.to(self.device))

    def take_over(self, other: FixedLayer) -> None:
        """Hold the keys of `other`, of both kinds."""
        super().take_over(other)
        if isinstance(other, IndexedLayer) and other.indexer_keys is not None:
            assert self.indexer_keys is not None
            self.indexer_keys[:, : other.max_cache_len] = other.indexer_keys


class GrowingCache(transformers.DynamicCache):
    """transformers' own cache of a model, told its `rows`, and whether padding has `holes`."""

    rows = 1
    holes = False

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, states included."""
        _repeated(self, self.rows, repeats)


class FixedCache(transformers.StaticCache):
    """A cache for `room` tokens, passed to a transformers model as one of its own would be.

    `begin` and `end` stand around each forward; the first one says how many rows there are, and
    buffers are made by it. `holes`: some padding stands between tokens. Raises NotFixed where
    `config` asks for layers of other kinds than attention (sliding, chunked or indexed too) and
    recurrent states.
    """

    holes = False

    def __init__(self, config: Any, room: int, device: torch.device) -> None:
        self.filling, self.room = Filling(device), room
        growing = transformers.DynamicCache(config=config).layers
        theirs.Cache.__init__(self, layers=[self._fixed(layer) for layer in growing])
        # (B, room), and (B, 1), of the next token: made by the first forward
        self.mask: Any = None
        self.positions: Any = None

    def _fixed(self, layer: Any) -> Any:
        """In place of a layer of a growing cache."""
        kind = type(layer).__name__
        what = (self.room, self.filling, bool(getattr(layer, "is_sliding", False)))
        if kind.startswith("LinearAttentionAnd"):
            names = {"number_of_states"} & vars(layer).keys()  # of newer versions
            return HybridLayer(*what, **{name: getattr(layer, name) for name in names})
        if kind == "DynamicIndexedLayer":
            return IndexedLayer(*what)
        if kind in ("DynamicLayer", "DynamicSlidingWindowLayer"):
            return FixedLayer(*what)
        if kind in ("LinearAttentionLayer", "DummyLayer"):
            return layer
        raise NotFixed(f"its cache has layers of the kind {kind}")

    def begin(self, mask: Tensor | None, positions: Tensor) -> tuple[Tensor | None, Tensor]:
        """A forward's attention_mask and position_ids, of those (B, T) that a prefill is given."""
        if self.mask is None:
            self.mask = positions.new_ones(positions.shape[0], self.room)
            self.positions = positions[:, -1:].clone()
        if not self.filling.empty:
            return self.mask, self.positions
        self.mask.fill_(1)
        if mask is not None:
            self.mask[:, : mask.shape[1]] = mask
        self.positions.copy_(positions[:, -1:])
        return mask, positions

    def end(self, tokens: int) -> None:
        """Count the tokens of the forward."""
        self.filling.held += tokens
        self.filling.empty = False
        self.positions += 1

    @property
    def is_compileable(self) -> bool:
        """Whether masks are to be of one shape, whatever stands in them: not in a prefill."""
        return not self.filling.empty

    @property
    def batch_size(self) -> int | None:  # type: ignore[override]
        """Rows; None before the first forward."""
        return None if self.mask is None else self.mask.shape[0]

    def reset(self) -> None:
        """Forget every token; the buffers stay."""
        super().reset()
        self.filling.held.zero_()
        self.filling.empty = True

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, in buffers that lie elsewhere."""
        rows = _repeated(self, len(self.mask), repeats)
        self.mask, self.positions = self.mask[rows], self.positions[rows]

    def take_over(self, other: FixedCache) -> None:
        """Hold what `other` holds, which has as many rows and no more room, in the buffers here."""
        self.mask.fill_(1)
        self.mask[:, : other.room] = other.mask
        self.positions.copy_(other.positions)
        self.filling.held.copy_(other.filling.held)
        self.filling.empty = other.filling.empty
        pairs: Any = zip(self.layers, other.layers, strict=True)
        for mine, taken in pairs:
            if isinstance(mine, FixedLayer):
                mine.take_over(taken)
            elif isinstance(mine, _Linear):
                _copy_states(mine, taken)


def _copy_states(into: Any, taken: Any) -> None:
    """A layer's recurrent states: a tensor or, in newer versions, several by their number."""
    for name in ("conv_states", "recurrent_states"):
        mine, other = getattr(into, name), getattr(taken, name)
        pairs = [(mine[i], other[i]) for i in mine] if isinstance(mine, dict) else [(mine, other)]
        for state, new in pairs:
            if new is not None:
                state.copy_(new)
    flags = taken.has_previous_state
    into.has_previous_state = dict(flags) if isinstance(flags, dict) else flags


def _repeated(cache: theirs.Cache, rows: int, repeats: int) -> Tensor:
    """Repeat each row of a cache, by a method that layers of every kind have; the old rows."""
    order = torch.arange(rows).repeat_interleave(repeats)
    cache.reorder_cache(order)  # type: ignore[arg-type]
    return order
