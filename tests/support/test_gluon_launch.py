"""Proof of the emulator's schedules, twins and launches."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from support import gluon_specimens as specimens
from support.gluon import EmulationError, emulated, launch, schedule
from support.gluon.twins import twin
from support.mutants import Mutant, planted
from support.test_gluon_faults import attend, described, matmul, scale_rows
from swathe.kernels.core.gluon import gl, jit, mbarrier, mbarriers
from swathe.kernels.core.launch import Launcher


def _sums(seed: int) -> torch.Tensor:
    x, sums = (
        torch.randn(7 * 64, 32, generator=torch.Generator().manual_seed(1)),
        torch.zeros(64, 32),
    )
    counter = torch.zeros(1, dtype=torch.int32)
    boxes = described(x, 64, 32), described(sums, 64, 32)
    launch(specimens.sum_tiles, (3,), (*boxes, counter, 7), seed=seed)
    return sums


def test_a_seed_says_the_order_of_everything() -> None:
    # additions round by their order
    assert torch.equal(_sums(3), _sums(3))
    assert any(not torch.equal(_sums(3), _sums(seed)) for seed in range(4, 12))


def test_a_faulty_launch_fails_in_the_same_words_every_time(tmp_path: Path) -> None:
    mutant = Mutant("        mbarrier.wait(ring.empty.index(slot), phase ^ 1)\n", "")
    said = []
    with planted(specimens, mutant, tmp_path) as name:
        for _ in range(2):
            with pytest.raises(EmulationError) as caught:
                matmul(sys.modules[name], seed=5)
            said.append(str(caught.value))
    assert said[0] == said[1] and f"{name}.py:" in said[0] and "partition" in said[0]


def test_a_deadlock_says_who_waits_for_what(tmp_path: Path) -> None:
    mutant = Mutant("sync_warpgroups(10, 256)", "sync_warpgroups(10 + INDEX, 256)")
    with planted(specimens, mutant, tmp_path) as name, pytest.raises(EmulationError) as caught:
        attend(sys.modules[name], seed=0)
    said = str(caught.value)
    assert "partition _attend(0) of program (0, 0, 0) waits for named barrier 10" in said
    assert "partition _attend(1) of program (0, 0, 0) waits for named barrier 11" in said
    assert "128 of 256 threads" in said


@jit
def _forever(out_ptr):
    step = gl.program_id(0)
    while step < 1:
        gl.store(out_ptr, step)


def test_a_loop_without_an_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "MOST_STEPS", 1000)
    with pytest.raises(EmulationError, match="no end after 1000 steps"):
        launch(_forever, (1,), (torch.zeros(1, dtype=torch.int32),))


@jit
def _number(out_ptr, SAME: gl.constexpr):
    n = gl.program_id(0) + gl.num_programs(0) * gl.program_id(1)
    gl.store(out_ptr + (0 if SAME else n), n)


@jit
def _arrive(bar):
    mbarrier.arrive(bar, count=1)


@jit
def _initialise(bar):
    mbarrier.init(bar, count=1)


@jit
def _split(INSIDE: gl.constexpr, NESTED: gl.constexpr):
    bar = mbarriers(1).index(0)
    if not INSIDE:
        mbarrier.init(bar, count=1)
    if NESTED:
        gl.warp_specialize([(_split, (False, False)), (_arrive, (bar,))], [1], [24])
    elif INSIDE:
        gl.warp_specialize([(_initialise, (bar,)), (_arrive, (bar,))], [1], [24])
    else:
        gl.warp_specialize([(_arrive, (bar,)), (_arrive, (bar,))], [1], [24])


def test_mbarriers_are_initialised_before_partitions_start() -> None:
    launch(_split, (1,), (False, False))
    for seed in range(6):
        with pytest.raises(EmulationError, match=r"never initialised|nothing to order that after"):
            launch(_split, (1,), (True, False), seed=seed)
        with pytest.raises(EmulationError, match="before partitions start"):
            launch(_split, (1,), (False, True), seed=seed)


BORROWED = """
from swathe.kernels.core import gluon

@gluon.jit
def count(out_ptr):
    gluon.gl.store(out_ptr, gluon.gl.num_programs(0))
