"""The host path of gated_mlp_act on a GPU that is not here: launches, tiles, compilations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from support.fake_driver import FakeGpu, fake_gpu
from support.machine_code import TARGETS
from swathe.kernels.gated_mlp_act import _triton as kernels

NUMBERS = ("silu", 7.0, 1.702)


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu("sm_90") as device:
        yield device


def tensors(M: int, N: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(M, N, dtype=torch.bfloat16), torch.ones(M, N, dtype=torch.bfloat16)


@pytest.mark.parametrize("target", TARGETS)
def test_one_launch_each_way_on_every_target(target: str) -> None:
    with fake_gpu(target) as gpu:
        gate, up = tensors(3, 1536)
        y = kernels.forward(gate, up, *NUMBERS, "llama")
        kernels.backward(y, gate, up, *NUMBERS)
        for packed in ("halves", "interleaved"):
            y = kernels.forward_packed(gate, *NUMBERS, "fp32", packed)
            kernels.backward_packed(y, gate, *NUMBERS, packed)
    names = [launch.kernel for launch in gpu.launches]
    two, pairs = ["_forward", "_backward"], ["_forward_interleaved", "_backward_interleaved"]
    assert names == [*two, *two, *pairs]


def test_dense_rows_are_one_row_of_full_tiles(gpu: FakeGpu) -> None:
    for M, N in ((1, 64), (7, 1536), (33, 65), (5, 131_072)):
        kernels.forward(*tensors(M, N), *NUMBERS, "fp32")
        assert gpu.launches[-1].grid == (-(-M * N // kernels.TILE), 1, 1)


def test_halves_of_one_tensor_are_not_copied(gpu: FakeGpu) -> None:
    x = torch.ones(4, 256, dtype=torch.bfloat16)
    kernels.forward_packed(x, *NUMBERS, "fp32", "halves")
    gate, up = gpu.launches[-1].arguments[:2]
    assert (gate.data_ptr(), up.data_ptr()) == (x.data_ptr(), x.data_ptr() + 2 * 128)


def test_a_handful_of_compilations_over_many_shapes(gpu: FakeGpu) -> None:
    for M in (1, 2, 3, 16, 17, 100, 1000, 4096):
        for N in (1536, 2880, 8192, 14_336, 14_335, 11_008, 5):
            gate, up = tensors(M, N)
            y = kernels.forward(gate, up, *NUMBERS, "llama")
            kernels.backward(y, gate, up, *NUMBERS)
    # a row's length is a multiple of 16 or not, and so are, then, all rows together
    assert gpu.compilations <= 6


def test_nothing_to_do_is_no_launch(gpu: FakeGpu) -> None:
    for M, N in ((0, 64), (3, 0)):
        gate, up = tensors(M, N)
        kernels.backward(kernels.forward(gate, up, *NUMBERS, "fp32"), gate, up, *NUMBERS)
    assert not gpu.launches


def test_past_32_bits_rows_are_tiled_one_by_one() -> None:
    assert kernels.tiling(2**20, 4096, True) == (2**20, 4096, 1, 2048)
    assert kernels.tiling(2**19 - 1, 4096, True) == (1, (2**19 - 1) * 4096, 1, 2048)
    assert kernels.tiling(5, 40, False) == (5, 40, 256, 8)
