"""The host path of RMSNorm on a GPU that is not here: what is launched, compiled and refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl

from support.fake_driver import FakeGpu, LaunchError, fake_gpu
from support.machine_code import TARGETS
from swathe.kernels.norm import _triton as norm


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu("sm_90") as device:
        yield device


def tensors(M: int, N: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    return torch.ones(M, N, dtype=dtype), torch.ones(N, dtype=dtype)


@pytest.mark.parametrize("target", TARGETS)
def test_forward_and_backward_launch_on_every_target(target: str) -> None:
    with fake_gpu(target) as gpu:
        for N in (576, 8192, 40_000):
            x, w = tensors(3, N)
            y, h, rstd = norm.forward_add(x, x, w, 1e-6, 0.0, "llama")
            norm.backward(y, h, w, rstd, x, 0.0)
        names = [launch.kernel for launch in gpu.launches]
    whole = ["_forward_rows", "_backward_rows", "_sum_partials"]
    wide = ["_forward_wide", "_backward_dots", "_backward_columns", "_sum_partials"]
    assert names == [*whole, *whole, *wide]


def test_forward_is_one_launch_of_as_many_programs_as_tiles(gpu: FakeGpu) -> None:
    for M, N in ((1, 4096), (7, 4096), (33, 64), (5, 1)):
        x, w = tensors(M, N)
        norm.forward(x, w, 1e-6, 0.0, "llama")
        assert gpu.launches[-1].grid == (triton.cdiv(M, norm.forward_blocks(N).rows), 1, 1)
    assert len(gpu.launches) == 4


def test_no_rows_is_no_launch(gpu: FakeGpu) -> None:
    x, w = tensors(0, 64)
    y, rstd = norm.forward(x, w, 1e-6, 0.0, "llama")
    norm.backward(y, x, w, rstd, None, 0.0)
    assert not gpu.launches


def test_a_handful_of_compilations_over_many_shapes(gpu: FakeGpu) -> None:
    for M in (1, 2, 3, 16, 17, 100, 1000, 4096, 5000):
        for N in (2048, 1500, 1504, 1999, 1048):
            x, w = tensors(M, N)
            norm.forward(x, w, 1e-6, 0.0, "llama")
    # one block size, rows divisible by 16 or not
    assert gpu.compilations == 2


def test_blocks_do_not_depend_on_the_batch(gpu: FakeGpu) -> None:
    for N in (64, 576, 4096, 40_000):
        for M in (1, 3, 257):
            x, w = tensors(M, N)
            y, rstd = norm.forward(x, w, 1e-6, 0.0, "llama")
            norm.backward(y, x, w, rstd, None, 0.0)
    by_kernel: dict[tuple[str, int], set[str]] = {}
    for launch in gpu.launches:
        if launch.kernel != "_sum_partials":
            N = launch.arguments[0].shape[-1]
            by_kernel.setdefault((launch.kernel, N), set()).add(launch.hash)
    assert all(len(hashes) == 1 for hashes in by_kernel.values())


def test_cached_launch_equals_tritons_own(gpu: FakeGpu) -> None:
    views = {
        "aligned": torch.ones(8, 64, dtype=torch.bfloat16),
        "unaligned pointer": torch.ones(8 * 64 + 1, dtype=torch.bfloat16)[1:].view(8, 64),
        "odd stride": torch.ones(8, 67, dtype=torch.bfloat16)[:, :64],
        "wide stride": torch.ones(8, 128, dtype=torch.bfloat16)[:, :64],
        "one column": torch.ones(8, 1, dtype=torch.bfloat16),
        "odd": torch.ones(8, 37, dtype=torch.bfloat16),
    }
    for x in (*views.values(), *views.values()):
        w = torch.ones(x.shape[-1], dtype=x.dtype)
        norm.forward(x, w, 1e-6, 0.0, "llama")
        ours = gpu.launches[-1]
        norm._forward_rows[ours.grid](*ours.arguments, num_warps=ours.warps, enable_fp_fusion=True)
        theirs = gpu.launches[-1]
        assert ours.hash == theirs.hash and ours.signature == theirs.signature
    # the wide stride needs no code of its own, the unaligned pointer is not remembered
    assert len(norm._forward_rows_at._compiled) == 4


def test_integers_past_two_to_the_31_go_the_long_way(gpu: FakeGpu) -> None:
    x = torch.ones(1, 64, dtype=torch.bfloat16).as_strided((1, 64), (2**31 + 64, 1))
    w = torch.ones(64, dtype=torch.bfloat16)
    norm._forward_rows_at(
        (1, 1, 1),
        (x, x, w, x, x, w),
        (2**31 + 64, 64, 64),
        (1, 1e-6, 0.0),
        (False, True, 32, 64),
        4,
    )
    assert gpu.launches[-1].signature["x_stride"] == "i64"
    assert not norm._forward_rows_at._compiled


def test_faults_reach_the_caller(gpu: FakeGpu) -> None:
    x, w = tensors(2, 64)
    gpu.fail_load = "no kernel image is available"
    with pytest.raises(RuntimeError, match="no kernel image"):
        norm.forward(x, w, 1e-6, 0.0, "llama")
    gpu.fail_load = None
    norm.forward(x, w, 1e-6, 0.0, "fp32")
    gpu.fail_launch = "out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        norm.forward(x, w, 1e-6, 0.0, "fp32")


FUSION = {"enable_fp_fusion": True}  # said aloud: triton 3.9 warns where it is not


@triton.jit
def _nothing(x_ptr, n):
    tl.store(x_ptr, n)


def test_the_fake_device_has_limits(gpu: FakeGpu) -> None:
    x = torch.zeros(1, dtype=torch.int32)
    _nothing[(3, 2, 1)](x, 5, **FUSION)
    assert gpu.launches[-1].grid == (3, 2, 1) and gpu.launches[-1].stream == gpu.stream
    with pytest.raises(LaunchError, match="70000"):
        _nothing[(1, 70_000, 1)](x, 5, **FUSION)


def test_the_fake_device_specialises(gpu: FakeGpu) -> None:
    x = torch.zeros(16, dtype=torch.int32)
    for n in (1, 16, 5, 6):
        _nothing[(1, 1, 1)](x, n, **FUSION)
    assert gpu.compilations == 3, "1, multiples of 16 and the rest"
    _nothing[(1, 1, 1)](x[1:], 5, **FUSION)
    assert gpu.compilations == 4, "an unaligned pointer"
