"""The host path of attention on a GPU that is not here: launches, compilations, nothing copied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from support.fake_driver import FakeGpu, fake_gpu
from support.machine_code import TARGETS
from swathe.kernels.attention import _triton as launchers
from swathe.kernels.attention import _triton_blocks as blocks
from swathe.kernels.attention.mask import Mask

GENERATIONS = {"sm_80": "mma", "sm_90": "hopper", "sm_100": "blackwell", "gfx942": "mma"}


@pytest.fixture(autouse=True)
def _no_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    # a stand-in's tensors all lie on one device, whatever its generation
    monkeypatch.setattr(blocks, "_cuts", {})


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with device("sm_90", monkeypatch) as found:
        yield found


def device(target: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for `target` whose tensors are cut and copied as on one."""
    monkeypatch.setattr(blocks, "generation", lambda _: GENERATIONS[target])

    def by_tma(*streams: Tensor) -> bool:
        return GENERATIONS[target] != "mma" and all(blocks.fits_tma(t) for t in streams)

    monkeypatch.setattr(launchers, "tiles_by_tma", by_tma)
    return fake_gpu(target)


def heads(B: int, rows: int, H: int, D: int) -> Tensor:
    """A projection's output seen as heads."""
    return torch.ones(B, rows, H * D, dtype=torch.bfloat16).view(B, rows, H, D).transpose(1, 2)


def step(B: int, T: int, S: int, H: int, K: int, D: int, E: int | None = None) -> Tensor:
    """A causal forward and backward; returns the queries."""
    E = E or D
    q, k, v = heads(B, T, H, D), heads(B, S, K, D), heads(B, S, K, E)
    bounds = Mask(causal=True).bounds_int32(T, S, q.device)
    rest = (*bounds, *[None] * 6, None, 0.125, 0.0, 0.0, False)
    o, lse = launchers.forward(q, k, v, *rest)
    launchers.backward(o, None, q, k, v, o, lse, *rest)
    return q


@pytest.mark.parametrize("target", TARGETS)
def test_three_launches_on_every_target(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with device(target, monkeypatch) as gpu:
        step(2, 70, 90, 4, 2, 64)
    names = [launch.kernel for launch in gpu.launches]
    assert names == ["forward", "backward_q", "backward_kv"]


def test_views_are_launched_on_as_they_are(gpu: FakeGpu) -> None:
    q = step(2, 70, 90, 4, 2, 64)
    assert gpu.launches[0].arguments[0].data_ptr() == q.data_ptr()
    stream = gpu.launches[0].arguments[1]
    assert stream.block_shape == [1, 1, 64, 64] and stream.shape == [2, 2, 90, 64]


def test_a_handful_of_compilations_over_many_shapes(gpu: FakeGpu) -> None:
    for B, T, S in ((1, 1, 1), (2, 7, 9), (3, 64, 64), (1, 100, 1000), (5, 129, 257), (2, 1, 33)):
        for H, K in ((8, 8), (8, 2), (7, 1)):
            step(B, T, S, H, K, 64)
    # one head of keys has the stride of all, one row that of its bounds
    assert gpu.compilations <= 9, gpu.compilations


def test_grids_cover_rows_and_keys(gpu: FakeGpu) -> None:
    step(3, 300, 500, 8, 2, 64)
    forward, of_q, of_kv = (launch.grid for launch in gpu.launches)
    assert forward == of_q == (3 * 8 * 3, 1, 1) and of_kv == (4 * 2 * 3, 1, 1)


def test_nothing_is_no_launch(gpu: FakeGpu) -> None:
    step(0, 3, 4, 2, 1, 64)
    step(2, 0, 4, 2, 1, 64)
    assert not gpu.launches


def test_tiles_do_not_depend_on_the_batch_or_on_lengths(gpu: FakeGpu) -> None:
    for B, T, S in ((1, 1, 5), (3, 70, 90), (16, 257, 1025)):
        step(B, T, S, 8, 2, 64)
    kernel = launchers._forward_at.kernel
    at = [kernel.arg_names.index(name) for name in ("BLOCK_T", "BLOCK_S")]
    launches = [launch for launch in gpu.launches if launch.kernel == "forward"]
    assert len({tuple(launch.arguments[i] for i in at) for launch in launches}) == 1
