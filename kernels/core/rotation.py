"""The angles of a rotation: tables of cos and sin, how tokens and pairs find their entries in them.

    y1, y2 = x1 * c1 - x2 * s1,  x2 * c2 + x1 * s2        for each of the R/2 pairs (x1, x2)

Pairs    halves (x[i], x[i + R/2]) or, interleaved, neighbours (x[2i], x[2i + 1]), i < R/2.
Tables   cos, sin: (S, W), (B or 1, S, W), or with positions (P, W), whose rows each token gathers.
         W = R: an entry for each member of a pair, in x's own order, as HF makes them; c1 and c2
         need not be equal. W = R/2 ("compact"): one entry for both.
mrope    sections (t, h, w) of pairs, t + h + w = R/2: pair i reads axis 0, 1 or 2 of a leading axis
         of 3, which the tables have, (3, B or 1, S, W), or the positions, (3, B or 1, S).
Range    a position outside its table gives NaN on a GPU and IndexError on a CPU.
Kernels  core/heads.py loads them.
Source   Su et al. 2021, arXiv:2104.09864, eq. 34; mrope: Qwen2-VL, arXiv:2409.12191, section 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from swathe.kernels.core.op import wants_gradient
from swathe.kernels.core.registry import Choice

Members = tuple[Tensor, Tensor, Tensor, Tensor]  # c1, s1, c2, s2

HALVES, COMPACT, PAIRS = 0, 1, 2  # FORM: how the members of a pair find their entries


class Angles(NamedTuple):
    """What a kernel takes to find angles: tensors, specialised ints, plain ints, constexprs."""

    tensors: tuple[Tensor, Tensor, Tensor]  # cos, sin, positions (cos again where there are none)
    strides: tuple[int, int, int, int]  # of axis, batch, token; and from row to row of a table
    plain: tuple[int, int, int]  # rows of the table, first pair of section h, first of section w
    flags: tuple[int, bool, bool]  # FORM, POSITIONS, MROPE


def angles(
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    mrope_section: Sequence[int] | None,
    rotary_dim: int,
    interleaved: bool,
) -> Angles:
    """The kernel arguments of validated tables; copies them only if their last dim is strided."""
    if cos.stride(-1) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    mrope = mrope_section is not None
    strides = cos.stride()[:-1] if positions is None else positions.stride()
    sizes = cos.shape[:-1] if positions is None else positions.shape
    own_batch = len(sizes) - mrope > 1 and sizes[-2] > 1
    axis, batch = strides[0] if mrope else 0, strides[-2] if own_batch else 0
    compact = cos.shape[-1] != rotary_dim
    form = COMPACT if compact else PAIRS if interleaved else HALVES
    t, h, _ = mrope_section if mrope_section is not None else (0, 0, 0)
    return Angles(
        (cos, sin, cos if positions is None else positions),
        (axis, batch, strides[-1], cos.stride(-2)),
        (cos.shape[-2], t, t + h),
        (form, positions is not None, mrope),
    )


def members(
    table: Tensor,
    positions: Tensor | None,
    mrope_section: Sequence[int] | None,
    rotary_dim: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Entries for the first and the second member of each pair, (1, S, R/2) or (B, 1, S, R/2)."""
    if positions is not None:
        table = table[positions]
    compact = table.shape[-1] != rotary_dim
    if mrope_section is not None:
        sizes = list(mrope_section)
        if not compact:
            sizes = [2 * size for size in sizes] if interleaved else 2 * sizes
        parts = table.split(sizes, dim=-1)
        table = torch.cat([part[axis % 3] for axis, part in enumerate(parts)], dim=-1)
    table = table.unsqueeze(-3)
    if compact:
        return table, table
    if interleaved:
        return table[..., 0::2], table[..., 1::2]
    return table[..., : rotary_dim // 2], table[..., rotary_dim // 2 :]


def turned(x: Tensor, angles: Members, interleaved: bool) -> Tensor:
    """Every pair of x turned by its angle; features past the R that the angles reach stay."""
    c1, s1, c2, s2 = angles
    half = c1.shape[-1]
    paired, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        x1, x2 = paired[..., 0::2], paired[..., 1::2]
    else:
        x1, x2 = paired[..., :half], paired[..., half:]
    y1, y2 = x1 * c1 + -x2 * s1, x2 * c2 + x1 * s2
    y = torch.stack((y1, y2), -1).flatten(-2) if interleaved else torch.cat((y1, y2), -1)
    return torch.cat((y, rest.to(y.dtype)), -1) if rest.shape[-1] else y


def validate_rotation(
    op: str,
    q: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    mrope_section: Sequence[int] | None,
    rotary_dim: int | None,
) -> int:
    """R, once tables, positions and sections are known to fit q (B, H, S, D).

    Raises ValueError or TypeError naming `op` and the argument.
    """
    B, _, S, D = q.shape
    width = cos.shape[-1] if cos.dim() else 0
    R = D if rotary_dim is None else rotary_dim
    if not 2 <= R <= D or R % 2:
        raise ValueError(
            f"{op}: rotary_dim={R}; heads of {D} features need an even number from 2 to {D}"
        )
    if cos.shape != sin.shape or cos.dtype != sin.dtype or not cos.is_floating_point():
        raise ValueError(
            f"{op}: cos is {tuple(cos.shape)} {cos.dtype} and sin {tuple(sin.shape)} {sin.dtype}; "
            "both must have one shape and one floating-point dtype"
        )
    if width not in (R, R // 2):
        raise ValueError(
            f"{op}: cos and sin have {width} entries a row; rotary_dim={R} needs {R} (one for each "
            f"feature) or {R // 2} (one for each pair)"
        )
    at = cos.device if positions is None else positions.device
    if not q.device == cos.device == sin.device == at:
        raise ValueError(f"{op}: cos, sin and positions must be on {q.device} like q")
    if mrope_section is not None and (
        len(mrope_section) != 3 or min(mrope_section) < 0 or sum(mrope_section) != R // 2
    ):
        raise ValueError(
            f"{op}: mrope_section={tuple(mrope_section)}; it must be three numbers of pairs that "
            f"sum to {R // 2}, half of rotary_dim={R}"
        )
    axis = (3,) if mrope_section is not None else ()
    if positions is None:
        _validate_shape(op, "cos and sin are", tuple(cos.shape), axis, B, S, (width,))
        return R
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: positions are {positions.dtype}; they must be int32 or int64")
    if cos.dim() != 2:
        raise ValueError(
            f"{op}: cos and sin are {tuple(cos.shape)}; with positions they must be a table "
            f"(rows, {width})"
        )
    _validate_shape(op, "positions are", tuple(positions.shape), axis, B, S, ())
    return R


def tables_want_gradient(op: str, cos: Tensor, sin: Tensor, implementation: str | Choice) -> bool:
    """Whether cos or sin requires a gradient; ValueError for a Choice of a backend without one."""
    wanted = wants_gradient(cos, sin)
    if wanted and isinstance(implementation, Choice) and implementation.backend != "eager":
        raise ValueError(
            f"{op}: cos or sin requires a gradient, which backend {implementation.backend!r} "
            "does not provide; detach them or choose implementation='eager'"
        )
    return wanted


def _validate_shape(
    op: str,
    what: str,
    found: tuple[int, ...],
    axis: tuple[int, ...],
    B: int,
    S: int,
    last: tuple[int, ...],
) -> None:
    if found == (*axis, S, *last):
        return
    allowed = [(*axis, S, *last), (*axis, 1, S, *last), (*axis, B, S, *last)]
    if found not in allowed:
        listed = " or ".join(map(str, dict.fromkeys(allowed)))
        raise ValueError(
            f"{op}: {what} {found}; {B} sequences of {S} tokens"
            f"{' with mrope_section' if axis else ''} need {listed}"
        )
