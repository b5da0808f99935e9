"""Functions that Triton has only through libdevice, for kernels: to a few units of 2^-24 in fp32.

None of them makes NaN or infinity from a finite number; NaN stays NaN.

    logistic(z)  1 / (1 + exp(-z)) and 1 / (1 + exp(z)), whose sum is 1, each to its own last digits
    tanh(x)      also near 0, where 1 - 2 / (exp(2x) + 1) cancels
    normal(x)    (1 + erf(x / sqrt(2))) / 2 and exp(-x^2 / 2) / sqrt(2 pi)

Source   tanh: Cephes tanhf, its polynomial below 0.625.
"""

# pyright: reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY_AT_0 = tl.constexpr(0.3989422804014327)


@triton.jit
def logistic(z):
    """The logistic function at z and at -z, from one exponential that cannot overflow."""
    small = tl.exp(-tl.abs(z))
    large = 1.0 / (1.0 + small)
    small = small * large
    return tl.where(z >= 0, large, small), tl.where(z >= 0, small, large)


@triton.jit
def tanh(x):
    """tanh(x)."""
    square = x * x
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * x + x
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def normal(x):
    """Distribution function and density of the standard normal distribution."""
    return 0.5 * (1.0 + tl.erf(x * _SQRT_HALF)), tl.exp(-0.5 * x * x) * _DENSITY_AT_0
