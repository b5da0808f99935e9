"""The host path of linear cross-entropy on a GPU that is not here; products run on the CPU.

Its kernels are those of cross_entropy: tests/offline/test_cross_entropy_code.py has their code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from support.fake_driver import FakeGpu, fake_gpu
from support.machine_code import TARGETS
from swathe.kernels.core import logits
from swathe.kernels.linear_cross_entropy import _triton as chunked

NUMBERS = (-100, 0.0, 0.0, 1.0, 0.0)
ALL = (True, True, True)


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


def inputs(M: int, V: int = 64, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    ones = (
        torch.ones(M, 16, dtype=dtype),
        torch.ones(V, 16, dtype=dtype),
        torch.ones(V, dtype=dtype),
    )
    return *ones, torch.zeros(M, dtype=torch.int64)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_two_launches_a_chunk_on_every_target(target: str, dtype: torch.dtype) -> None:
    with fake_gpu(target) as gpu:
        given = inputs(10, dtype=dtype)
        chunked.forward(*given, *NUMBERS, 4)
        assert [launch.kernel for launch in gpu.launches] == ["_losses"] * 3
        chunked.forward_total(*given, *NUMBERS, 4, ALL)
        assert [launch.kernel for launch in gpu.launches[3:]] == ["_losses", "_gradients"] * 3
        saved = torch.zeros(10), torch.zeros(10)
        chunked.backward(torch.ones(10), *given, *saved, *NUMBERS, 4, ALL)
        assert [launch.kernel for launch in gpu.launches[9:]] == ["_gradients"] * 3


def test_no_rows_is_no_launch(gpu: FakeGpu) -> None:
    total, dh, dw, db = chunked.forward_total(*inputs(0), *NUMBERS, 0, ALL)
    assert not gpu.launches
    assert total == 0 and dh.shape == (0, 16) and not dw.any() and not db.any()


def test_the_last_chunk_needs_no_code_of_its_own(gpu: FakeGpu) -> None:
    for M in (1, 3, 4, 5, 16, 33, 50):
        chunked.forward_total(*inputs(M), *NUMBERS, 4, ALL)
    assert gpu.compilations == 2


@pytest.mark.parametrize(
    ("needs", "products"),
    [((True, False, False), 2), ((False, True, False), 2), (ALL, 3), ((False, False, True), 1)],
    ids=str,
)
def test_products_are_those_that_are_needed(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, needs: tuple[bool, bool, bool], products: int
) -> None:
    made: list[str] = []
    for name in ("multiply", "multiply_add"):
        real = getattr(chunked, name)
        spy = lambda *args, n=name, f=real: (made.append(n), f(*args))[1]  # noqa: E731
        monkeypatch.setattr(chunked, name, spy)
    chunked.forward_total(*inputs(8), *NUMBERS, 4, needs)
    assert len(made) == 2 * products
    # the first chunk writes dW, the second adds to it
    assert made.count("multiply_add") == int(needs[1])


def test_dx_takes_no_memory_of_its_own_in_fp32(gpu: FakeGpu) -> None:
    for dtype, own in ((torch.float32, False), (torch.bfloat16, True)):
        chunked.forward_total(*inputs(4, dtype=dtype), *NUMBERS, 4, ALL)
        x, dx = (gpu.launches[-1].arguments[i].data_ptr() for i in (0, 5))
        assert (x != dx) == own
