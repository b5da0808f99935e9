"""qk_norm_rotary past 2^31 elements: offsets are 64-bit from the first multiplication on."""

from __future__ import annotations

import pytest
import torch

from support.interpreter import sanitized, virtual_tensor
from swathe.kernels.qk_norm_rotary import _cpp, _triton

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bench.gpu runs the real thing")
D = 64
STRIDE = 2**26


@pytest.mark.parametrize("along", ["batch", "heads", "tokens"])
@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_last_row_of_a_huge_tensor(backend: str, along: str) -> None:
    module = _triton if backend == "triton" else _cpp
    shape = {"batch": (34, 1, 1), "heads": (1, 34, 1), "tokens": (1, 1, 34)}[along]
    strides = tuple(STRIDE if n > 1 else D for n in shape)
    memory = virtual_tensor((34 * STRIDE,), torch.bfloat16)
    x = memory.as_strided((*shape, D), (*strides, 1))
    last = x[-1:, -1:, -1:]
    assert last.storage_offset() > 2**31
    last.copy_(torch.arange(D).remainder(7) + 1)
    weight, tokens = torch.ones(D).bfloat16(), shape[2]
    table = torch.arange(tokens * D).view(tokens, D).remainder(5).bfloat16() - 2
    rotation = (table, table, None, None, D, False)
    ends = (table[-1:], table[-1:], None, None, D, False)
    operands = (weight, None, 1e-6, 0.0)
    alone = module.forward(last.clone(), None, *operands, "llama", "fp32", *ends)[0]
    with sanitized(overflow=True):
        (y,) = module.forward(x, None, *operands, "llama", "fp32", *rotation)
        dx, dw = module.backward(x, None, x, None, *operands, *rotation)
    assert torch.equal(y[-1:, -1:, -1:], alone)
    y[-1:, -1:, -1:], finite = 0, dx.isfinite().all() and dw.isfinite().all()
    assert not y.any() and finite
    assert dx[-1, -1, -1].any() and dw.any()
    dx[-1, -1, -1] = 0
    assert not dx.any()
