"""Positions as terms of the scores: attention that knows how far a key is from a query.

    a[b, h, l, r]  = q[b, h, l] . k[b, h, r] + q[b, h, l] . e[l - r]          "relative_key"
                     ... + k[b, h, r] . e[l - r]                              "relative_key_query"
    p[b, h, l, :]  = softmax(a[b, h, l, :] / sqrt(D))

e is a table of 2n - 1 vectors (D,), n = max_position_embeddings, one for each distance from 1 - n
on; a layer has a table of its own, which its heads share. l and r count tokens, padding included,
whatever their position_ids are.

Backends  the terms, over sqrt(D), are an additive mask (B, H, T, S) with a gradient, which every
          backend of the attention op takes; with it none is linear in memory.
Memory    vectors (T, S, D) of all pairs, for all heads and sequences at once; a StaticCache, where
          sequences stand at places of their own, takes them for each.
Rounding  the terms are products in q's dtype; the softmax is fp32, as everywhere here.
Source    Shaw et al. 2018, arXiv:1803.02155; Huang et al. 2020, arXiv:2009.13658.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from swathe.kernels.attention.api import Mask
from swathe.modeling.examples.dummy_bert.configuration_dummy_bert import (
    DummyBertConfig,
    PositionKind,
)
from swathe.modeling.families.bert.attention_bert import BertSelfAttention


def relative_terms(q: Tensor, k: Tensor, e: Tensor, kind: PositionKind) -> Tensor:
    """Terms (B, H, T, S), not yet over sqrt(D), of queries (B, H, T, D) and keys (B, H, S, D).

    e: (1 or B, T, S, D), the vector of each pair's distance.
    """
    terms = torch.einsum("bhld,blrd->bhlr", q, e)
    if kind == "relative_key_query":
        terms = terms + torch.einsum("bhrd,blrd->bhlr", k, e)
    return terms


def with_terms(mask: Mask, terms: Tensor) -> Mask:
    """The mask, adding `terms` to the scores on top of what it adds already."""
    if mask.bias is None:
        return replace(mask, bias=terms)
    hidden = mask.bias <= torch.finfo(mask.bias.dtype).min
    added = (terms + mask.bias).masked_fill(hidden, float("-inf"))
    return replace(mask, bias=added)


class DummyBertSelfAttention(BertSelfAttention):
    """BERT's, with a table of distances where positions are relative."""

    def __init__(self, config: DummyBertConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.kind: PositionKind = config.position_embedding_type
        self.distance_embedding: nn.Embedding | None = None
        if self.kind != "absolute":
            distances = 2 * config.max_position_embeddings - 1
            self.distance_embedding = nn.Embedding(distances, self.head_dim)

    def biased(self, mask: Mask, q: Tensor, k: Tensor) -> Mask:
        """The mask with the relative terms of q (B, H, T, D) and k (B, H, S, D)."""
        if self.distance_embedding is None:
            return mask
        S, longest = k.shape[2], self.distance_embedding.num_embeddings // 2
        rows = mask.rows(q.shape[2], S, q.device)
        distance = rows[:, :, None] - torch.arange(S, device=q.device)
        # a StaticCache has room that is hidden, and rows of padding stand before its first token
        e = self.distance_embedding(distance.clamp(-longest, longest) + longest)
        return with_terms(mask, relative_terms(q, k, e, self.kind) * self.scaling)

    @torch.no_grad()
    def resize_distances(self, fresh: nn.Embedding) -> None:
        """Take a new table's length; the distances that were known keep their vectors."""
        table = self.distance_embedding
        assert table is not None
        old, new = len(table.weight) // 2, len(fresh.weight) // 2
        shared = min(old, new)
        kept = table.weight[old - shared : old + shared + 1]
        fresh.weight[new - shared : new + shared + 1] = kept
        table.weight.data, table.weight.grad = fresh.weight.data, None
        table.num_embeddings = len(fresh.weight)