"""


def test_the_vocabulary_may_have_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "borrowed_gluon.py").write_text(BORROWED)
    monkeypatch.syspath_prepend(tmp_path)
    out = torch.zeros(1, dtype=torch.int32)
    launch(import_module("borrowed_gluon").count, (1,), (out,))
    assert out.item() == 1


def test_every_program_of_a_grid_runs_once() -> None:
    out = torch.full((12,), -1, dtype=torch.int32)
    stats = launch(_number, (4, 3), (out, False))
    assert out.tolist() == list(range(12)) and stats.programs == 12
    with pytest.raises(EmulationError, match="race in global memory"):
        launch(_number, (4, 3), (out, True))
    with pytest.raises(EmulationError, match="no program to run"):
        launch(_number, (4, 0), (out, False))
    with pytest.raises(EmulationError, match="takes 2 arguments, not 1"):
        launch(_number, (1,), (out,))


@jit
def _hand_on(values_ptr, flag_ptr, SEM: gl.constexpr):
    if gl.program_id(0) == 0:
        gl.store(values_ptr, 1)
        gl.atomic_add(flag_ptr, 1, sem=SEM)
    else:
        seen = gl.atomic_add(flag_ptr, 0, sem=SEM)
        while seen == 0:
            seen = gl.atomic_add(flag_ptr, 0, sem=SEM)
        gl.store(values_ptr + 1, gl.load(values_ptr) + 1)


def test_atomics_order_programs_unless_they_are_relaxed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "MOST_STEPS", 300)
    # the two run side by side under some seeds only; alone, the second would wait forever
    orders = set()
    for seed in range(12):
        values, flag = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        for sem in ("acq_rel", "relaxed"):
            flag.zero_()
            try:
                launch(_hand_on, (2,), (values, flag, sem), seed=seed)
                orders.add((sem, values.tolist() == [1, 2]))
            except EmulationError as error:
                orders.add((sem, str(error).split(":")[0][:10]))
    assert ("acq_rel", True) in orders and ("relaxed", "race in gl") in orders
    assert not {said for sem, said in orders if sem == "acq_rel"} - {True, "no end aft"}


def test_stats_count_what_a_launch_does() -> None:
    x, out = torch.randn(128, 64).half(), torch.empty(128, 64).half()
    stats = launch(specimens.attend, (1,), (described(x, 64, 64), described(out, 64, 64), False))
    assert stats.loads == 2 and stats.loaded_bytes == 128 * 64 * 2 == stats.stored_bytes
    assert stats.moved == {"x_at": 128 * 64 * 2, "out_at": 128 * 64 * 2}
    assert stats.products == 8 and stats.product_flops == 2 * 2 * 128 * 128 * 64
    assert stats.transcendentals == 128 * 128
    assert stats.shared_bytes == 2 * 2 * 64 * 64 * 2 + 16


def test_launchers_of_gluon_kernels_are_emulated() -> None:
    x, scale = torch.randn(37, 32).bfloat16(), torch.randn(37).bfloat16()
    out = torch.empty(37, 32).bfloat16()
    launcher = Launcher(specimens.scale_rows)
    with emulated(seed=4) as stats:
        launcher((3, 1, 1), (x, scale, out), (37,), (), (32,), num_warps=4)
        launcher((3, 1, 1), (x, scale, out), (37,), (), (32,), num_warps=4)
    assert torch.equal(out, x * scale[:, None]) and stats.programs == 6
    assert Launcher.__call__.__qualname__ == "Launcher.__call__"


def test_a_twin_follows_its_file(tmp_path: Path) -> None:
    mutant = Mutant("gl.program_id(0) * 16", "gl.program_id(0) * 32")
    with planted(specimens, mutant, tmp_path) as name:
        copy = sys.modules[name]
        with pytest.raises(AssertionError):
            scale_rows(copy, 0)
        assert copy.__file__ is not None
        file = Path(copy.__file__)
        before = twin(name)
        file.write_text(file.read_text().replace(mutant.new, mutant.old))
        scale_rows(copy, 0)
        assert twin(name) is not before and twin(name) is twin(name)
