"""What a BERT that is a decoder takes besides: caches, and the states of an encoder."""

from __future__ import annotations

from torch import Tensor

from swathe.kernels.attention.api import Mask
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.modeling.cache import DynamicCache, StaticCache
from swathe.modeling.cross_cache import EncoderDecoderCache
from swathe.modeling.families.bert.attention_bert import Source
from swathe.modeling.families.bert.configuration_bert import BertConfig
from swathe.modeling.forward import check_cache
from swathe.modeling.masks import cross_mask
from swathe.modeling.model import PreTrainedModel

BertCache = DynamicCache | StaticCache | EncoderDecoderCache


def caches(
    model: PreTrainedModel,
    given: BertCache | None,
    use_cache: bool | None,
    encoder_hidden_states: Tensor | None,
) -> BertCache | None:
    """The cache to write to: the given one, or a new one for all that will be read.

    Of a cache that is not an EncoderDecoderCache, an encoder's states are projected at every call.
    Raises UnsupportedFeature for a model that is no decoder, TypeError for other classes.
    """
    if not model.config.is_decoder:  # type: ignore[attr-defined]
        if given is not None or use_cache:
            name = "use_cache" if given is None else "past_key_values"
            raise UnsupportedFeature(
                f"{type(model).__name__}.forward: no {name}: an encoder sees all tokens at once "
                "and has no cache; leave it out, or build the model with is_decoder=True"
            )
        return None
    if isinstance(given, EncoderDecoderCache):
        check_cache(model, given.self_attention_cache, use_cache)
        return given
    own = check_cache(model, given, use_cache)
    if own is None or given is not None or encoder_hidden_states is None:
        return own
    return EncoderDecoderCache(own, DynamicCache())


def check_length(
    longest: int,
    words: Tensor,
    position_ids: Tensor | None,
    cache: DynamicCache | StaticCache | None,
) -> None:
    """Raise ValueError where tokens would have no position."""
    if isinstance(cache, StaticCache):
        if cache.max_cache_len > longest:
            raise ValueError(
                f"the StaticCache has room for max_cache_len={cache.max_cache_len} tokens; the "
                f"model has positions for max_position_embeddings={longest}. Make it that long"
            )
    elif position_ids is None:
        tokens = words.shape[1] + (0 if cache is None else cache.get_seq_length())
        if tokens > longest:
            raise ValueError(
                f"the sequences have {tokens} tokens; the model has positions for "
                f"max_position_embeddings={longest}. Cut them, or pass position_ids"
            )


def source_of(
    config: BertConfig,
    states: Tensor | None,
    mask: Tensor | Mask | None,
    words: Tensor,
    cache: BertCache | None,
) -> Source | None:
    """What cross-attention reads for words (B, T, hidden); None where there is nothing to read.

    Raises UnsupportedFeature for a model without cross-attention, ValueError for states and masks
    that do not fit.
    """
    if not config.add_cross_attention:
        if states is not None or mask is not None or isinstance(cache, EncoderDecoderCache):
            raise UnsupportedFeature(
                "encoder_hidden_states, encoder_attention_mask and an EncoderDecoderCache need "
                "cross-attention, which the model does not have; leave them out, or build it with "
                "is_decoder=True, add_cross_attention=True"
            )
        return None
    both = cache if isinstance(cache, EncoderDecoderCache) else None
    kept = 0 if both is None else both.cross_attention_cache.get_seq_length()
    if states is None and not kept:
        if mask is not None:
            raise ValueError(
                "encoder_attention_mask is given without encoder_hidden_states; pass both or none"
            )
        return None
    if states is not None:
        B, size = words.shape[0], config.hidden_size
        if states.dim() != 3 or states.shape[0] != B or states.shape[2] != size:
            raise ValueError(
                f"encoder_hidden_states has shape {tuple(states.shape)}; {B} sequences need "
                f"({B}, tokens of the encoder, hidden_size={size})"
            )
        if kept and states.shape[1] != kept:
            raise ValueError(
                f"encoder_hidden_states has {states.shape[1]} tokens, but the cache holds keys of "
                f"{kept}, which are read instead; leave it out, or use a new cache"
            )
    S = kept if states is None else states.shape[1]
    return Source(states, cross_mask(mask, words, S), both)
