"""The first and last steps that every decoder's forward has: inputs checked, defaults filled in."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from swathe.kernels.attention.api import Mask
from swathe.modeling.cache import DynamicCache, StaticCache
from swathe.modeling.cache_protocol import METHODS
from swathe.modeling.layers.capture import Capture
from swathe.modeling.masks import causal_mask, looked_at
from swathe.modeling.model import PreTrainedModel
from swathe.modeling.packing import (
    Packing,
    mask_of_borders,
    mask_of_positions,
    positions_in,
)

logger = logging.getLogger(__name__)

States = bool | int | Sequence[int] | None  # what `output_hidden_states` may be


def wants(model: PreTrainedModel, name: str, given: bool | None) -> bool:
    """An argument of forward, or the configuration's value where it is None."""
    return getattr(model.config, name) if given is None else given


def captures(model: PreTrainedModel, output_attentions: bool | None) -> Capture:
    """What attention is told of its weights: False, True, or how the configuration gets them."""
    asked = wants(model, "output_attentions", output_attentions)
    return (model.config.attn_capture or True) if asked else False


def wanted_states(model: PreTrainedModel, given: States, layers: int) -> frozenset[int]:
    """Which of the `layers` + 1 hidden states are returned; in place of the others stands None.

    True is all of them. An index, or several, choose as from a list of all, from the end below 0.
    Raises ValueError for anything else, and for an index that there is not.
    """
    if given is None:
        given = model.config.output_hidden_states
    count = layers + 1
    if isinstance(given, bool):
        return frozenset(range(count)) if given else frozenset()
    chosen = [given] if isinstance(given, int) else given
    if not isinstance(chosen, list | tuple | range) or any(
        type(i) is not int or not -count <= i < count for i in chosen
    ):
        raise ValueError(
            f"output_hidden_states={given!r}: the {layers} layers have {count} hidden states; "
            f"allowed are True, False, an index from {-count} to {count - 1}, or a list of them"
        )
    return frozenset(i % count for i in chosen)


def tell_of_long_texts(
    model: PreTrainedModel, hidden: Tensor, cache: DynamicCache | StaticCache | None
) -> None:
    """Log once a model that a text is longer than those its positions were trained for."""
    if torch.compiler.is_compiling() or model._told_of_long_texts:
        return
    limit = model.config.max_position_embeddings
    # how full a static cache is, only the device knows
    past = cache.get_seq_length() if isinstance(cache, DynamicCache) else 0
    if past + hidden.shape[1] > limit:
        model._told_of_long_texts = True
        logger.warning(
            "%d tokens are more than max_position_embeddings=%d, the longest text that the model "
            "was trained for; rotary positions go on, but what it predicts gets worse. Shorten the "
            "text, or scale its positions with rope_parameters",
            past + hidden.shape[1],
            limit,
        )


