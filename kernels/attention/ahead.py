"""Calls of attention, on tensors without data, whose kernels serve all others of their head sizes.

Beside sizes and dtypes, kernels are specialised for integers that are 1 or multiples of 16: strides
are those of (B, S, H, D) memory, bounds are shared by all rows or by all sequences. Bounds of each
sequence have the latter's kernels where its rows are a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.attention import _triton
from swathe.kernels.attention._triton_rows import Rows

_B, _T, _H, _K = 2, 256, 8, 2
_LONG = 8192  # keys that several programs of a short query share
_BOUNDS = {"whole": (1, 1), "causal": (1, _T)}


def calls(D: int, E: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """What to call for heads of D and E features, and what to say of it."""
    for mask, shape in _BOUNDS.items():
        yield f"{mask}, portable", partial(_both, _triton, _triton, D, E, dtype, shape)
        gluon = _gluon_for(D, E, dtype)
        if gluon is not None:
            yield f"{mask}, Gluon", partial(_both, gluon, None, D, E, dtype, shape)
    for keys in (_T, _LONG):
        yield f"one query, {keys} keys", partial(_decode, D, E, dtype, keys)


def _gluon_for(D: int, E: int, dtype: torch.dtype) -> Any:
    """The launchers in Gluon if the target is what they are for."""
    q, k, v = _inputs(D, E, dtype, _T, _T)
    from swathe.kernels.attention import _gluon

    return _gluon if _gluon.why_not(q, k, v, Rows(*_rest(_BOUNDS["causal"]))) is None else None


def _both(
    forward: Any, backward: Any, D: int, E: int, dtype: torch.dtype, bounds: tuple[int, int]
) -> None:
    inputs, rest = _inputs(D, E, dtype, _T, _T), _rest(bounds)
    o, lse = forward.forward(*inputs, *rest)
    if backward is not None:
        backward.backward(o, None, *inputs, o, lse, *rest)


def _decode(D: int, E: int, dtype: torch.dtype, keys: int) -> None:
    bounds = _integers(_BOUNDS["whole"])
    rest: tuple[Any, ...] = (bounds, bounds, *[None] * 7, 0.125, 0.0)
    _triton.decode(*_inputs(D, E, dtype, 1, keys), *rest)


def _inputs(D: int, E: int, dtype: torch.dtype, T: int, S: int) -> tuple[Tensor, Tensor, Tensor]:
    def made(rows: int, heads: int, features: int) -> Tensor:
        memory = torch.empty(_B, rows, heads, features, dtype=dtype, device="meta")
        return memory.transpose(1, 2)

    return made(T, _H, D), made(S, _K, D), made(S, _K, E)


def _rest(bounds: tuple[int, int]) -> tuple[Any, ...]:
    """Fields of Rows: bounds and a positive scale."""
    return _integers(bounds), _integers(bounds), *[None] * 7, 0.125, 0.0, 0.0, False


def _integers(shape: tuple[int, int]) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device="meta")
