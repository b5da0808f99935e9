"""RMSNorm past 2^31 elements: offsets are 64-bit from the first multiplication on."""

from __future__ import annotations

import pytest
import torch

from support.interpreter import sanitized, virtual_tensor
from swathe.kernels.norm import _cpp, _triton

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bench.gpu runs the real thing")
N = 4096
STRIDE = 2**26


def huge() -> torch.Tensor:
    """34 rows whose last ones begin past 2^31 elements; only touched pages take memory."""
    x = virtual_tensor((34 * STRIDE,), torch.bfloat16).view(34, STRIDE)[:, :N]
    assert x[-1].storage_offset() > 2**31
    x[-1] = torch.arange(N).remainder(7) + 1
    return x


@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_last_row_of_a_huge_tensor(backend: str) -> None:
    module = _triton if backend == "triton" else _cpp
    x, weight = huge(), torch.ones(N).bfloat16()
    alone = module.forward(x[-1:].clone(), weight, 1e-6, 0.0, "llama")[0]
    with sanitized(overflow=True):
        y, rstd = module.forward(x, weight, 1e-6, 0.0, "llama")
        dx, dw = module.backward(y, x, weight, rstd, None, 0.0)
    assert torch.equal(y[-1:], alone)
    assert not y[:-1].any() and not dx[:-1].any()
    assert dx[-1].any() and torch.equal(dw.isfinite().all(), torch.tensor(True))
