"""The host path of rotary on a GPU that is not here: launches, compilations, what is not copied."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from support.fake_driver import FakeGpu, fake_gpu
from support.machine_code import TARGETS
from swathe.kernels.rotary import _triton as turn


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu("sm_90") as device:
        yield device


def call(S: int, H: int = 4, Hk: int | None = 2, D: int = 64, B: int = 2) -> list[Tensor]:
    q = torch.ones(B, S, H, D, dtype=torch.bfloat16).transpose(1, 2)
    k = None if Hk is None else torch.ones(B, S, Hk, D, dtype=torch.bfloat16).transpose(1, 2)
    table = torch.ones(S, D, dtype=torch.bfloat16)
    return turn.forward(q, k, table, table, None, None, D, False, "llama")


@pytest.mark.parametrize("target", TARGETS)
def test_q_and_k_are_one_launch_each_way(target: str) -> None:
    with fake_gpu(target) as gpu:
        q, k = call(5)
        table = torch.ones(5, 64, dtype=torch.bfloat16)
        turn.backward(q, k, table, table, None, None, 64, False)
    assert [launch.kernel for launch in gpu.launches] == ["_rotate"] * 2


def test_views_are_launched_on_as_they_are(gpu: FakeGpu) -> None:
    q = torch.ones(2, 5, 12, 64, dtype=torch.bfloat16)[:, :, :4].transpose(1, 2)
    table = torch.ones(5, 64, dtype=torch.bfloat16)
    turn.forward(q, None, table, table, None, None, 64, False, "llama")
    assert gpu.launches[-1].arguments[0].data_ptr() == q.data_ptr()


def test_a_handful_of_compilations_over_many_shapes(gpu: FakeGpu) -> None:
    for S in (1, 2, 3, 16, 17, 100, 511, 512, 1000, 2048):
        for H, Hk in ((32, 8), (24, 3), (7, 1), (1, 1), (40, None)):
            call(S, H, Hk)
    # without keys, with one head (a stride of 1 head is that of all), with one token
    assert gpu.compilations <= 8


def test_nothing_to_turn_is_no_launch(gpu: FakeGpu) -> None:
    call(0)
    call(3, B=0)
    assert not gpu.launches


def test_every_head_has_a_program(gpu: FakeGpu) -> None:
    for S, H, Hk in ((1, 1, 1), (5, 7, 3), (300, 40, 8), (5000, 24, 24)):
        call(S, H, Hk, B=1)
        launch = gpu.launches[-1]
        tile = turn.blocks(64, 64)
        names = turn._rotate.arg_names
        each = launch.arguments[names.index("heads_each")]
        tiles = -(-S // tile.tokens)
        assert launch.grid == (tiles * (-(-H // each) + -(-Hk // each)), 1, 1)


def test_blocks_do_not_depend_on_the_batch(gpu: FakeGpu) -> None:
    for B, S in ((1, 1), (3, 7), (16, 1024)):
        call(S, B=B, H=32, Hk=8)
    last = [launch.arguments[-3:] for launch in gpu.launches]
    assert len(set(last)) == 1
