"""Proof of the emulator's arithmetic, memory and rules, one launch of one small kernel each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import support.gluon.language as language
from support.gluon import EmulationError, launch
from support.gluon.tensors import Tensor, tensor
from support.test_gluon_faults import described
from swathe.kernels.core.gluon import (
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    mbarriers,
    partition_barrier,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@jit
def _arithmetic(x_ptr, y_ptr, out_ptr, OP: gl.constexpr):
    n = gl.arange(0, 64, layout=gl.BlockedLayout([1], [32], [4], [0]))
    x, y = gl.load(x_ptr + n), gl.load(y_ptr + n)
    if OP == "add":
        out = x + y
    elif OP == "mul":
        out = x * y
    elif OP == "div":
        out = x / y
    elif OP == "max":
        out = gl.maximum(x, y)
    elif OP == "scaled":
        out = x * 0.3 - 1
    elif OP == "where":
        out = gl.where(x < y, x, 0.0)
    elif OP == "exp2":
        out = gl.exp2(x.to(gl.float32)) + gl.log2(gl.abs(y).to(gl.float32))
    else:
        out = gl.zeros([64], gl.float32, n.layout) + gl.sum(x, 0) + gl.max(y, 0)
    gl.store(out_ptr + n, out.to(out_ptr.dtype.element_ty))


RESULTS = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x.float() / y.float(),
    "max": torch.fmax,
    "scaled": lambda x, y: x * torch.tensor(0.3, dtype=torch.float32).to(x.dtype) - 1,
    "where": lambda x, y: torch.where(x < y, x, 0),
    "exp2": lambda x, y: x.float().exp2() + y.abs().float().log2(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", RESULTS)
def test_arithmetic_rounds_as_torch_does(op: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64).to(dtype), torch.randn(64).to(dtype)
    x[3] = torch.nan if op == "max" else x[3]
    out = torch.empty(64, dtype=dtype)
    launch(_arithmetic, (1,), (x, y, out, op))
    ulp = 2e-6 if dtype == torch.float32 else 0.0
    torch.testing.assert_close(out, RESULTS[op](x, y).to(dtype), rtol=ulp, atol=ulp)


def test_fp32_is_computed_in_fp32() -> None:
    x, out = torch.full((64,), 1e30), torch.empty(64)
    launch(_arithmetic, (1,), (x, x, out, "mul"))
    assert torch.isinf(out).all()
    x = torch.full((64,), 2.0**24)
    launch(_arithmetic, (1,), (x, torch.ones(64), out, "add"))
    assert torch.equal(out, x)


def test_run_time_integers_divide_towards_zero() -> None:
    seven, minus = tensor(7), tensor(-7)
    assert [int((x // 2).data) for x in (seven, minus)] == [3, -3]
    assert [int((x % 2).data) for x in (seven, minus)] == [1, -1]
    assert int((minus >> 1).data) == -4
    assert str((tensor(True) | (seven > 8)).dtype) == "int1"


@jit
def _assignments(out_ptr, N: gl.constexpr):
    step = -1
    kept: gl.constexpr = -7 // 2
    for _ in range(3):
        step = step - 1
    gl.store(out_ptr, step // 3)
    gl.store(out_ptr + 1, step % 3)
    gl.store(out_ptr + 2, kept)
    gl.store(out_ptr + 3, (N - 8) // 2)


def test_what_is_assigned_is_a_run_time_value_and_constants_are_pythons() -> None:
    out = torch.zeros(4, dtype=torch.int32)
    launch(_assignments, (1,), (out, 3))
    assert out.tolist() == [-1, -1, -4, -3]


def test_int32_overflow_is_an_error_and_int64_has_room() -> None:
    with pytest.raises(EmulationError, match="int32 overflows in a mul"):
        tensor(2**20) * tensor(2**12)
    assert int((tensor(2**20).to(gl.int64) * 2**12).data) == 2**32
    with pytest.raises(EmulationError, match="not finite"):
        tensor(float("nan")).to(gl.int32)


@jit
def _masked(x_ptr, out_ptr, rows, OTHER: gl.constexpr):
    n = gl.arange(0, 64, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(out_ptr + n, gl.load(x_ptr + n, n < rows, other=OTHER))


def test_lanes_left_out_give_other_or_nothing_useful() -> None:
    x, out = torch.randn(10), torch.empty(64)
    launch(_masked, (1,), (x, out, 10, 5.0))
    assert torch.equal(out, torch.cat([x, torch.full((54,), 5.0)]))
    launch(_masked, (1,), (x, out, 10, None))
    assert out[10:].isnan().all() and torch.equal(out[:10], x)
    with pytest.raises(EmulationError, match="out of bounds: load of 54"):
        launch(_masked, (1,), (x, out, 64, 0.0))


def test_gaps_of_a_strided_view_are_out_of_bounds() -> None:
    wide = torch.randn(8, 12)
    with pytest.raises(EmulationError, match="out of bounds: load of 4"):
        launch(_masked, (1,), (wide[:, :8], torch.empty(64), 12, 0.0))


@jit
def _box(x_at, out_at, row, column):
    memory = gl.allocate_shared_memory(x_at.dtype, x_at.block_shape, x_at.layout)
    there = mbarriers(1)
    mbarrier.init(there.index(0), count=1)
    mbarrier.expect(there.index(0), x_at.block_type.nbytes)
    tma_load(x_at, [row, column], there.index(0), memory)
    mbarrier.wait(there.index(0), 0)
    tma_store(out_at, [row, column], memory)
    tma_store_wait(0)


@pytest.mark.parametrize("at", [(0, 0), (-3, 0), (90, 64), (200, 0), (0, -64)])
def test_boxes_are_clipped_and_filled_with_zeros(at: tuple[int, int]) -> None:
    x, out = torch.randn(100, 80).bfloat16(), torch.zeros(100, 80).bfloat16()
    launch(_box, (1,), (described(x, 64, 64), described(out, 64, 64), *at))
    rows, columns = (slice(max(0, n), max(0, n + 64)) for n in at)
    expected = torch.zeros(400, 80).bfloat16()
    expected[:100][rows, columns] = x[rows, columns]
    assert torch.equal(out, expected[:100])
    room = torch.full((400, 80), torch.nan).bfloat16()
    launch(_box, (1,), (described(x, 64, 64), described(room, 64, 64), *at))
    outside = torch.ones(400, 80, dtype=torch.bool)
    outside[rows, columns] = False
    assert torch.equal(room.isnan(), outside)
    assert torch.equal(room.nan_to_num(), expected)


def test_strided_tensors_are_read_in_place() -> None:
    x = torch.randn(100, 3, 64).half()
    out = torch.zeros(100, 64).half()
    launch(_box, (1,), (described(x[:, 1], 64, 64), described(out, 64, 64), 10, 0))
    assert torch.equal(out[10:74], x[10:74, 1]) and not out[74:].any()


@jit
def _product(x_at, out_ptr, WARPS: gl.constexpr, COLUMNS: gl.constexpr, INNER: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, COLUMNS, 16]
    )
    memory = gl.allocate_shared_memory(gl.bfloat16, [64, 64], x_at.layout)
    block: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    memory.store(gl.full([64, 64], 1.0, gl.bfloat16, block))
    fence_async_shared()
    partition_barrier()
    a = memory.slice(0, INNER, 1)
    b = memory.slice(0, COLUMNS, 0).slice(0, INNER, 1).permute([1, 0])
    acc = gl.zeros([64, COLUMNS], gl.float32, layout)
    acc = warpgroup_mma(a, b, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    gl.store(out_ptr, gl.max(gl.max(acc, 1), 0))


def test_products_keep_to_the_shapes_that_there_are() -> None:
    x, out = described(torch.zeros(64, 64).bfloat16(), 64, 64), torch.zeros(1)
    launch(_product, (1,), (x, out, 4, 32, 16))
    assert out.item() == 16
    for warps, columns, inner, said in ((4, 4, 64, "8 columns"), (4, 64, 8, "16 inner")):
        with pytest.raises(EmulationError, match=said):
            launch(_product, (1,), (x, out, warps, columns, inner))
    with pytest.raises(EmulationError, match=r"\[8, 1\] warps in a partition of 4"):
        launch(_product, (1,), (x, out, 8, 64, 64))
    with pytest.raises(EmulationError, match="by 2 warps"):
        launch(_product, (1,), (x, out, 4, 64, 64), num_warps=2)


def test_descriptors_are_what_the_hardware_takes() -> None:
    x, out = torch.zeros(600, 64).bfloat16(), torch.zeros(1)
    with pytest.raises(EmulationError, match="at most 256"):
        launch(_product, (1,), (described(x, 512, 64), out, 4, 32, 16))
    bad = described(x, 64, 64)
    bad.shape = [601, 64]
    with pytest.raises(EmulationError, match="past its tensor's memory"):
        launch(_product, (1,), (bad, out, 4, 32, 16))
    bad = described(x, 64, 64)
    bad.strides = [36, 1]
    with pytest.raises(EmulationError, match="multiple of 16 bytes"):
        launch(_product, (1,), (bad, out, 4, 32, 16))


def test_every_function_of_gl_has_the_name_that_gluon_gives_it() -> None:
    ours = set(language.FUNCTIONS) - {"thread_barrier"}
    assert ours <= set(dir(gl)) | {"clamp"}
    with pytest.raises(EmulationError, match=r"gl\.histogram is not emulated"):
        language.language().histogram  # noqa: B018


def test_layouts_of_operands_must_agree() -> None:
    layouts = [gl.BlockedLayout([1], [32], [warps], [0]) for warps in (4, 1)]
    x, y = (Tensor(np.zeros(64, np.float32), gl.float32, layout) for layout in layouts)
    with pytest.raises(EmulationError, match="different layouts"):
        x + y
