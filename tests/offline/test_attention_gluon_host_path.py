"""The host path of attention's forward for Hopper on a GPU that is not here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from support.fake_driver import FakeGpu, Launch, fake_gpu
from swathe.kernels.attention import _gluon as launchers
from swathe.kernels.attention.mask import Mask


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu("sm_90") as found:
        yield found


def heads(B: int, rows: int, H: int, D: int) -> Tensor:
    """A projection's output seen as heads."""
    return torch.ones(B, rows, H * D, dtype=torch.bfloat16).view(B, rows, H, D).transpose(1, 2)


def forward(B: int, T: int, S: int, H: int, K: int, D: int, E: int | None = None) -> Tensor:
    """A causal forward; returns the queries."""
    q, k, v = heads(B, T, H, D), heads(B, S, K, D), heads(B, S, K, E or D)
    bounds = Mask(causal=True).bounds_int32(T, S, q.device)
    o, lse = launchers.forward(q, k, v, *bounds, *[None] * 6, None, 0.125, 0.0, 0.0, False)
    assert o.shape == (B, T, H, E or D) and lse.shape == (B, H, T)
    return q


def argument(launch: Launch, name: str) -> Any:
    return launch.arguments[launchers._forward_at.kernel.arg_names.index(name)]


def test_one_launch_reads_views_where_they_lie(gpu: FakeGpu) -> None:
    q = forward(2, 70, 90, 4, 2, 64)
    (launch,) = gpu.launches
    assert launch.kernel == "forward"
    of_q, of_k = argument(launch, "q0"), argument(launch, "k0")
    assert of_q.base.data_ptr() == q.data_ptr() and of_q.block_shape == [1, 1, 64, 64]
    assert of_k.shape == [2, 2, 90, 64] and of_k.strides == [90 * 128, 64, 128, 1]
    assert argument(launch, "q1") is None


def test_two_pieces_have_two_descriptors_of_one_tensor(gpu: FakeGpu) -> None:
    forward(1, 70, 90, 2, 1, 192, 128)
    (launch,) = gpu.launches
    first, second = argument(launch, "k0"), argument(launch, "k1")
    assert first.block_shape[3] == 128 and second.block_shape[3] == 64
    assert first.base is second.base and argument(launch, "v1") is None


def test_programs_are_as_many_as_multiprocessors_or_tiles(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launchers, "multiprocessors", lambda _: 10)
    forward(1, 200, 64, 3, 1, 64)
    forward(2, 200, 64, 3, 1, 64)
    assert [launch.grid for launch in gpu.launches] == [(6, 1, 1), (10, 1, 1)]
    for launch in gpu.launches:
        assert argument(launch, "counter_ptr").tolist() == [0]


def test_a_handful_of_compilations_over_many_shapes(gpu: FakeGpu) -> None:
    for B, T, S in ((1, 1, 1), (2, 7, 9), (3, 64, 64), (1, 100, 1000), (5, 129, 257), (2, 1, 33)):
        for H, K in ((8, 8), (8, 2), (7, 1)):
            forward(B, T, S, H, K, 64)
    assert gpu.compilations <= 3, gpu.compilations


def test_dimensions_of_one_may_have_any_stride(gpu: FakeGpu) -> None:
    q = heads(1, 1, 1, 64)
    k = torch.ones(7, 3 * 64, dtype=torch.bfloat16).as_strided((1, 1, 7, 64), (5, 3, 192, 1))
    bounds = Mask().bounds_int32(1, 7, q.device)
    rest = (*bounds, *[None] * 6, None, 0.125, 0.0, 0.0, False)
    assert launchers.why_not(q, k, k, launchers.Rows(*rest)) is None
    launchers.forward(q, k, k, *rest)
    assert all(stride % 8 == 0 for stride in argument(gpu.launches[0], "k0").strides[:3])


def test_nothing_is_no_launch(gpu: FakeGpu) -> None:
    forward(0, 3, 4, 2, 1, 64)
    forward(2, 0, 4, 2, 1, 64)
    assert not gpu.launches
