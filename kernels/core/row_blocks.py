"""Tiles of kernels whose rows must be known whole, as norms' must: heuristics for every length."""

from __future__ import annotations

from swathe.kernels.core.launch import next_power_of_2
from swathe.kernels.core.tune import Blocks

# one tile a row up to these lengths; beyond, registers spill (gated in tests/offline)
ROW_LIMIT_FORWARD = 16_384
ROW_LIMIT_BACKWARD = 8_192
ROW_LIMIT_BACKWARD_ODD = 4_096  # rows that are no multiple of 16 are loaded element by element
WIDE_BLOCK = 4_096  # columns a tile where a row takes several
ELEMENTS_A_THREAD = 16  # two 16-byte loads of bf16 in flight for each thread and tensor


def whole_rows_backward(N: int) -> bool:
    """Whether a backward, with its sums over the rows, holds a row of N features in one tile."""
    limit = ROW_LIMIT_BACKWARD if N % 16 == 0 else ROW_LIMIT_BACKWARD_ODD
    return limit >= N


def row_blocks(N: int, whole: bool) -> Blocks:
    """Tile for rows of N features, `whole` or in parts; the number of rows has no say in it."""
    columns = next_power_of_2(N) if whole else WIDE_BLOCK
    rows = max(1, 2048 // columns) if whole else 1
    return Blocks(rows, columns, min(rows * columns // (32 * ELEMENTS_A_THREAD), 32))
