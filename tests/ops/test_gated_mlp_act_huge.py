"""gated_mlp_act past 2^31 elements: offsets are 64-bit from the first multiplication on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.interpreter import sanitized, virtual_tensor
from swathe.kernels.gated_mlp_act import _cpp, _triton

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bench.gpu runs the real thing")
N = 4096
STRIDE = 2**26
NUMBERS = ("silu", 7.0, 1.702)


@pytest.mark.parametrize("packed", [None, "halves", "interleaved"])
@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_last_row_of_a_huge_tensor(backend: str, packed: Any) -> None:
    module = _triton if backend == "triton" else _cpp
    x = virtual_tensor((34 * STRIDE,), torch.bfloat16).view(34, STRIDE)[:, : 2 * N]
    assert x[-1].storage_offset() > 2**31
    x[-1] = torch.arange(2 * N).remainder(7) - 3

    def both_ways(t: torch.Tensor) -> list[torch.Tensor]:
        if packed is None:
            gate, up = t[:, :N], t[:, N:]
            y = module.forward(gate, up, *NUMBERS, "llama")
            return [y, *module.backward(up, gate, up, *NUMBERS)]
        y = module.forward_packed(t, *NUMBERS, "llama", packed)
        return [y, module.backward_packed(t[:, :N], t, *NUMBERS, packed)]

    with sanitized(overflow=True):
        found = both_ways(x)
    for whole, alone in zip(found, both_ways(x[-1:].clone()), strict=True):
        assert torch.equal(whole[-1:], alone) and alone.any()
        assert not whole[:-1].any()


def test_widest_rows_are_tiled_like_any() -> None:
    # 65536 features are what others take whole, in one program a row
    gate = torch.linspace(-9, 9, 2 * 65_536).view(2, -1).bfloat16()
    apart = torch.cat((gate, gate), 1)[:, :65_536]
    for rows in (gate, apart):
        y = _triton.forward(rows, rows, *NUMBERS, "fp32")
        narrow = [_triton.forward(t, t, *NUMBERS, "fp32") for t in gate.split(1000, 1)]
        assert torch.equal(y, torch.cat(narrow, 1))
