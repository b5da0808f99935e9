"""The masks of transformers' models as row intervals: no (T, S) mask where two numbers a row do.

transformers describes a mask by a function of (batch, head, query, key) indices and a padding
mask (B, S), and asks `interval_mask` to make of it what every layer's attention is then given:

    int32  (B, 1, T, 2)            row t of sequence b sees keys first <= s < last
    int32  (B, 1, T + S / 2, 2)    the same, then S flags, 1 for a key that is no padding
    bool   (B, 1, T, S)            masks that are no intervals
    float  (B, 1, T, S)            for models that work on masks themselves: eager attention's form

A plain small tensor passes through all that models do with a mask: `.to`, checkpointing,
`generate`, torch.compile. A model that does arithmetic with it fails by its shape. It is never
None, which would leave it to each module's `is_causal`; not every model sets that right.

Recognised  transformers' own functions, by their code, and what they are closed over: causal,
            full, sliding, chunked, packed, and several of them at once. Any other is evaluated once
            on all pairs; where its rows are intervals (blocks of image tokens) they are kept.
Padding     on a CPU it is looked at and becomes part of the intervals. On a GPU nothing waits for
            the device: its outline becomes part of them, and the flags are handed on, unless the
            caller knows that the outline is all of it (`unbroken_padding`).
Tracing     a graph cannot read what a function is closed over: it evaluates the function, in a
            reduction that compilers fuse, and asserts at run time that rows are intervals.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils as theirs

from swathe.kernels.attention.api import Mask
from swathe.modeling.masks import looked_at, opaque

MaskFunction = Callable[..., Any]
Part = tuple[str, dict[str, Any]]  # a kind of mask, and what its function is closed over
Seen = tuple[Tensor | None, Tensor | None]  # the first key and the one past the last, (1 or B, T)

_unbroken: ContextVar[bool] = ContextVar("unbroken_padding", default=False)
_UNPACKED = {"causal", "full", "window", "around", "chunk"}
# kinds of layers that work on the mask: they choose keys by it, or append to it
_ON_MASKS = {
    "indexed_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
    "minimax_m3_sparse",
}
# models where more than the attention interface takes the mask: a router; a choice of keys that
# transformers 5.10 does not say in `layer_types`; attention of their own
_ALSO_ON_MASKS = {"nllb-moe", "doge", "glm_moe_dsa", "bigbird_pegasus", "git"}


def interval_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = theirs.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    **_: Any,
) -> Tensor:
    """What transformers' AttentionMaskInterface calls; returns one of the forms listed above.

    attention_mask: bool (B, tokens so far), True for tokens that are no padding.
    Raises ValueError where "triton" is asked of a model with attention of its own.
    """
    B, T, S, device = batch_size, q_length, kv_length, torch.device(device)
    every = (B, T, S, q_offset, kv_offset, mask_function, use_vmap, device)
    parts = _parts(mask_function)
    plain = parts is not None and {kind for kind, _ in parts} <= _UNPACKED
    # a whole mask is asked for though nothing is special about it: the model works on it. Where the
    # offset is a tensor the cache is a static one, and transformers asks like that in any case
    whole = not (
        allow_is_causal_skip or allow_is_bidirectional_skip or isinstance(q_offset, Tensor)
    )
    if (plain and whole) or _works_on_masks(config):
        visible = _dense(*every, attention_mask)
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    rows = torch.arange(T, device=device)[None] + (q_offset - kv_offset)
    seen = _probed(*every) if parts is None else _seen(parts, rows, kv_offset)
    if seen is None:
        return _dense(*every, attention_mask)
    return _carrier(seen, _held(attention_mask, S, kv_offset), B, T, S, device)


@contextmanager
def unbroken_padding() -> Iterator[None]:
    """Promise that padding only stands before and after the tokens of each row, in this block."""
    token = _unbroken.set(True)
    try:
        yield
    finally:
        _unbroken.reset(token)


def intervals_of(mask: Tensor, T: int, S: int) -> Mask:
    """The Mask that an int32 tensor of this module means, for T queries and S keys.

    Raises ValueError for a tensor that was made for other lengths.
    """
    flags = (S + 1) // 2
    if mask.dim() != 4 or mask.shape[3] != 2 or mask.shape[2] not in (T, T + flags):
        raise ValueError(
            f"attention mask {tuple(mask.shape)} of {mask.dtype} is not one that was made for {T} "
            f"queries and {S} keys, which is (batch, 1, {T} or {T + flags}, 2); pass masks of your "
            "own as bool or floating point (batch, 1 or heads, queries, keys)"
        )
    rows = mask[:, 0, :T]
    keys = None if mask.shape[2] == T else mask[:, 0, T:].flatten(1)[:, :S] != 0
    return Mask(start=rows[..., 0], end=rows[..., 1], keys=keys)


def _carrier(
    seen: Seen, held: Tensor | None, B: int, T: int, S: int, device: torch.device
) -> Tensor:
    first, last = seen
    first = torch.zeros(1, 1, dtype=torch.long, device=device) if first is None else first
    last = torch.full((1, 1), S, device=device) if last is None else last
    if held is not None:
        begin, end, holes = _outline(held, S)
        first, last = torch.maximum(first, begin), torch.minimum(last, end)
        promised = not torch.compiler.is_compiling() and _unbroken.get()
        if promised or (looked_at(held) and not bool(holes.any())):
            held = None
    # two planes, so that a kernel reads each bound in place
    planes = torch.stack((first.expand(B, T), last.expand(B, T))).int()
    carrier = planes.permute(1, 2, 0)[:, None]
    if held is None:
        return carrier
    flags = F.pad(held.int(), (0, S % 2)).view(B, 1, -1, 2)
    return torch.cat((carrier, flags), 2)


def _held(attention_mask: Tensor | None, S: int, kv_offset: int) -> Tensor | None:
    """bool (B, S): the keys that are no padding; a static cache has room past the mask's end."""
    if attention_mask is None:
        return None
    held = attention_mask[:, kv_offset : kv_offset + S]
    missing = S - held.shape[1]
    return F.pad(held, (0, missing)) if missing > 0 else held


