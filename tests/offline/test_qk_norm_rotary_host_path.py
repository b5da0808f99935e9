"""The host path of qk_norm_rotary on a GPU that is not here: what is launched and compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from support.fake_driver import FakeGpu, fake_gpu
from support.machine_code import TARGETS
from swathe.kernels.core.heads import HEADS, blocks
from swathe.kernels.core.launch import Launcher
from swathe.kernels.qk_norm_rotary import _triton as kernels


@pytest.fixture(autouse=True)
def _fresh_launchers() -> Iterator[None]:
    # compiled kernels belong to the fake device that they were compiled for
    Launcher.forget()
    yield
    Launcher.forget()


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu("sm_90") as device:
        yield device


def heads(B: int, S: int, H: int, D: int) -> Tensor:
    """A projection's output seen as heads."""
    return torch.ones(B, S, H * D, dtype=torch.bfloat16).view(B, S, H, D).transpose(1, 2)


def step(
    B: int, S: int, H: int, Hk: int, D: int, *, R: int | None = None, positions: bool = False
) -> list[Tensor]:
    """A forward and a backward."""
    R = R or D
    q, weight = heads(B, S, H, D), torch.ones(D, dtype=torch.bfloat16)
    k, k_weight = (heads(B, S, Hk, D), weight) if Hk else (None, None)
    table = torch.ones(max(S, 1), R, dtype=torch.bfloat16)
    where = torch.zeros(S, dtype=torch.int64) if positions else None
    rotation: tuple[Any, ...] = (table[: S or 1], table[: S or 1], where, None, R, False)
    norm = (1e-6, 0.0)
    found = kernels.forward(q, k, weight, k_weight, *norm, "llama", "fp32", *rotation)
    dk = None if k is None else found[1]
    found += kernels.backward(found[0], dk, q, k, weight, k_weight, *norm, *rotation)
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_forward_and_backward_launch_on_every_target(target: str) -> None:
    with fake_gpu(target) as gpu:
        for H, Hk, D, R in ((8, 2, 128, 128), (7, 0, 80, 32), (1, 1, 6, 6)):
            step(2, 5, H, Hk, D, R=R)
        names = [launch.kernel for launch in gpu.launches]
    assert names == ["_forward", "_backward", "_sum_partials"] * 3


def test_a_program_for_every_tile_until_work_is_plenty(gpu: FakeGpu) -> None:
    tokens = blocks(128, 128).tokens
    step(1, 1, 32, 8, 128)
    assert gpu.launches[0].grid == (40, 1, 1), "a decoded token: one head a program"
    step(4, 4096, 32, 8, 128)
    tiles = 4 * 4096 // tokens
    assert gpu.launches[3].grid == (tiles * (32 + 8) // HEADS, 1, 1)
    P = gpu.launches[4].grid[0]
    assert 16 * kernels.WARPS_RESIDENT // blocks(128, 128).warps == P


def test_every_head_has_its_programs(gpu: FakeGpu) -> None:
    for H, Hk in ((1, 8), (8, 1), (1, 1), (64, 4), (3, 0), (0, 3)):
        for tiles in (1, 2, 7, 500):
            P, of_q, _ = kernels.programs(tiles, H, Hk, 4, torch.device("cpu"))
            assert P > 0 and (of_q > 0) == (H > 0) and (P - of_q > 0) == (Hk > 0), (H, Hk, tiles)


def test_nothing_is_no_launch(gpu: FakeGpu) -> None:
    for B, S, H, Hk in ((0, 5, 2, 1), (2, 0, 2, 1), (2, 5, 0, 0)):
        found = step(B, S, H, Hk, 64)
        assert not found[-1].any()
    assert not gpu.launches


def test_a_handful_of_compilations_over_many_shapes(gpu: FakeGpu) -> None:
    for B in (1, 2, 3, 5, 16):
        for S in (1, 2, 7, 16, 33):
            for H, Hk in ((16, 8), (7, 1)):
                step(B, S, H, Hk, 128)
    compiled = {(launch.kernel, launch.hash) for launch in gpu.launches}
    # strides, tables and sizes change, the code does not
    assert len(compiled) == 3, sorted(compiled)


def test_blocks_do_not_depend_on_the_batch(gpu: FakeGpu) -> None:
    for D in (64, 80, 256):
        for B, S in ((1, 1), (3, 5), (16, 257)):
            step(B, S, 4, 2, D)
    rows = [launch for launch in gpu.launches if launch.kernel != "_sum_partials"]
    by_size: dict[tuple[str, int], set[str]] = {}
    for launch in rows:
        by_size.setdefault((launch.kernel, launch.arguments[0].shape[-1]), set()).add(launch.hash)
    assert len(by_size) == 6 and all(len(hashes) == 1 for hashes in by_size.values())


def test_integers_past_two_to_the_31_go_the_long_way(gpu: FakeGpu) -> None:
    q = torch.ones(1, 1, 1, 64, dtype=torch.bfloat16).as_strided(
        (1, 1, 1, 64), (2**31 + 64, 64, 64, 1)
    )
    table = torch.ones(1, 64, dtype=torch.bfloat16)
    rotation = (table, table, None, None, 64, False)
    kernels.forward(q, None, table[0], None, 1e-6, 0.0, "llama", "fp32", *rotation)
    assert gpu.launches[-1].signature["q_b"] == "i64"
    assert not kernels._forward_at._compiled
