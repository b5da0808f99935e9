"""Launching Gluon kernels on a GPU that is not here: Triton's own code at the first launch, ours
afterwards, and what tells one specialisation from another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton import knobs

from support.fake_driver import FakeGpu, fake_gpu
from swathe.kernels.core.gluon import TensorDescriptor, box_bytes, gl, jit, mbarrier, tma_load
from swathe.kernels.core.launch import Launcher


@jit(do_not_specialize=["scale"])
def scaled_box(
    out_ptr, sinks_ptr, x_desc, row, scale, ROWS: gl.constexpr, WIDTH: gl.constexpr
):  # fmt: skip
    """One box of x, times `scale`, plus the first of the sinks where there are any."""
    box = gl.allocate_shared_memory(x_desc.dtype, [ROWS, WIDTH], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.expect(full, box_bytes(x_desc))
    tma_load(x_desc, [row, 0], full, box)
    mbarrier.wait(full, 0)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    x = box.load(layout).to(gl.float32) * scale
    if sinks_ptr is not None:
        x += gl.load(sinks_ptr)
    m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    n = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    at = gl.expand_dims(m, 1) * WIDTH + gl.expand_dims(n, 0)
    gl.store(out_ptr + at, x)


LAUNCH = Launcher(scaled_box)
ROWS, WIDTH = 64, 64


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu("sm_90") as device:
        yield device


def launch(
    dtype: torch.dtype = torch.bfloat16,
    *,
    rows: int = ROWS,
    swizzle: int = 128,
    sinks: bool = False,
    row: int = 0,
    maxnreg: int | None = None,
) -> Any:
    """Launch `scaled_box` on a fresh tensor of 128 rows; returns the descriptor."""
    x, out = torch.zeros(128, WIDTH, dtype=dtype), torch.zeros(rows, WIDTH)
    layout = gl.NVMMASharedLayout(swizzle, 8 * dtype.itemsize, 2)
    box = TensorDescriptor(x, [128, WIDTH], [WIDTH, 1], [rows, WIDTH], layout)
    tensors = (out, torch.zeros(4) if sinks else None, box)
    LAUNCH((2, 1, 1), tensors, (row,), (0.5,), (rows, WIDTH), 4, 1, maxnreg=maxnreg)
    return box


def test_a_gluon_kernel_compiles_once_and_launches_often(gpu: FakeGpu) -> None:
    for _ in range(3):
        box = launch()
        ran = gpu.launches[-1]
        assert ran.kernel == "scaled_box" and ran.grid == (2, 1, 1) and ran.warps == 4
        assert ran.arguments[2] is box
    assert gpu.compilations == 1 and len(LAUNCH._compiled) == 1
    written = gpu.launches[-1].signature["x_desc"].replace(" ", "")
    assert written == f"tensordesc<bf16[64,64],{box.layout!r}>".replace(" ", "")


def test_what_tells_kernels_apart(gpu: FakeGpu) -> None:
    launch()
    others: tuple[dict[str, Any], ...] = (
        {"dtype": torch.float16},
        {"rows": 32},
        {"swizzle": 64},
        {"sinks": True},
        {"row": 5},
        {"maxnreg": 168},
        {"maxnreg": 128},
    )
    for other in others:
        before = gpu.compilations
        launch(**other)
        launch(**other)
        assert gpu.compilations == before + 1, other
    assert len(LAUNCH._compiled) == gpu.compilations == 8


def test_cached_launch_equals_gluons_own(gpu: FakeGpu) -> None:
    for maxnreg in (None, 168):
        for row in (0, 1, 5, 16):
            launch(row=row, maxnreg=maxnreg)
            launch(row=row, maxnreg=maxnreg)
            ours = gpu.launches[-1]
            options = {} if maxnreg is None else {"maxnreg": maxnreg}
            scaled_box[ours.grid](
                *ours.arguments, num_warps=4, num_stages=1, enable_fp_fusion=True, **options
            )
            theirs = gpu.launches[-1]
            assert ours.hash == theirs.hash and ours.signature == theirs.signature


def test_options_reach_the_compiler(gpu: FakeGpu) -> None:
    launch(maxnreg=168)
    (compiled,) = LAUNCH._compiled.values()
    assert compiled.metadata.maxnreg == 168 and compiled.metadata.enable_fp_fusion
    assert ".maxnreg 168" in compiled.asm["ptx"]


def test_a_hook_sees_every_launch(gpu: FakeGpu) -> None:
    seen: list[str] = []

    def note(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    launch()
    knobs.runtime.launch_enter_hook.add(note)
    try:
        launch()
        launch(maxnreg=168)
        launch(maxnreg=168)
    finally:
        knobs.runtime.launch_enter_hook.remove(note)
    launch()
    assert seen == ["scaled_box"] * 3 and len(gpu.launches) == 5


def test_faults_reach_the_caller_and_are_not_remembered(gpu: FakeGpu) -> None:
    gpu.fail_load = "out of resource: registers"
    with pytest.raises(RuntimeError, match="registers"):
        launch(maxnreg=128)
    assert not LAUNCH._compiled
    gpu.fail_load = None
    launch(maxnreg=128)
    assert len(gpu.launches) == 1
