"""Cross-entropy past 2^31 elements: offsets are 64-bit from the first multiplication on."""

from __future__ import annotations

import pytest
import torch

from support.interpreter import sanitized, virtual_tensor
from swathe.kernels.core import logits as triton
from swathe.kernels.cross_entropy import _cpp

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bench.gpu runs the real thing")
V = 1500
STRIDE = 2**26
NUMBERS = (-100, 0.0, 0.0, 1.0, 0.0)


@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_last_row_of_a_huge_tensor(backend: str) -> None:
    module = triton if backend == "triton" else _cpp
    x = virtual_tensor((34 * STRIDE,), torch.bfloat16).view(34, STRIDE)[:, :V]
    assert x[-1].storage_offset() > 2**31
    x[-1] = torch.arange(V).remainder(7) + 1
    labels = torch.full((34,), -100)
    labels[-1] = 5
    alone = module.forward(x[-1:].clone(), labels[-1:], *NUMBERS)
    with sanitized(overflow=True):
        found = module.forward(x, labels, *NUMBERS)
        dx = module.backward(torch.ones(()), x, labels, *found[1:], *NUMBERS)
    assert all(torch.equal(a[-1:], b) for a, b in zip(found, alone, strict=True))
    one = torch.ones(())
    assert torch.equal(dx[-1:], module.backward(one, x[-1:], labels[-1:], *alone[1:], *NUMBERS))
    assert not dx[:-1].any() and dx[-1].any()
