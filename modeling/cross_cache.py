"""A decoder's two caches under one name: its own tokens, and the encoder's states that it reads.

The states of an encoder do not grow while a decoder writes: each layer projects them once, and
`is_updated` says which layers have.
"""

from __future__ import annotations

from torch import Tensor

from swathe.modeling.cache import DynamicCache, StaticCache


class EncoderDecoderCache:
    """Both caches of a decoder with cross-attention; pass it as `past_key_values`.

        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

    Lengths, masks and `crop` are about the decoder's own tokens; what changes rows of the batch
    changes both. A StaticCache may hold the decoder's tokens, the encoder's stay in a DynamicCache,
    which never grows after the first forward.
    """

    is_sliding = False

    def __init__(
        self, self_attention_cache: DynamicCache | StaticCache, cross_attention_cache: DynamicCache
    ) -> None:
        for name, given, allowed in (
            ("self_attention_cache", self_attention_cache, (DynamicCache, StaticCache)),
            ("cross_attention_cache", cross_attention_cache, (DynamicCache,)),
        ):
            if not isinstance(given, allowed):
                raise TypeError(
                    f"EncoderDecoderCache: {name} is a {type(given).__name__}; it must be a "
                    f"{' or a '.join(kind.__name__ for kind in allowed)}"
                )
        self.self_attention_cache = self_attention_cache
        self.cross_attention_cache = cross_attention_cache
        layers = range(len(cross_attention_cache))
        self.is_updated = {i: cross_attention_cache.get_seq_length(i) > 0 for i in layers}

    @property
    def is_compileable(self) -> bool:
        """Whether the decoder's tokens stay where they are."""
        return self.self_attention_cache.is_compileable

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the decoder that are cached for a layer."""
        return self.self_attention_cache.get_seq_length(layer_idx)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """How many tokens of the decoder there is room for; -1 for any number."""
        return self.self_attention_cache.get_max_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(keys a query of this length will be given, position of the first of them)."""
        return self.self_attention_cache.get_mask_sizes(query_length, layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the decoder's last n tokens for `crop(-n)`; the encoder's states stay."""
        self.self_attention_cache.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget the decoder's tokens and the encoder's states."""
        self.self_attention_cache.reset()
        self.cross_attention_cache.reset()
        self.is_updated.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row `beam_idx[i]`."""
        self.self_attention_cache.reorder_cache(beam_idx)
        self.cross_attention_cache.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows, in the given order."""
        self.self_attention_cache.batch_select_indices(indices)
        self.cross_attention_cache.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self.self_attention_cache.batch_repeat_interleave(repeats)
        self.cross_attention_cache.batch_repeat_interleave(repeats)

    def __repr__(self) -> str:
        return f"EncoderDecoderCache({self.self_attention_cache!r}, {self.cross_attention_cache!r})"
