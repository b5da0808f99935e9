"""What is timed: the backward alone, sittings that lie apart, first calls; what a quick run is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import cpu, measure, report
from bench.cases import Cell, draw
from bench.cells import CHOICES, cells, contenders_of
from bench.contenders import Contender, contenders, separately
from bench.measure import Measured, row_keys
from bench.progress import Progress
from bench.subject import OPS, Variant, subject
from bench.timing import Backward
from swathe.kernels.norm import eager
from swathe.kernels.norm.contract import EPS

NORM = subject("rms_norm")
ALONE = NORM.variant("backward")
CELL = Cell.of("rms_norm", NORM.tiny[0], "bfloat16", ALONE)


def right(x: Tensor, weight: Tensor, **_: Any) -> Tensor:
    return eager.rms_norm(x, weight, EPS, 0.0, "llama", None)


def slow_forward(x: Tensor, weight: Tensor, **_: Any) -> Tensor:
    time.sleep(0.02)
    return right(x, weight)


def contender(name: str, function: Any, **facts: Any) -> Contender:
    return Contender(name, lambda problem: function, **facts)


@pytest.mark.parametrize("op", OPS)
def test_a_backward_alone_gives_the_gradients_of_both(op: str) -> None:
    of = subject(op)
    alone = next(v for v in of.variants if v.alone)
    assert alone.form == of.forms[0] and alone.name.endswith("backward")
    cell = Cell.of(op, of.tiny[0], "float32", alone)
    problem = draw(cell, "cpu", 0)
    for one in contenders(of, "cpu", compiled=False):
        if one.absent:
            continue
        function = one.prepare(problem)
        both = problem.run(function)
        call = Backward(problem, function)
        for found in (call(), call()):
            assert found.keys() == {name for name in both if name not in problem.arriving}
            for name, t in found.items():
                torch.testing.assert_close(t, both[name], rtol=1e-5, atol=1e-6)


def test_a_backward_alone_is_timed_without_its_forward() -> None:
    rows = measure.measure(CELL, "cpu", [contender("slow", slow_forward)], rounds=2)
    assert rows[0]["median_us"] < 10_000 <= 1000 * rows[0]["first_ms"]
    both, forward = (NORM.traffic(draw(CELL, "cpu", 0), b) for b in (True, False))
    assert rows[0]["traffic_bytes"] == both - forward
    assert Variant("", "", backward=True).of(NORM.traffic, draw(CELL, "cpu", 0)) == both


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_torch_compile_serves_a_backward_alone() -> None:
    one = next(c for c in contenders(NORM, "cpu") if c.name == "compile")
    rows = measure.measure(CELL, "cpu", [one, contender("right", right)], rounds=2)
    assert rows[0].get("error") is None
    assert rows[0]["first_ms"] > rows[1]["first_ms"]


def test_sittings_have_inputs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()

    def watching(x: Tensor, weight: Tensor, **_: Any) -> Tensor:
        seen.add(x.data_ptr())
        kept.append(x)
        return right(x, weight)

    kept: list[Tensor] = []
    forward = Cell.of("rms_norm", NORM.tiny[0], "float32", NORM.variant("forward"))
    measured = Measured(forward, "cpu", [contender("watching", watching, ours=True)])
    for _ in range(3):
        measured.sit(rounds=2)
    (row,) = measured.rows()
    assert len({x.data_ptr() for x in kept if x.numel()}) == 3
    assert row.keys() == row_keys(NORM)
    assert row["rounds"] == len(row["samples_us"]) == 6 and len(row["sittings_us"]) == 3
    first = sorted(row["samples_us"][:2])
    assert first[0] <= row["sittings_us"][0] <= first[1]


def test_what_compiles_has_code_of_its_own() -> None:
    def double(x: Tensor) -> Tensor:
        return x * 2

    one, other = separately(double), separately(double)
    assert one.__code__ is not other.__code__
    assert torch.equal(one(torch.ones(3)), other(x=torch.ones(3)))


def test_a_quick_run_has_every_op_and_compiles_little() -> None:
    for op in OPS:
        quick, issue, every = (cells(op, "cpu", which) for which in CHOICES)
        if not any(c.ours for c in contenders(subject(op), "cpu")):
            assert quick == issue == every == []
            continue
        assert set(quick) < set(issue) <= set(every)
        assert {c.dtype for c in quick} == {"float32", "bfloat16"} and len(quick) <= 12
        assert {c.kind.alone for c in quick} == {True, False}
        compiled = [
            c
            for c in quick
            if not {x.name: x.absent for x in contenders_of(c, "cpu", "quick")}["compile"]
        ]
        assert {c.variant.split()[-1] for c in compiled} == {"forward", "forward+backward"}
        assert len(compiled) == 2
        assert not any(x.absent for c in issue[:1] for x in contenders_of(c, "cpu", "all"))


def test_a_quick_run_of_one_op(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    everyone = contenders(NORM, "cpu", compiled=False)
    monkeypatch.setattr(cpu, "contenders_of", lambda cell, device, which: everyone)
    assert cpu.main(["--out", str(tmp_path), "--quick", "--op", "rms_norm", "--rounds", "1"]) == 0
    rows = report.read(tmp_path / "rms_norm.json")["benchmarks"]
    assert {len(row["sittings_us"]) for row in rows} == {cpu.QUICK_SITTINGS}
    assert {(row["shape"], row["variant"]) for row in rows} == {
        (shape, variant)
        for shape in NORM.quick
        for variant in ("forward", "forward+backward", "backward")
    }
    said = capsys.readouterr()
    assert "rms_norm: op 1 of 1" in said.err and "backward, again" in said.err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--quick", "--shapes", "llama_1b"], "--quick chooses the shapes"),
        (["--dtypes", "float64"], "--dtypes: ['float64'] unknown; allowed: ['float32'"),
        (["--sittings", "-1"], "--rounds and --sittings: give one or more"),
    ],
)
def test_refused_options(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cpu.main(["--out", "x", *given])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 30.0, 300.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    progress = Progress(11)
    for what in "abc":
        progress.step(what)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["[1/11] a", "[2/11, 30 s, about 5 min left] b",
                     "[3/11, 5 min, about 22 min left] c"]  # fmt: skip
