"""Tiles that come by TMA descriptors are those that addresses give, tails and strides included."""

from __future__ import annotations

import pytest
import torch

import swathe.kernels.attention._triton as launchers
from support.tensors import DEVICE
from swathe.kernels.attention._triton_blocks import fits_tma
from swathe.kernels.attention.contract import CONTRACT, random
from swathe.kernels.attention.shapes import Shape

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the device decides here")


@pytest.mark.parametrize("kind", ["causal", "window", "gqa", "packed"])
@pytest.mark.parametrize(("D", "E"), [(64, 64), (16, 32)])
def test_the_same_bits(kind: str, D: int, E: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape("tma", 2, 4, 2, 70, 150, D, E)
    problem = random(shape, torch.bfloat16, seed=1, device=DEVICE, kind=kind)
    function = CONTRACT.on("triton")
    by_address = problem.run(function)
    asked = []

    def always(*streams: torch.Tensor) -> bool:
        asked.append(all(fits_tma(t) for t in streams))
        return asked[-1]

    monkeypatch.setattr(launchers, "tiles_by_tma", always)
    by_descriptor = problem.run(function)
    assert asked == [True] * 3, "forward, dq, dk and dv"
    for name, found in by_descriptor.items():
        assert torch.equal(found, by_address[name]), name


def test_what_the_tma_does_not_take() -> None:
    whole = torch.zeros(2, 3, 8, 64, dtype=torch.bfloat16)
    assert fits_tma(whole) and fits_tma(whole.transpose(1, 2))
    assert not fits_tma(whole[..., :48]), "48 features are no power of two"
    assert not fits_tma(torch.zeros(2, 3, 8, 65, dtype=torch.bfloat16)[..., :64]), (
        "rows of 130 bytes"
    )
    assert not fits_tma(torch.zeros(1 + 64 * 8, dtype=torch.bfloat16)[1:].view(1, 1, 8, 64))
    assert not fits_tma(whole[:1, :1].expand(2, 3, 8, 64)), "strides of 0"
    assert not fits_tma(whole[:0])
