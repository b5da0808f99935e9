"""exp, logistic, tanh and the normal distribution of csrc/vec_math.h, against fp64, on each set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import pi, sqrt
from struct import Struct

import pytest
import torch
from torch import Tensor

from support.tensors import instruction_sets
from swathe.kernels.core import cpp

pytestmark = pytest.mark.skipif(
    cpp.why_unavailable() is not None, reason=f"backend cpp: {cpp.why_unavailable()}"
)
# MathArguments of csrc/math.cpp
PACKED = Struct("=2Q2q")
SMALLEST = 2.0**-149


def _normal(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-x / sqrt(2))


# name: code, the function in fp64, and the largest error in units of 2^-24 of the result
FUNCTIONS: dict[str, tuple[int, Callable[[Tensor], Tensor], float]] = {
    "exp": (0, torch.exp, 1.5),
    "logistic": (1, torch.sigmoid, 3.5),
    "tanh": (2, torch.tanh, 2.5),
    "normal": (3, _normal, 8.0),
    "density": (4, lambda x: torch.exp(-0.5 * x * x) / sqrt(2 * pi), 3.0),
}


@pytest.fixture(params=instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpp.using_isa(request.param):
        yield request.param


def ours(function: str, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    code = FUNCTIONS[function][0]
    cpp.entry("swathe_math")(PACKED.pack(x.data_ptr(), y.data_ptr(), code, x.numel()))
    return y


def grid() -> Tensor:
    """Numbers of every exponent and sign, dense where the functions move."""
    every = torch.arange(0, 2**31, 4099, dtype=torch.int64).to(torch.int32).view(torch.float32)
    every = every[every.isfinite()]
    dense = torch.cat([torch.linspace(0, end, 200_001) for end in (1.0, 20.0, 110.0)])
    found = torch.cat([every, dense])
    return torch.cat([found, -found])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_within_a_few_units_of_the_result(function: str) -> None:
    _, exact, units = FUNCTIONS[function]
    x = grid()
    gold, found = exact(x.double()), ours(function, x)
    rounded = gold.float()
    infinite = rounded.isinf()
    assert torch.equal(found[infinite], rounded[infinite])
    error = (found.double() - gold).abs()[~infinite]
    off = (error - SMALLEST).clamp(min=0) / (gold.abs()[~infinite] * 2.0**-24 + SMALLEST)
    at = x[~infinite][off.argmax()].item()
    assert off.max() <= units, f"{function}({at}) is off by {off.max().item():.2f} * 2^-24"


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_infinities_and_nan(function: str) -> None:
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0])
    expected = FUNCTIONS[function][1](x.double()).float()
    torch.testing.assert_close(ours(function, x), expected, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_end_of_a_row_is_computed_like_the_rest(function: str) -> None:
    x = torch.linspace(-5, 5, 77)
    whole = ours(function, x)
    for count in (1, 3, 15, 16, 17, 50):
        assert torch.equal(ours(function, x[:count].clone()), whole[:count])
