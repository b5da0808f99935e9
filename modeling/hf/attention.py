"""attn_implementation="swathe" and "triton": transformers' attention by swathe's.

    "triton"    the Triton kernels, which serve or raise
    "swathe"    what serves best: on a GPU the Triton kernels, else torch's; on a CPU the C++ ones

Every keyword that transformers' models pass is served, or is known to change nothing here, or is
refused. Masks come from masks.py, as intervals; bool and floating-point masks (B, 1 or H, T, S)
that a caller made are taken as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from swathe.kernels.attention.api import (
    AttentionSpec,
    Mask,
    attention,
    attention_with_weights,
    resolve_attention,
)
from swathe.kernels.core.errors import BackendUnavailable, UnsupportedFeature, did_you_mean
from swathe.kernels.core.op import plain, wants_gradient
from swathe.kernels.core.registry import AUTO, on_change, registered
from swathe.modeling.hf.masks import intervals_of

# what models hand to every module; where attention needs it, masks.py has seen it
_WITHOUT_EFFECT = frozenset(
    [
        *("cache", "past_key_value", "past_key_values", "cache_position", "use_cache"),
        *("encoder_hidden_states", "encoder_attention_mask", "position_ids", "position_embeddings"),
        *("max_length_q", "max_length_k", "seq_idx", "token_type_ids", "layer_idx", "return_dict"),
        *("output_hidden_states", "output_router_logits", "logits_to_keep", "num_items_in_batch"),
        *("deterministic", "target_dtype", "labels", "shift_labels"),
    ]
)
Borders = tuple[Tensor | None, Tensor | None]  # of packed documents, in the queries and the keys


@dataclass(frozen=True)
class _Options:
    fallback: str | None = None
    ignore: frozenset[str] = frozenset()


_options = _Options()


class attention_options:  # lower case, as torch.no_grad is
    """What "swathe" and "triton" do with calls that they cannot serve; from now on, or in a block.

        swathe.hf.attention_options(fallback="sdpa")            # until it is called again
        with swathe.hf.attention_options(fallback="eager"):     # in this block
            model(ids, output_attentions=True)

    `fallback` is a backend of swathe.attention that steps in where the one asked for cannot serve:
    "eager" serves everything, attention weights included. None, the default, raises instead.
    `ignore` names keywords that the models' attention may be given and that change nothing; by
    default an unknown keyword is refused. Both hold for the whole process; what is not given goes
    back to its default. Raises ValueError for a fallback that is no backend.
    """

    def __init__(self, *, fallback: str | None = None, ignore: Iterable[str] = ()) -> None:
        global _options
        known = [AUTO, *registered("attention")]
        if fallback is not None and fallback not in known:
            raise ValueError(
                f"attention_options: fallback={fallback!r}{did_you_mean(fallback, known)}; it must "
                f"be None or one of {known}"
            )
        self._before, _options = _options, _Options(fallback, frozenset(ignore))

    def __enter__(self) -> attention_options:
        return self

    def __exit__(self, *_: object) -> None:
        global _options
        _options = self._before


def _forward(
    asked: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    output_attentions: bool | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """What a layer of a model calls: o (B, T, H, E), and its weights (B, H, T, S) or None.

    Shapes: query (B, H, T, D), key (B, K, S, D), value (B, K, S, E), with any strides.
    `s_aux` holds a sink a head, (H,), `sinks` one a row, (B, H, T, 1).
    """
    _refuse_unknown(rest)
    if query.shape[0] == 1 != key.shape[0]:  # learned queries, the same for every sequence
        query = query.expand(key.shape[0], -1, -1, -1)
    S = key.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    borders = (cu_seq_lens_q, cu_seq_lens_k)
    mask = _mask(attention_mask, query, S, causal, sliding_window, borders)
    mask = _with(mask, position_bias, indices, S)
    call = _Call(
        query.device,
        query.dtype,
        size=max(query.shape[-1], value.shape[-1]),
        grouped=query.shape[1] > key.shape[1],
        dropout=dropout > 0,
        weights=bool(output_attentions),
        softcap=softcap is not None,
        sinks=s_aux is not None,
        lse=sinks is not None,
        grad=wants_gradient(query, key, value, s_aux, mask.bias),
    )
    backend = _backend(asked, _options.fallback, call)
    numbers: Any = {"scale": scaling, "dropout": dropout, "softcap": softcap, "sinks": s_aux}
    if output_attentions:
        return _with_weights(query, key, value, mask, sinks, **numbers)
    if sinks is None:
        o = attention(query, key, value, mask, **numbers, implementation=backend)
        return o.contiguous(), None
    o, lse = attention(query, key, value, mask, **numbers, return_lse=True, implementation=backend)
    # what a key of value 0 and logit `sinks` leaves of a row's weight
    left = torch.sigmoid(lse - sinks[..., 0].float()).transpose(1, 2)[..., None]
    return (o * left).to(o.dtype).contiguous(), None


def _with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, row_sinks: Tensor | None, **numbers: Any
) -> tuple[Tensor, Tensor]:
    if row_sinks is not None:
        raise UnsupportedFeature(
            "attention: weights (output_attentions=True) beside a sink for every row (sinks) are "
            "not served; use attn_implementation='eager'"
        )
    scale = numbers.pop("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, weights = attention_with_weights(q, k, v, AttentionSpec(mask, scale, **numbers))
    return o.contiguous(), weights


def swathe_attention_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """What attn_implementation="swathe" calls."""
    return _forward("swathe", *args, **kwargs)


def triton_attention_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """What attn_implementation="triton" calls."""
    return _forward("triton", *args, **kwargs)


FORWARDS = {"swathe": swathe_attention_forward, "triton": triton_attention_forward}


def _refuse_unknown(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value is None or name in _WITHOUT_EFFECT or name in _options.ignore:
            continue
        raise TypeError(
            f"attention was given {name!r}, which swathe does not know and will not pass over, as "
            "it could change the result. Choose attn_implementation='eager', or, where it changes "
            f"nothing, swathe.hf.attention_options(ignore=[{name!r}])"
        )


class _Kept(NamedTuple):
    """A Mask, and what it was made of: layers ask for the same few, one after the other."""

    facts: tuple[Any, ...]
    tensors: tuple[ref[Tensor] | None, ...]
    versions: tuple[int, ...]
    mask: Mask

    def fits(self, facts: tuple[Any, ...], tensors: tuple[Tensor | None, ...]) -> bool:
        """Whether the mask says the same as these would."""
        held = (None if each is None else each() for each in self.tensors)
        same = all(one is other for one, other in zip(held, tensors, strict=True))
        return same and self.facts == facts and self.versions == tuple(map(_version, tensors))


_kept: list[_Kept] = []
_KEEP = 4  # kinds of layers in a model, and their masks


def _forget(gone: ref[Tensor]) -> None:
    _kept[:] = [kept for kept in _kept if not any(each is gone for each in kept.tensors)]


def _version(t: Tensor | None) -> int:
    return 0 if t is None or t.is_inference() else t._version


def _mask(
    given: Tensor | None, q: Tensor, S: int, causal: bool, window: int | None, borders: Borders
) -> Mask:
    """What a layer's mask and its borders of documents say, for queries q (B, H, T, D).

    Where a model makes no mask, as towers of images do, `causal` and `window` say it all.
    """
    # every mask that masks.py makes has the window in it
    window = window if given is None and window is not None and window < S else None
    parts = (q, S, causal, window)
    dense = given is not None and given.dtype != torch.int32
    capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
    if dense or capturing or not plain((q,)):
        return _made(given, *parts, borders)
    facts = (q.shape[0], q.shape[2], q.device, torch.is_inference_mode_enabled(), *parts[1:])
    tensors = (given, *borders)
    for kept in tuple(_kept):
        if kept.fits(facts, tensors):
            return kept.mask
    mask = _made(given, *parts, borders)
    held = tuple(None if t is None else ref(t, _forget) for t in tensors)
    made = _Kept(facts, held, tuple(map(_version, tensors)), mask)
    _kept[:] = [made, *_kept[: _KEEP - 1]]
    return mask


def _made(
    given: Tensor | None, q: Tensor, S: int, causal: bool, window: int | None, borders: Borders
) -> Mask:
    T = q.shape[2]
    if given is None:
        ahead = None if window is None or causal else window - 1
        empty = causal and T > S
        mask = Mask(causal=causal, window=window, ahead=ahead, rows_may_be_empty=empty)
    elif given.dim() != 4:
        raise ValueError(
            f"attention mask {tuple(given.shape)}: it must have four dimensions (batch, 1 or "
            f"heads, {T} queries, {S} keys); give padding (batch, tokens) to the model instead"
        )
    elif given.dtype == torch.bool:
        mask = Mask(allowed=given)
    elif given.is_floating_point():
        mask = Mask(bias=given)
    else:
        mask = intervals_of(given, T, S)
    return mask if borders[0] is None else _in_documents(mask, q, S, borders[0], borders[1])


def _in_documents(mask: Mask, q: Tensor, S: int, rows: Tensor, keys: Tensor | None) -> Mask:
    """The same mask within documents that are laid end to end; see Mask.in_documents."""
    B, T = q.shape[0], q.shape[2]
    keys = None if keys is rows else keys
    if B != 1 or (keys is None and T != S):
        raise ValueError(
            f"attention: cu_seq_lens_q packs documents into one row, but q has {B} rows of {T} "
            f"tokens and there are {S} keys; pass one row, and cu_seq_lens_k where keys differ"
        )
    if mask.start is None or mask.end is None:
        return mask.in_documents(rows, T, keys)
    # the intervals count keys from the first one, whatever the documents
    own = Mask().in_documents(rows, T, keys)
    assert own.start is not None and own.end is not None
    start, end = torch.maximum(mask.start, own.start), torch.minimum(mask.end, own.end)
    return replace(mask, start=start, end=end)


def _with(mask: Mask, position_bias: Tensor | None, indices: Tensor | None, S: int) -> Mask:
    """The same mask and what a layer adds to its scores, or the keys (B, T, n) that it picked."""
    if position_bias is not None:
        bias = position_bias if mask.bias is None else position_bias + mask.bias
        mask = replace(mask, bias=bias)
    if indices is None:
        return mask
    picked = torch.zeros(*indices.shape[:2], S, dtype=torch.bool, device=indices.device)
    picked = picked.scatter(-1, indices.long(), True)[:, None]
    allowed = picked if mask.allowed is None else mask.allowed & picked
    return replace(mask, allowed=allowed, rows_may_be_empty=True)


class _Call(NamedTuple):
    """What decides which backend serves a call."""

    device: torch.device
    dtype: torch.dtype
    size: int
    grouped: bool
    dropout: bool
    weights: bool
    softcap: bool
    sinks: bool
    lse: bool
    grad: bool


_chosen: dict[tuple[Any, ...], str] = {}
on_change(_chosen.clear)


def _backend(asked: str, fallback: str | None, call: _Call) -> str:
    """The backend of swathe.attention that serves a call, by name.

    Raises what resolve_attention raises where neither the one asked for nor the fallback does.
    """
    if torch.compiler.is_compiling():
        # a dict's keys are numbers, never symbols
        return _choose(asked, fallback, *(next(iter({fact: None})) for fact in call))
    key = (asked, fallback, call)
    if key not in _chosen:
        _chosen[key] = _choose(asked, fallback, *call)
    return _chosen[key]


def _choose(asked: str, fallback: str | None, *facts: Any) -> str:
    call = _Call(*facts)
    order = ["triton"] if asked == "triton" else [AUTO]
    if asked == "swathe" and call.device.type == "cuda":
        order = ["triton", AUTO]
    refused: list[BackendUnavailable | UnsupportedFeature] = []
    for name in [*order, *([] if fallback is None else [fallback])]:
        try:
            return _serving(call, name)
        except (BackendUnavailable, UnsupportedFeature) as why:
            refused.append(why)
    raise type(refused[0])(
        f"attn_implementation={asked!r}: {'; '.join(map(str, refused))}. Use "
        "attn_implementation='swathe', which takes what serves, or let another backend step in: "
        "swathe.hf.attention_options(fallback='eager') serves everything"
    )


# what torch.compiler.assume_constant_result sets: graphs take the answer as it is
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _serving(call: _Call, name: str) -> str:
    return resolve_attention(
        torch.empty(0, dtype=call.dtype, device=call.device),
        call.size,
        name,
        groups=2 if call.grouped else 1,
        dropout=call.dropout,
        weights=call.weights,
        softcap=call.softcap,
        sinks=call.sinks,
        lse=call.lse,
        grad=call.grad,
    ).backend
