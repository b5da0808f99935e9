"""The host path of decoding on a GPU that is not here: one grid and one kernel for all lengths."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from support.fake_driver import FakeGpu, fake_gpu
from support.machine_code import TARGETS
from swathe.kernels.attention import _triton_decode as decoding
from swathe.kernels.attention.mask import Mask

bf16 = torch.bfloat16


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu("sm_90") as device:
        yield device


def call(
    lengths: tuple[int, ...] = (5, 7),
    *,
    H: int = 8,
    K: int = 2,
    T: int = 1,
    S: int = 1024,
    D: int = 64,
    page: int = 0,
    dtype: torch.dtype = bf16,
) -> None:
    B = len(lengths)
    q = torch.ones(B, T, H, D, dtype=dtype).transpose(1, 2)
    k = torch.ones(S // page if page else B, K, page or S, D, dtype=dtype)
    table = torch.zeros(B, S // page, dtype=torch.int32) if page else None
    bounds = Mask.cached(torch.tensor(lengths), T).bounds_int32(T, S, q.device)
    none = (None,) * 6
    decoding.decode(q, k, k, *bounds, *none, table, D**-0.5, 0.0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("page", [0, 16, 64])
def test_every_target_launches(target: str, page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_AMD", target == "gfx942")
    with fake_gpu(target) as gpu:
        call(D=128, page=page)
        call(D=128, T=17, page=page)
    assert [launch.kernel for launch in gpu.launches] == ["attend", "fold"] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_dtype_launches(gpu: FakeGpu, dtype: torch.dtype) -> None:
    for D in (80, 256):
        call(D=D, dtype=dtype)
    assert len(gpu.launches) == 4


@pytest.mark.parametrize("page", [0, 64])
def test_one_graph_serves_every_length(gpu: FakeGpu, page: int) -> None:
    for lengths in ((0, 0), (1, 1), (16, 15), (500, 3), (1024, 1024)):
        call(lengths, page=page)
    once, rest = gpu.launches[:2], gpu.launches[2:]
    kinds = [(launch.kernel, launch.grid, launch.hash) for launch in gpu.launches]
    assert kinds == kinds[:2] * 5
    # numbers that a captured graph would repeat
    for first, later in zip(once * 4, rest, strict=True):
        for a, b in zip(first.arguments, later.arguments, strict=True):
            assert isinstance(a, torch.Tensor) or a == b


def test_a_handful_of_compilations_over_many_shapes(gpu: FakeGpu) -> None:
    for B in (1, 2, 3, 16):
        for S in (512, 1000, 1024, 4096):
            for H, K in ((8, 2), (16, 4), (12, 3)):
                call((5,) * B, H=H, K=K, S=S)
    # more heads of keys, fewer splits; the fold of each
    assert gpu.compilations <= 8


def test_short_caches_are_one_launch(gpu: FakeGpu) -> None:
    call(S=256)
    assert [launch.kernel for launch in gpu.launches] == ["attend"]


def test_nothing_to_do_is_no_launch(gpu: FakeGpu) -> None:
    call(T=0)
    q = torch.ones(0, 8, 1, 16, dtype=bf16)
    decoding.decode(q, q, q, *Mask().bounds_int32(1, 1, q.device), *(None,) * 7, 0.25, 0.0)
    assert not gpu.launches


def test_the_grid_is_bounded_by_the_device(gpu: FakeGpu) -> None:
    for B, K, S in ((1, 1, 256), (1, 8, 65_536), (64, 8, 65_536), (512, 32, 4096)):
        tile = decoding.tiling(4, K, 16, 16, 2, False, False, None)
        q = torch.ones(B, 4 * K, 1, 16, dtype=bf16)
        k = torch.ones(1, 1, 1, 16, dtype=bf16).expand(B, K, S, 16)
        bounds = Mask.cached(torch.ones(B), 1).bounds_int32(1, S, q.device)
        decoding.decode(q, k, k, *bounds, *(None,) * 7, 0.25, 0.0)
        (programs, *flat) = next(x.grid for x in gpu.launches[::-1] if x.kernel == "attend")
        splits = min(tile.most, -(-S // tile.fewest))
        limit = decoding.PROGRAMS * decoding.multiprocessors(q.device)
        assert flat == [1, 1] and programs % (B * K) == 0
        assert B * K <= programs <= max(B * K, min(B * K * splits, 2 * limit))


def test_views_are_launched_on_as_they_are(gpu: FakeGpu) -> None:
    q = torch.ones(2, 1, 8, 64, dtype=bf16).transpose(1, 2)
    cache = torch.ones(2, 300, 2, 2, 64, dtype=bf16)
    k, v = cache[:, :, 0].transpose(1, 2), cache[:, :, 1].transpose(1, 2)
    bounds = Mask.cached(torch.tensor([3, 4]), 1).bounds_int32(1, 300, q.device)
    decoding.decode(q, k, v, *bounds, *(None,) * 7, 0.125, 0.0)
    pointers = [t.data_ptr() for t in gpu.launches[0].arguments[:3]]
    assert pointers == [q.data_ptr(), k.data_ptr(), v.data_ptr()]
