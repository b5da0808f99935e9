"""The host path of the cross-entropies on a GPU that is not here: what is launched and compiled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from support.fake_driver import FakeGpu, fake_gpu
from support.machine_code import TARGETS
from swathe.kernels.core import logits

PLAIN = (-100, 0.0, 0.0, 1.0, 0.0)
EVERYTHING = (-100, 0.1, 30.0, 0.5, 1e-4)


@pytest.fixture(autouse=True)
def _fresh_launchers() -> Iterator[None]:
    # compiled kernels belong to the fake device that they were compiled for
    launchers = [v for v in vars(logits).values() if isinstance(v, logits.Launcher)]
    for launcher in launchers:
        launcher._compiled.clear()
    yield
    for launcher in launchers:
        launcher._compiled.clear()


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu("sm_90") as device:
        yield device


def tensors(M: int, V: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    return torch.ones(M, V, dtype=dtype), torch.zeros(M, dtype=torch.int64)


@pytest.mark.parametrize("target", TARGETS)
def test_each_way_is_one_launch_on_every_target(target: str) -> None:
    with fake_gpu(target) as gpu:
        for V in (1, 1000, 5000):
            for numbers in (PLAIN, EVERYTHING):
                x, labels = tensors(3, V)
                _, peak, log_sum = logits.forward(x, labels, *numbers)
                logits.backward(torch.ones(()), x, labels, peak, log_sum, *numbers)
        names = [launch.kernel for launch in gpu.launches]
    assert names == ["_losses", "_gradients"] * 6


def test_programs_are_rows_and_tiles(gpu: FakeGpu) -> None:
    for M, V in ((1, 4096), (7, 4097), (33, 64), (5, 1)):
        x, labels = tensors(M, V)
        _, peak, log_sum = logits.forward(x, labels, *PLAIN)
        assert gpu.launches[-1].grid == (M, 1, 1)
        logits.backward(torch.ones(M), x, labels, peak, log_sum, *PLAIN)
        assert gpu.launches[-1].grid == (M * -(-V // logits.block(V)[0]), 1, 1)


def test_no_rows_is_no_launch(gpu: FakeGpu) -> None:
    x, labels = tensors(0, 64)
    _, peak, log_sum = logits.forward(x, labels, *PLAIN)
    logits.backward(torch.ones(()), x, labels, peak, log_sum, *PLAIN)
    assert not gpu.launches


def test_a_handful_of_compilations_over_many_shapes(gpu: FakeGpu) -> None:
    for M in (1, 2, 3, 16, 17, 100, 1000):
        for V in (1504, 1500, 32_000, 4999, 50_257 // 8, 49_152 // 8, 4096):
            for ignore_index in (-100, 0, 1, 16):
                x, labels = tensors(M, V)
                logits.forward(x, labels, ignore_index, *PLAIN[1:])
    # one block size, rows divisible by 16 or not
    assert gpu.compilations == 2


def test_blocks_do_not_depend_on_the_batch(gpu: FakeGpu) -> None:
    for V in (64, 1000, 5000):
        for M in (1, 3, 257):
            x, labels = tensors(M, V)
            _, peak, log_sum = logits.forward(x, labels, *EVERYTHING)
            logits.backward(torch.ones(()), x, labels, peak, log_sum, *EVERYTHING)
    by_kernel: dict[tuple[str, int], set[str]] = {}
    for launch in gpu.launches:
        V = launch.arguments[0].shape[-1]
        by_kernel.setdefault((launch.kernel, V), set()).add(launch.hash)
    assert all(len(hashes) == 1 for hashes in by_kernel.values())


def test_one_arriving_gradient_for_all_rows_is_not_copied(gpu: FakeGpu) -> None:
    x, labels = tensors(4, 64)
    _, peak, log_sum = logits.forward(x, labels, *PLAIN)
    one = torch.ones(())
    for arriving in (one, one.expand(4), torch.ones(4, 1).expand(4, 16)[:, 0]):
        logits.backward(arriving, x, labels, peak, log_sum, *PLAIN)
        assert gpu.launches[-1].arguments[4].data_ptr() == arriving.data_ptr()
