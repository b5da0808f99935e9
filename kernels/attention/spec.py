"""What one call of attention asks for besides q, k and v, as data that every backend reads.

    z[b, h, t, s] = scale * sum_d q[b, h, t, d] * k[b, h // G, s, d]
    z             = softcap * tanh(z / softcap)                  where there is a softcap
    z             = z + alibi[b, h] * (s - r) + bias             r: where the row sits (mask.py)
    p[b, h, t, s] = exp(z - lse[b, h, t])                        over the keys that the mask shows
    lse[b, h, t]  = log(sum_s exp(z) + exp(sinks[h]))            no second term without sinks

A row that sees no key has p = 0; its lse is its sink, -inf without one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from swathe.kernels.attention.mask import Mask


@dataclass(frozen=True)
class AttentionSpec:
    """One call's mask and numbers; `features` are what a backend must name to be given it.

    alibi: slopes (H,) or (B, H). sinks: one logit a head, (H,), that takes weight and gives none.
    lse: return the fp32 log of each row's sum as well, (B, H, T).
    block_table: int (B, pages): k (P, K, page, D) and v (P, K, page, E) are caches in pages, and
    these are the ones that hold sequence b's keys, in their order.
    """

    mask: Mask
    scale: float
    dropout: float = 0.0
    softcap: float | None = None
    alibi: Tensor | None = None
    sinks: Tensor | None = None
    lse: bool = False
    block_table: Tensor | None = None

    @property
    def features(self) -> tuple[bool, ...]:
        """Whether there are softcap, alibi, sinks, lse and pages, in the order of FEATURES."""
        given = (self.softcap, self.alibi, self.sinks)
        return *(part is not None for part in given), self.lse, self.block_table is not None

    def keys_of(self, k: Tensor) -> int:
        """How many keys a sequence has room for."""
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        return pages * k.shape[2]

    def gathered(self, cache: Tensor) -> Tensor:
        """k or v (B, K, S, D) of a cache in pages; a page that the table does not name is 0s."""
        if self.block_table is None:
            return cache
        table = self.block_table.long()
        known = (table >= 0) & (table < cache.shape[0])
        pages = cache[table.where(known, 0)].where(known[:, :, None, None, None], 0)
        B, n, K, page, D = pages.shape
        return pages.transpose(1, 2).reshape(B, K, n * page, D)


FEATURES = ("softcap", "alibi", "sinks", "lse", "paged")
