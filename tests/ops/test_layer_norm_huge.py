"""LayerNorm past 2^31 elements: offsets are 64-bit from the first multiplication on."""

from __future__ import annotations

import pytest
import torch

from support.interpreter import sanitized, virtual_tensor
from swathe.kernels.layer_norm import _cpp, _triton

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bench.gpu runs the real thing")
STRIDE = 2**30 + 2**4


@pytest.mark.parametrize("N", [768, 33_001], ids=["whole rows", "tiles"])
@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_last_row_of_a_huge_tensor(backend: str, N: int) -> None:
    module = _triton if backend == "triton" else _cpp
    x = virtual_tensor((3 * STRIDE,), torch.bfloat16).view(3, STRIDE)[:, :N]
    assert x[-1].storage_offset() > 2**31
    x[-1] = torch.arange(N).remainder(7) + 1
    weight = torch.ones(N).bfloat16()
    y1, saved1 = module.forward(x[-1:].clone(), weight, None, 1e-6)
    dx1, _ = module.backward(x[-1:].clone(), x[-1:].clone(), weight, saved1, None, None)
    with sanitized(overflow=True):
        y, saved = module.forward(x, weight, None, 1e-6)
        dx, sums = module.backward(x, x, weight, saved, None, torch.float32)
    assert torch.equal(y[-1:], y1) and torch.equal(dx[-1:], dx1) and dx1.any()
    assert not y[:-1].any() and not dx[:-1].any()
    assert sums.isfinite().all() and sums.any()
