"""rotary past 2^31 elements: offsets are 64-bit from the first multiplication on."""

from __future__ import annotations

import pytest
import torch

from support.interpreter import sanitized, virtual_tensor
from swathe.kernels.rotary import _cpp, _triton

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
    table = torch.arange(shape[2] * D).view(-1, D).remainder(5).bfloat16() - 2
    rotation, ends = ((t, t, None, None, D, False) for t in (table, table[-1:]))
    with sanitized(overflow=True):
        (y,) = module.forward(x, None, *rotation, "llama")
        (dx,) = module.backward(x, None, *rotation)
    for found, alone in (
        (y, module.forward(last.clone(), None, *ends, "llama")[0]),
        (dx, module.backward(last.clone(), None, *ends)[0]),
    ):
        assert torch.equal(found[-1:, -1:, -1:], alone) and alone.any()
        found[-1, -1, -1] = 0
        assert not found.any()


def test_last_row_of_a_huge_table() -> None:
    table = virtual_tensor((2**31 // D + 2, D), torch.bfloat16)
    table[-1] = torch.arange(D).remainder(5) - 2
    q = (torch.arange(D).remainder(7) + 1).bfloat16().view(1, 1, 1, D)
    at = torch.tensor([len(table) - 1])
    with sanitized(overflow=True):
        (y,) = _triton.forward(q, None, table, table, at, None, D, False, "llama")
    (alone,) = _triton.forward(q, None, table[-1:], table[-1:], None, None, D, False, "llama")
    assert torch.equal(y, alone) and y.any()
