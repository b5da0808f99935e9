"""Column sums in two stages: programs write fp32 partial rows, one more kernel adds them up.

No atomics and no zeroed buffer: the order of the sum depends on the shape and the number of
programs alone, so reruns are bit-equal.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from swathe.kernels.core.launch import Launcher, cdiv

TALL, FLAT, WARPS = (32, 64), (4, 512), 4  # partials by columns of a tile; FLAT for few partials


@triton.jit(do_not_specialize=["P"])
def _sum_partials(
    partial_ptr, out_ptr, N, P, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """out[n] = sum_p partial[p, n], always in the same order."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, P, BLOCK_P):
        p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        live = (p < P)[:, None] & (n < N)[None, :]
        total += tl.load(partial_ptr + p[:, None] * N + n[None, :], live, other=0.0)
    tl.store(out_ptr + n, tl.sum(total, 0).to(out_ptr.dtype.element_ty), n < N)


_sum_partials_at = Launcher(_sum_partials)


def sum_partials(partial: Tensor, out: Tensor) -> None:
    """Write the column sums of `partial` (P, N) fp32 to `out` (N,), rounded once to its dtype.

    Launched on the current device: the caller holds the guard.
    """
    P, N = partial.shape
    block = FLAT if FLAT[0] >= P else TALL
    _sum_partials_at((cdiv(N, block[1]), 1, 1), (partial, out), (N,), (P,), block, WARPS)
