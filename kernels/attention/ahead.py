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
from swathe.kernels.attention.paths import PATHS, forced

_B, _T, _H, _K = 2, 256, 8, 2
_LONG = 8192  # keys that several programs of a short query share
_BOUNDS = {"whole": (1, 1), "causal": (1, _T)}


def calls(D: int, E: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """What to call for heads of D and E features, and what to say of it, on each of paths.PATHS.

    Where a path does not serve a call the portable one does, whose kernels are there already.
    """
    for path in PATHS:
        for mask in _BOUNDS:
            yield f"{mask}, {path}", partial(_both, path, D, E, dtype, _BOUNDS[mask])
        # decoding on the third path is the second's
        for keys in () if path == "gluon_fused" else (_T, _LONG):
            yield f"one query of {keys} keys, {path}", partial(_decode, path, D, E, dtype, keys)


def _both(path: str, D: int, E: int, dtype: torch.dtype, bounds: tuple[int, int]) -> None:
    inputs = _inputs(D, E, dtype, _T, _T)
    rest = (_integers(bounds), _integers(bounds), *[None] * 7, 0.125, 0.0, 0.0, False)
    with forced(path):
        o, lse = _triton.forward(*inputs, *rest)
        _triton.backward(o, None, *inputs, o, lse, *rest)


def _decode(path: str, D: int, E: int, dtype: torch.dtype, keys: int) -> None:
    bounds = _integers(_BOUNDS["whole"])
    rest: tuple[Any, ...] = (bounds, bounds, *[None] * 7, 0.125, 0.0)
    with forced(path):
        _triton.decode(*_inputs(D, E, dtype, 1, keys), *rest)


def _inputs(D: int, E: int, dtype: torch.dtype, T: int, S: int) -> tuple[Tensor, Tensor, Tensor]:
    def made(rows: int, heads: int, features: int) -> Tensor:
        memory = torch.empty(_B, rows, heads, features, dtype=dtype, device="meta")
        return memory.transpose(1, 2)

    return made(T, _H, D), made(S, _K, D), made(S, _K, E)


def _integers(shape: tuple[int, int]) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device="meta")