def _outline(held: Tensor, S: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first key held and the one past the last, (B, 1), and whether any between is not."""
    begin = held.int().argmax(1, keepdim=True)
    end = S - held.flip(1).int().argmax(1, keepdim=True)
    return begin, end, end - begin != held.sum(1, keepdim=True)


def _dense(
    B: int,
    T: int,
    S: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: MaskFunction,
    use_vmap: bool,
    device: torch.device,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """bool (B, 1, T, S), by transformers' own builder."""
    mask = theirs.sdpa_mask(
        batch_size=B,
        q_length=T,
        kv_length=S,
        q_offset=q_offset,  # type: ignore[arg-type]
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device,
    )
    assert mask is not None
    return mask


def _probed(*every: Any) -> Seen | None:
    """The intervals of a function that is not recognised, found by evaluating it; None if none."""
    *_, use_vmap, _ = every
    tracing = torch.compiler.is_compiling()
    if tracing and use_vmap:  # a user's own function, which may be anything
        return None
    visible = _dense(*every)[:, 0]
    if opaque(visible) and not tracing:
        return None
    S = visible.shape[2]
    key = torch.arange(S, device=visible.device)
    first = torch.where(visible, key, S).amin(-1)
    last = torch.where(visible, key + 1, 0).amax(-1)
    whole = (visible.sum(-1) == (last - first).clamp(min=0)).all()
    if tracing:
        torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
            whole,
            "a row of this attention mask sees keys on both sides of one that it does not see, "
            "which a compiled graph cannot find out beforehand; use attn_implementation='sdpa'",
        )
    elif not bool(whole):
        return None
    return first, last


def _parts(function: MaskFunction) -> list[Part] | None:
    """What a mask is the intersection of, as far as transformers' own functions say it."""
    if function is theirs.causal_mask_function:
        return [("causal", {})]
    if function is theirs.bidirectional_mask_function:
        return [("full", {})]
    kind = None
    if not torch.compiler.is_compiling():
        kind = _KINDS.get(getattr(function, "__code__", None))
    if kind is None:
        return None
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    closed_over = dict(zip(function.__code__.co_freevars, cells, strict=True))
    if kind != "and":
        return [(kind, closed_over)]
    found = [_parts(each) for each in closed_over["mask_functions"]]
    if any(parts is None for parts in found):
        return None
    return [part for parts in found for part in parts or ()]


