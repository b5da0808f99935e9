"""Attention for Hopper in Gluon: the launchers of backend "gluon", each of which serves or refuses.

Backend "triton" takes them too where paths.py says so and `why_not` has no objection. Calls in
which there is nothing to compute go to _triton's launchers, which answer without a kernel.

Shapes, masks, rounding, stats and order are _triton.py's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from swathe.kernels.attention import _gluon, _gluon_backward, _gluon_decode, _triton
from swathe.kernels.attention._triton_rows import Rows
from swathe.kernels.core.errors import UnsupportedFeature

__all__ = ["backward", "backward_bias", "decode", "forward", "why_not"]


def why_not(which: str, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> str | None:
    """Why one of paths.PASSES cannot be served, or None; `rest` are its launcher's arguments."""
    if which == "decode":
        _, _, _, keys, allowed, bias, _, alibi, block_table, _, _ = rest
        return _gluon_decode.why_not(q, k, v, keys, allowed, bias, alibi, block_table)
    if which == "backward":
        return _gluon_backward.why_not(q, k, v, Rows(*rest))
    return _gluon.why_not(q, k, v, Rows(*rest))


def _refuse(which: str, *given: Any) -> None:
    reason = why_not(which, *given)
    if reason is not None:
        raise UnsupportedFeature(
            f"attention: backend 'gluon' cannot serve this {which}: {reason}. "
            "Backend 'triton' serves it"
        )


def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """o (B, T, H, E) and lse2 (B, H, T) in fp32; `rest` are the fields of Rows.

    Raises UnsupportedFeature with what `why_not` says.
    """
    if not (q.numel() and k.numel() and v.numel()):
        return _triton.forward(q, k, v, *rest)
    _refuse("forward", q, k, v, *rest)
    return _gluon.forward(q, k, v, *rest)


def backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and the rows' statistics, as op.py says. Raises as `forward` does."""
    if not (q.numel() and k.numel() and v.numel()):
        return _triton.backward(do, dlse, q, k, v, o, lse, *rest)
    _refuse("backward", q, k, v, *rest)
    return _gluon_backward.backward(do, dlse, q, k, v, o, lse, *rest)


def backward_bias(do: Tensor, q: Tensor, k: Tensor, v: Tensor, stats: Tensor, *rest: Any) -> Tensor:
    """dbias: none is ever asked for, since the forward refuses a bias."""
    raise UnsupportedFeature("attention: backend 'gluon' takes no bias; backend 'triton' does")


def decode(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """o and lse2 of few queries over a cache; `rest` as _triton_decode.decode. Raises likewise."""
    if not (q.numel() and k.numel() and v.numel()):
        return _triton.decode(q, k, v, *rest)
    _refuse("decode", q, k, v, *rest)
    return _gluon_decode.decode(q, k, v, *rest)
