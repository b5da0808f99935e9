"""Proof of the emulator: right kernels pass in any order, planted faults are found in any order."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from support import gluon_specimens as specimens
from support.gluon import EmulationError, launch
from support.mutants import Mutant, planted
from swathe.kernels.core.gluon import TensorDescriptor, gl

SEEDS = range(4)


def described(t: torch.Tensor, *box: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(128, 8 * t.element_size(), len(box))
    return TensorDescriptor.from_tensor(t, list(box), layout)


def matmul(kernels: ModuleType, seed: int, late: bool = True) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(100, 384).bfloat16(), torch.randn(72, 384).bfloat16()
    out = torch.full((100, 72), torch.nan).bfloat16()
    boxes = described(a, 64, 64), described(b, 64, 64), described(out, 64, 64)
    launch(kernels.matmul, (2, 2), (*boxes, 384, 3), seed=seed, late=late)
    torch.testing.assert_close(out, (a.float() @ b.float().T).bfloat16(), rtol=2**-7, atol=1e-4)


def attend(kernels: ModuleType, seed: int, late: bool = True) -> None:
    torch.manual_seed(0)
    x, out = torch.randn(128, 64).half(), torch.empty(128, 64).half()
    launch(kernels.attend, (1,), (described(x, 64, 64), described(out, 64, 64), True), seed=seed)
    weights = (x.float() @ x.float().T / 8).exp2().half()
    torch.testing.assert_close(out, (weights.float() @ x.float()).half(), rtol=2**-9, atol=2e-3)


def sum_tiles(kernels: ModuleType, seed: int, late: bool = True) -> None:
    torch.manual_seed(0)
    x, sums = torch.randn(7 * 64, 32), torch.zeros(64, 32)
    counter = torch.zeros(1, dtype=torch.int32)
    boxes = described(x, 64, 32), described(sums, 64, 32)
    launch(kernels.sum_tiles, (3,), (*boxes, counter, 7), seed=seed, late=late)
    torch.testing.assert_close(sums, 2 * x.view(7, 64, 32).sum(0), rtol=1e-6, atol=1e-5)


def swap_halves(kernels: ModuleType, seed: int, late: bool = True) -> None:
    x, out = torch.randn(1, 1, 64, 128).half(), torch.empty(1, 1, 64, 128).bfloat16()
    boxes = described(x, 1, 1, 64, 128), described(out, 1, 1, 64, 128)
    launch(kernels.swap_halves, (1,), (*boxes, 64), seed=seed, late=late)
    assert torch.equal(out, x.roll(64, -1).bfloat16())


def scale_rows(kernels: ModuleType, seed: int, late: bool = True) -> None:
    x, scale = torch.randn(37, 32).bfloat16(), torch.randn(37).bfloat16()
    out = torch.empty(37, 32).bfloat16()
    launch(kernels.scale_rows, (3,), (x, scale, out, 37, 32), seed=seed, late=late)
    assert torch.equal(out, x * scale[:, None])


RUNS = [matmul, attend, sum_tiles, swap_halves, scale_rows]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("late", [True, False])
def test_a_right_kernel_gives_the_answer_in_any_order(run: Callable[..., None], late: bool) -> None:
    for seed in range(8):
        run(specimens, seed, late)


WAIT = "        mbarrier.wait(ring.empty.index(slot), phase ^ 1)\n"
FULL = "        mbarrier.wait(ring.full.index(slot), phase)\n"
FENCE = "    fence_async_shared()\n"
BYTES = "mbarrier.expect(full, box_bytes(a_at) + box_bytes(b_at))"
ONE = "        acc = warpgroup_mma_wait(1, deps=[acc])\n"
EMPTY = "mbarrier.init(empty.index(i), count=1)"
SYNC = "    sync_warpgroups(10, 256)\n"
STORED = "    tma_store_wait(0)\n"

MATMUL = {
    "a stage is refilled without a wait": (WAIT, "", "race|more arrivals"),
    "the wait for a stage has the wrong parity": (WAIT, WAIT.replace(" ^ 1", ""), "deadlock"),
    "a stage is used before it is full": (FULL, "", "race|never written"),
    "a stage is used in the wrong phase": (
        FULL,
        FULL.replace("phase", "phase ^ 1"),
        "race|never|dead",
    ),
    "stages are used in another order": (
        "ring.a.index(slot), b,",
        "ring.a.index((i + 1) % STAGES), b,",
        "race|never written",
    ),
    "a stage is released while a product reads it": (ONE, "", "race"),
    "the stage of the product in flight is released": (
        "(i + STAGES - 1) % STAGES), count=1, pred=i > 0",
        "slot), count=1",
        "race",
    ),
    "too few bytes are expected": (BYTES, BYTES.replace(" + ", " + 0 * "), "bytes"),
    "no byte of the second copy is expected": (
        BYTES,
        BYTES.replace(" + box_bytes(b_at)", ""),
        "bytes",
    ),
    "too many bytes are expected": (
        BYTES,
        BYTES.replace("box_bytes(a_at)", "20000"),
        "deadlock.*bytes",
    ),
    "no bytes are expected": (BYTES, "mbarrier.arrive(full, count=1)", "bytes|race"),
    "a stage waits for two readers of which there is one": (
        EMPTY,
        EMPTY.replace("=1", "=2"),
        "deadlock.*1 of 2 arrivals",
    ),
    "a reader counts twice": ("count=1, pred=i > 0", "count=2, pred=i > 0", "more arrivals"),
    "an mbarrier is not initialised": (f"        {EMPTY}\n", "", "never initialised"),
    "an mbarrier is initialised again": (
        f"        {EMPTY}\n",
        f"        {EMPTY}\n        {EMPTY}\n",
        "initialised again",
    ),
    "a sum is read before its product is done": (
        "acc = warpgroup_mma_wait(0, deps=[acc])\n    room",
        "room",
        "while its product is in flight",
    ),
    "a wait leaves one product in flight": (
        "acc = warpgroup_mma_wait(0, deps=[acc])\n    room",
        "acc = warpgroup_mma_wait(1, deps=[acc])\n    room",
        "while its product is in flight",
    ),
    "a store sees what no fence showed": (
        f"{FENCE}    partition_barrier()\n    tma_store(out_at, [row",
        "    tma_store(out_at, [row",
        "missing fence",
    ),
    "the fence comes before what it is for": (
        "    room.store(acc.to(out_at.dtype))\n    fence_async_shared()\n",
        "    fence_async_shared()\n    room.store(acc.to(out_at.dtype))\n",
        "missing fence",
    ),
    "a partition ends before its store has read": (
        "[row, column], room)\n    tma_store_wait(0)\n",
        "[row, column], room)\n",
        "last stores",
    ),
    "a partition ends with a product in flight": (
        "[row, column], room)\n",
        "[row, column], room)\n    again = warpgroup_mma("
        "ring.a.index(0), ring.a.index(0).permute([1, 0]), acc, is_async=True)\n",
        "products in flight|race",
    ),
    "a copy is in flight when the program ends": (
        "    for i in range(steps):\n        slot, phase = i % STAGES, (i // STAGES) & 1\n"
        "        mbarrier.wait(ring.empty",
        "    for i in range(steps + 1):\n        slot, phase = i % STAGES, (i // STAGES) & 1\n"
        "        mbarrier.wait(ring.empty",
        "nobody waited",
    ),
    "two programs store one tile": (
        "tma_store(out_at, [row, column]",
        "tma_store(out_at, [row, 0]",
        "race in global",
    ),
    "more shared memory than there is": (
        "[STAGES, ROWS, 64]",
        "[STAGES * 9, ROWS, 64]",
        "bytes of shared memory",
    ),
    "a slot that is not there": ("slot, phase = i % STAGES", "slot, phase = i", "mbarrier 3 of 3"),
}

ATTEND = {
    "an operand in registers is not kept": (
        "acc, p = warpgroup_mma_wait(0, deps=[ahead, p])",
        "acc = warpgroup_mma_wait(0, deps=[ahead])",
        "operand in registers",
    ),
    "another partition fences": (
        "    fence_async_shared()\n    sync_warpgroups(10, 256)\n",
        "    sync_warpgroups(10, 256)\n    fence_async_shared()\n",
        "missing fence",
    ),
    "another's rows are stored without a barrier": (SYNC, "", "race|never written"),
    "a named barrier is one that Triton uses": (SYNC, SYNC.replace("10", "4"), "named barrier 4"),
    "a named barrier counts other threads here than there": (
        SYNC,
        SYNC.replace("256", "256 + 128 * INDEX"),
        "threads here",
    ),
    "a named barrier waits for a third warpgroup": (
        SYNC,
        SYNC.replace("256", "384"),
        "deadlock.*named barrier 10",
    ),
    "nobody begins to take turns": ("INDEX == 1:", "INDEX == 2:", "deadlock.*named barrier 8"),
    "a turn is handed to oneself": (
        "arrive_warpgroups(9 - INDEX, 256)",
        "arrive_warpgroups(8 + INDEX, 256)",
        "deadlock|twice",
    ),
    "a tile is read that nobody waited for": (
        "    mbarrier.wait(full.index(INDEX), 0)\n",
        "",
        "race|never written",
    ),
    "too many registers": ("[240, 24]", "[260, 24]", "registers"),
}

SUM_TILES = {
    "memory is written while an addition reads it": (
        "        tma_store_wait(0)\n        partition_barrier()\n        room.store",
        "        room.store",
        "race",
    ),
    "additions do not see what no fence showed": (
        "        fence_async_shared()\n        partition_barrier()\n        tma_add",
        "        tma_add",
        "missing fence",
    ),
    "the board is read before it is written": (
        "    mbarrier.wait(full, 0)\n    turn",
        "    turn",
        "never written|race",
    ),
    "the board is written before it is read": (
        "        mbarrier.wait(empty, (done & 1) ^ 1)\n",
        "",
        "race|more arrivals",
    ),
    "a copy out is no addition": ("tma_add(sums_at", "tma_store(sums_at", "race in global"),
}

SWAP_HALVES = {
    "memory is read before the copy is there": (
        "    mbarrier.wait(there.index(0), 0)\n",
        "",
        "race",
    ),
    "halves are read as narrower rows": (
        "left, right = rows.slice(0, HALF, 1).load(BLOCK)",
        "rows = reinterpret(x, x_at.dtype, [2 * ROWS, HALF], x_at.layout)\n"
        "    left, right = rows.slice(0, ROWS, 0).load(BLOCK)",
        "in rows of",
    ),
    "one half is not written": (
        "    halves.slice(HALF, HALF, 1).store(left.to(out_at.dtype))\n",
        "",
        "in rows of|fp16|as bf16",
    ),
    "memory grows": (
        "[1, 1, ROWS, 2 * HALF], out_at.layout)\n    halves",
        "[1, 1, ROWS, 4 * HALF], out_at.layout)\n    halves",
        "strided or smaller",
    ),
    "a copy lands in a view that is strided": (
        "tma_store(out_at, [0, 0, 0, 0], out)",
        "tma_store(out_at, [0, 0, 0, 0], out.slice(0, HALF, 3))",
        "a copy of",
    ),
}

SCALE_ROWS = {
    "a load goes past the end": (
        "live, other=0.0)",
        "column[None, :] < COLUMNS, other=0.0)",
        "out of bounds: load",
    ),
    "a store goes past the end": (
        "x * scale[:, None], live)",
        "x * scale[:, None])",
        "out of bounds: store",
    ),
    "programs write the same rows": (
        "gl.program_id(0) * 16",
        "gl.program_id(0) * 8",
        "race in global",
    ),
    "a range is no power of two": ("gl.arange(0, 16, ", "gl.arange(0, 12, ", "powers of two"),
    "a block is a condition": (
        "    x = gl.load",
        "    if live:\n        index += 1\n    x = gl.load",
        "truth value",
    ),
    "a size is known only at run time": (
        "layout=gl.SliceLayout(0, BLOCK))",
        "layout=gl.SliceLayout(1, BLOCK))",
        "layout",
    ),
    "an index overflows": (
        "index.to(gl.int64)[:, None] * COLUMNS",
        "(index[:, None] + 2**27) * COLUMNS",
        "overflows",
    ),
    "a range ends at a run-time number": (
        "gl.arange(0, COLUMNS, ",
        "gl.arange(0, rows, ",
        "constexpr",
    ),
}

PLANTED = [
    pytest.param(run, Mutant(old, new), expected, id=f"{run.__name__}: {name}")
    for run, table in (
        (matmul, MATMUL),
        (attend, ATTEND),
        (sum_tiles, SUM_TILES),
        (swap_halves, SWAP_HALVES),
        (scale_rows, SCALE_ROWS),
    )
    for name, (old, new, expected) in table.items()
]


@pytest.mark.parametrize(("run", "mutant", "expected"), PLANTED)
def test_a_planted_fault_is_found(
    run: Callable[..., None], mutant: Mutant, expected: str, tmp_path: Path
) -> None:
    with planted(specimens, mutant, tmp_path) as name:
        kernels = sys.modules[name]
        for seed in SEEDS:
            with pytest.raises(EmulationError, match=f"(?s){expected}"):
                run(kernels, seed)
