"""What attention's arguments must be like, and the Mask that they describe."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from swathe.kernels.attention.mask import Mask
from swathe.kernels.core.debug import debugging


def validate(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, block_table: Tensor | None = None
) -> None:
    """ValueError or TypeError for q, k and v that do not fit each other."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"attention: q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)};"
            " each needs four dimensions (batch, heads, tokens, head size)"
        )
    B, H, _, D = q.shape
    K = k.shape[1]
    batch = B if block_table is None else k.shape[0]  # pages have no batch
    if k.shape[0] != batch or k.shape[3] != D or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"attention: q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; needs q "
            "(B, H, T, D), k (B, K, S, D), v (B, K, S, E) with equal B, D, K and S"
        )
    if K == 0 or H % K:
        raise ValueError(
            f"attention: q has {H} heads and k has {K}; the number of query heads must be a "
            "multiple of the number of key and value heads"
        )
    if not (q.dtype == k.dtype == v.dtype) or not q.dtype.is_floating_point:
        raise TypeError(
            f"attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}; all three must have one "
            "floating-point dtype"
        )
    if not (q.device == k.device == v.device):
        raise ValueError(
            f"attention: q is on {q.device}, k on {k.device}, v on {v.device}; move them together"
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"attention: dropout={dropout}; it must be at least 0 and below 1")


def validate_scores(
    q: Tensor, softcap: float | None, alibi: Tensor | None, sinks: Tensor | None
) -> None:
    """ValueError or TypeError for numbers of scores that do not fit q (B, H, T, D)."""
    B, H = q.shape[:2]
    if softcap is not None and not 0 < softcap < inf:
        raise ValueError(
            f"attention: softcap={softcap}; it must be a positive number, or None for none"
        )
    for name, t, shapes in (("alibi", alibi, ((H,), (B, H))), ("sinks", sinks, ((H,),))):
        if t is None:
            continue
        if not t.is_floating_point():
            raise TypeError(f"attention: {name} is {t.dtype}; it must be floating point")
        if tuple(t.shape) not in shapes or t.device != q.device:
            raise ValueError(
                f"attention: {name} is {tuple(t.shape)} on {t.device}; q of {H} heads needs "
                f"{' or '.join(map(str, shapes))} on {q.device}"
            )


def describe(mask: Mask | Tensor | None, causal: bool, q: Tensor, S: int) -> Mask:
    """The Mask that a call means; what it is made of must fit q (B, H, T, D) and S keys."""
    if mask is None:
        return Mask(causal=causal, rows_may_be_empty=causal and q.shape[2] > S)
    if isinstance(mask, Tensor):
        if mask.dim() <= 4:
            mask = mask.expand(*[1] * (4 - mask.dim()), *mask.shape)
        if mask.dtype == torch.bool:
            mask = Mask(allowed=mask)
        elif mask.is_floating_point():
            mask = Mask(bias=mask)
        else:
            raise TypeError(
                f"attention: mask is {mask.dtype}; it must be bool (True: visible) or floating "
                "point (added to the scores). Use mask.bool() for a mask of 0 and 1"
            )
    if not mask.trivial:
        _check_parts(mask, q, S)
    return mask.with_causal() if causal else mask


def _check_parts(mask: Mask, q: Tensor, S: int) -> None:
    B, H, T, _ = q.shape
    rows, full = ((B,), (B, T)), ((B, H, T, S),)
    for name, part, shapes in (
        ("start", mask.start, rows),
        ("end", mask.end, rows),
        ("places", mask.places, ((B, T),)),
        ("prefix", mask.prefix, ((B,),)),
        ("keys", mask.keys, ((B, S),)),
        ("allowed", mask.allowed, full),
        ("bias", mask.bias, full),
    ):
        if part is not None and (
            part.device != q.device or not any(_broadcasts(part.shape, s) for s in shapes)
        ):
            raise ValueError(
                f"attention: mask ({name}) is {tuple(part.shape)} on {part.device}; it must "
                f"broadcast to {' or '.join(map(str, shapes))} on {q.device}, from q (B, H, T, D) "
                f"= {tuple(q.shape)} and {S} keys"
            )