def _seen(parts: list[Part], rows: Tensor, dropped: int) -> Seen | None:
    """The interval of keys, counted as `rows` (1 or B, T) are, that rows at these places see.

    `dropped` is the number of keys that a cache no longer holds, which are not counted.
    """
    kinds = {kind for kind, _ in parts}
    if "remapped" in kinds and "documents" not in kinds:
        return None  # places that start anew somewhere would be mistaken for each other
    first: Tensor | None = None
    last: Tensor | None = None
    for kind, closed_over in parts:
        if kind == "remapped":
            places = closed_over["position_ids"]
            inner = _parts(closed_over["mask_function"])
            seen = None if inner is None else _seen(inner, places, dropped)
            if seen is None:
                return None
            # within a document keys lie as far apart as their places
            begin, end = (None if b is None else b + (rows - places) for b in seen)
        else:
            begin, end = _BOUNDS[kind](closed_over, rows, dropped)
        first = _narrower(torch.maximum, first, begin)
        last = _narrower(torch.minimum, last, end)
    return first, last


def _narrower(of: Callable[..., Tensor], one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return of(one, other)


def _causal(_: dict[str, Any], rows: Tensor, dropped: int) -> Seen:
    return None, rows + 1


def _full(_: dict[str, Any], rows: Tensor, dropped: int) -> Seen:
    return None, None


def _window(closed_over: dict[str, Any], rows: Tensor, dropped: int) -> Seen:
    return rows - closed_over["sliding_window"] + 1, None


def _around(closed_over: dict[str, Any], rows: Tensor, dropped: int) -> Seen:
    window = closed_over["sliding_window"]
    return rows - window, rows + window + 1


def _chunk(closed_over: dict[str, Any], rows: Tensor, dropped: int) -> Seen:
    size, padding = closed_over["chunk_size"], closed_over["left_padding"][:, None]
    begin = rows - (rows + dropped - padding) % size
    return begin, begin + size


def _documents(closed_over: dict[str, Any], rows: Tensor, dropped: int) -> Seen:
    numbers = closed_over["packed_sequence_mask"].contiguous()  # they rise along a row
    first, last = (torch.searchsorted(numbers, numbers, right=right) for right in (False, True))
    return first, last


_BOUNDS: dict[str, Callable[[dict[str, Any], Tensor, int], Seen]] = {
    "causal": _causal,
    "full": _full,
    "window": _window,
    "around": _around,
    "chunk": _chunk,
    "documents": _documents,
}
_MADE_BY: dict[str, tuple[str, tuple[Any, ...], set[str]]] = {
    "and": ("and_masks", (theirs.causal_mask_function,), {"mask_functions"}),
    "window": ("sliding_window_overlay", (1,), {"sliding_window"}),
    "around": ("sliding_window_bidirectional_overlay", (1,), {"sliding_window"}),
    "chunk": ("chunked_overlay", (1, None), {"chunk_size", "left_padding"}),
    "documents": ("packed_sequence_mask_function", (None,), {"packed_sequence_mask"}),
    "remapped": (
        "remap_positions_for_packed_sequence",
        (theirs.causal_mask_function, None),
        {"mask_function", "position_ids"},
    ),
}


def _code_of(maker: str, arguments: tuple[Any, ...], closed_over: set[str]) -> Any:
    make = getattr(theirs, maker, None)  # some are newer than transformers 5.10
    code = None if make is None else make(*arguments).__code__
    return code if code is not None and set(code.co_freevars) == closed_over else maker


_KINDS = {_code_of(*made): kind for kind, made in _MADE_BY.items()}


def _works_on_masks(config: Any) -> bool:
    """Whether a model does more with its mask than hand it to the attention interface."""
    if config is None:
        return False
    if not _has_own_attention(type(config).__module__):
        kinds = getattr(config, "layer_types", None) or ()
        return config.model_type in _ALSO_ON_MASKS or not _ON_MASKS.isdisjoint(kinds)
    if config._attn_implementation == "triton":
        raise ValueError(
            f"{config.model_type}: this model has attention of its own in place of transformers' "
            "attention interface, so attn_implementation='triton' cannot reach it; use "
            "attn_implementation='eager', or 'swathe', which leaves it to the model"
        )
    return True


def _has_own_attention(configuration: str) -> bool:
    """Whether the model of a configuration's module defines attention beside the interface."""
    package, _, name = configuration.rpartition(".")
    modeling = sys.modules.get(f"{package}.{name.replace('configuration_', 'modeling_')}")
    if modeling is None or modeling.__name__ == configuration:
        return False
    own = (value for value in vars(modeling).values() if isinstance(value, type))
    return not hasattr(modeling, "ALL_ATTENTION_FUNCTIONS") and any(
        "Attention" in cls.__name__ and cls.__module__ == modeling.__name__ for cls in own
    )


# what torch.compiler.assume_constant_result sets: graphs take the answer as it is
_has_own_attention._dynamo_marked_constant = True  # type: ignore[attr-defined]