def checked_embeddings(
    embed: nn.Embedding, input_ids: Tensor | None, inputs_embeds: Tensor | None
) -> Tensor:
    """(B, T, hidden) from exactly one of ids (B, T) and vectors.

    Raises ValueError for both, none, a wrong shape, or an id outside the vocabulary; that is
    searched for on a CPU, elsewhere under `swathe.debug()`.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(
            "You must specify exactly one of input_ids or inputs_embeds, got "
            f"{'neither' if input_ids is None else 'both'}; pass one and leave the other out"
        )
    if inputs_embeds is not None:
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != embed.embedding_dim:
            raise ValueError(
                f"inputs_embeds has shape {tuple(inputs_embeds.shape)}; it must be (batch, tokens, "
                f"hidden_size={embed.embedding_dim})"
            )
        return inputs_embeds
    assert input_ids is not None
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids is {input_ids.dtype} with shape {tuple(input_ids.shape)}; it must hold "
            "whole numbers in two dimensions (batch, tokens). Use input_ids[None] for one sequence"
        )
    if looked_at(input_ids) and not _within(input_ids, embed.num_embeddings):
        raise ValueError(
            f"input_ids holds ids from {int(input_ids.min())} to {int(input_ids.max())}; the "
            f"vocabulary has vocab_size={embed.num_embeddings}, so ids must be 0 to "
            f"{embed.num_embeddings - 1}"
        )
    return embed(input_ids)


def check_cache(
    model: PreTrainedModel, cache: DynamicCache | StaticCache | None, use_cache: bool | None
) -> DynamicCache | StaticCache | None:
    """The cache to write to, a new one where `use_cache` asks for it, or None.

    Raises TypeError for tuples of older versions, ValueError together with checkpointing.
    """
    if cache is not None and not all(hasattr(cache, name) for name in METHODS):
        raise TypeError(
            f"past_key_values is a {type(cache).__name__}; it must be a DynamicCache, a "
            f"StaticCache or None, or have the methods {METHODS} as transformers' caches do. For "
            "keys and values of older versions, call cache.update(k, v, layer) for each layer"
        )
    if use_cache is None:
        use_cache = cache is not None or (model.config.use_cache and not model.training)
    if use_cache and model.training and model.is_gradient_checkpointing:
        raise ValueError(
            "use_cache=True does not go with gradient checkpointing, which would append every key "
            "twice; pass use_cache=False, or call model.eval() or gradient_checkpointing_disable()"
        )
    return cache if cache is not None or not use_cache else DynamicCache()


def positions_after(past: int, hidden: Tensor, position_ids: Tensor | None) -> Tensor:
    """Positions (B or 1, T): those given, or counted on from the cached tokens."""
    B, T = hidden.shape[:2]
    if position_ids is None:
        return torch.arange(past, past + T, device=hidden.device)[None]
    if position_ids.dim() == 1:
        position_ids = position_ids[None]
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, B) or position_ids.shape[1] != T:
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}; {B} sequences of {T} new tokens "
            f"need ({B}, {T}) or (1, {T})"
        )
    return position_ids


def mask_and_positions(
    attention_mask: Tensor | Mask | None,
    position_ids: Tensor | None,
    hidden: Tensor,
    cache: DynamicCache | StaticCache | None,
    packed: bool,
    packing: Packing,
) -> tuple[Mask, Tensor]:
    """What the new tokens see, and their positions (B or 1, T); modeling/masks.py and packing.py.

    `packed`: the caller gave no cache, so that positions may tell of several documents.
    Raises ValueError or TypeError for what does not fit, and for borders beside a mask or a cache.
    """
    mask = mask_of_borders(packing, hidden)
    if mask is not None:
        if attention_mask is not None or not packed:
            raise ValueError(
                "cu_seq_lens_q: packed documents take neither attention_mask nor past_key_values; "
                "leave these out, or pad the documents instead"
            )
        positions = positions_in(mask, hidden) if position_ids is None else position_ids
        return mask, positions_after(0, hidden, positions)
    if isinstance(cache, StaticCache):
        mask, positions = cache.advance(hidden, attention_mask)
        if position_ids is not None:
            positions = positions_after(0, hidden, position_ids)
        return mask, positions
    past = int(cache.get_seq_length()) if cache is not None else 0
    positions = positions_after(past, hidden, position_ids)
    if packed and attention_mask is None and position_ids is not None:
        mask = mask_of_positions(positions)
    if mask is None:
        mask = causal_mask(attention_mask, hidden, past)
    return mask, positions


def keep_logits(hidden: Tensor, keep: int | Tensor) -> Tensor:
    """The hidden states whose logits are wanted: the last `keep`, all for 0, or those indexed."""
    if isinstance(keep, Tensor):
        return hidden[:, keep]
    if keep < 0:
        raise ValueError(f"logits_to_keep={keep} must be 0 (all), a count, or a tensor of indices")
    return hidden[:, -keep:] if keep else hidden


def _within(ids: Tensor, vocab_size: int) -> bool:
    low, high = torch.aminmax(ids)
    return bool(low >= 0) and bool(high < vocab_size)