def _broadcasts(shape: torch.Size, to: tuple[int, ...]) -> bool:
    return len(shape) == len(to) and all(
        have in (1, want) for have, want in zip(shape, to, strict=True)
    )


def placed(
    mask: Mask,
    q: Tensor,
    k: Tensor,
    S: int,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None,
    seq_lens: Tensor | None,
    block_table: Tensor | None,
) -> Mask:
    """The same mask, within packed documents or a cache that is not full."""
    B, _, T, _ = q.shape
    if mask.start is not None or mask.end is not None or mask.places is not None:
        raise ValueError(
            "attention: the mask says already where sequences start, end or sit; give that by the "
            "mask or by cu_seqlens and seq_lens, not by both"
        )
    if cu_seqlens is not None:
        if seq_lens is not None or block_table is not None or B != 1:
            raise ValueError(
                f"attention: cu_seqlens packs documents into one row, but q has {B} rows, seq_lens "
                f"is {_shape(seq_lens)} and block_table {_shape(block_table)}; pass B = 1 and "
                "neither, or a cache without cu_seqlens"
            )
        rows, keys = cu_seqlens if isinstance(cu_seqlens, tuple) else (cu_seqlens, None)
        _check_borders("cu_seqlens", rows, T, q)
        if keys is not None:
            _check_borders("cu_seqlens of the keys", keys, S, q)
        if (keys is None and T != S) or (keys is not None and keys.shape != rows.shape):
            raise ValueError(
                f"attention: q has {T} rows and k {S}, cu_seqlens is {_shape(rows)} and that of "
                f"the keys {_shape(keys)}; where they differ, pass a pair of equal length"
            )
        return mask.in_documents(rows, T, keys)
    if seq_lens is None:
        raise ValueError(
            f"attention: block_table is {_shape(block_table)} without seq_lens; pass seq_lens "
            f"({B},), the number of keys that each sequence holds"
        )
    _check_whole("seq_lens", seq_lens, (B,), q)
    if block_table is not None:
        _check_whole("block_table", block_table, (B, block_table.shape[-1]), q)
    if debugging():
        _look_at_cache(seq_lens, block_table, S, k)
    return mask.of_lengths(seq_lens, T)


def _shape(t: Tensor | None) -> str:
    return "None" if t is None else str(tuple(t.shape))


def _check_whole(name: str, t: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    if t.is_floating_point() or t.dtype == torch.bool:
        raise TypeError(f"attention: {name} is {t.dtype}; it must hold whole numbers (int32)")
    if tuple(t.shape) != shape or t.device != q.device:
        raise ValueError(
            f"attention: {name} is {tuple(t.shape)} on {t.device}; it must be {shape} on "
            f"{q.device}, from q (B, H, T, D) = {tuple(q.shape)}"
        )


def _check_borders(name: str, borders: Tensor, length: int, q: Tensor) -> None:
    _check_whole(name, borders, (max(borders.numel(), 2),), q)
    if debugging():
        values = borders.tolist()
        if values[0] != 0 or values[-1] > length or values != sorted(values):
            raise ValueError(
                f"attention: {name} is {values}; it must start at 0, never fall, and end at or "
                f"before {length}, the length of the row"
            )


def _look_at_cache(seq_lens: Tensor, block_table: Tensor | None, S: int, k: Tensor) -> None:
    longest, shortest = int(seq_lens.max()), int(seq_lens.min())
    if longest > S or shortest < 0:
        raise ValueError(
            f"attention: seq_lens goes from {shortest} to {longest}, but the cache has room for "
            f"{S} keys a sequence; make the cache longer or evict"
        )
    if block_table is None:
        return
    used = -(-seq_lens // k.shape[2])
    known = (block_table >= 0) & (block_table < k.shape[0])
    past = torch.arange(block_table.shape[1], device=used.device) >= used[:, None]
    outside = (~(known | past)).nonzero().tolist()
    if outside:
        b, n = outside[0]
        raise ValueError(
            f"attention: block_table[{b}, {n}] is {int(block_table[b, n])}, but the cache has "
            f"pages 0 to {k.shape[0] - 1} and sequence {b} uses {int(used[b])} of them"
        )
