"""The host path of LayerNorm on a GPU that is not here: launches, compilations, copies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from support.fake_driver import FakeGpu, fake_gpu
from support.machine_code import TARGETS
from swathe.kernels.layer_norm import _triton as kernels


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu("sm_90") as device:
        yield device


def both_ways(M: int, N: int, *, add: bool = False, weights: bool = True) -> None:
    x = torch.ones(M, N, dtype=torch.bfloat16)
    w = torch.ones(N, dtype=torch.bfloat16) if weights else None
    if add:
        y, h, statistics = kernels.forward_add(x, x, w, w, 1e-5)
    else:
        (y, statistics), h = kernels.forward(x, w, w, 1e-5), x
    sums = torch.bfloat16 if weights else None
    kernels.backward(y, h, w, statistics, h if add else None, sums)


@pytest.mark.parametrize("target", TARGETS)
def test_forward_and_backward_launch_on_every_target(target: str) -> None:
    with fake_gpu(target) as gpu:
        for N in (768, 4096, 40_000):
            both_ways(3, N, add=True)
        names = [launch.kernel for launch in gpu.launches]
    whole = ["_forward_rows", "_backward_rows", "_sum_partials"]
    wide = ["_forward_wide", "_backward_dots", "_backward_columns", "_sum_partials"]
    assert names == [*whole, *whole, *wide]


def test_without_weights_nothing_is_summed(gpu: FakeGpu) -> None:
    for N in (768, 40_000):
        both_ways(5, N, weights=False)
    assert "_sum_partials" not in {launch.kernel for launch in gpu.launches}


def test_no_rows_is_no_launch(gpu: FakeGpu) -> None:
    both_ways(0, 64)
    assert not gpu.launches


def test_a_handful_of_compilations_over_many_shapes(gpu: FakeGpu) -> None:
    for M in (1, 2, 3, 16, 17, 100, 1000, 4096, 5000, 70_000):
        for N in (2048, 1500, 1504, 1999, 1048):
            both_ways(M, N)
    # rows divisible by 16 or not, each way; dw and db are 2N long: divisible or not, few or many
    assert gpu.compilations <= 2 + 2 + 4


def test_blocks_do_not_depend_on_the_batch(gpu: FakeGpu) -> None:
    for N in (64, 768, 4096, 40_000):
        for M in (1, 3, 257):
            both_ways(M, N)
    by_kernel: dict[tuple[str, int], set[str]] = {}
    for launch in gpu.launches:
        if launch.kernel != "_sum_partials":
            N = launch.arguments[0].shape[-1]
            by_kernel.setdefault((launch.kernel, N), set()).add(launch.hash)
    assert all(len(hashes) == 1 for hashes in by_kernel.values())


def test_views_are_launched_on_as_they_are(gpu: FakeGpu) -> None:
    x = torch.ones(4, 6, 200, dtype=torch.bfloat16)[..., :96]
    kernels.forward(x, None, None, 1e-5)
    assert gpu.launches[-1].arguments[0].data_ptr() == x.data_ptr()
