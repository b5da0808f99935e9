"""The benchmarks' own code: the gate, the plan's dry run, what failures leave, what is printed."""

from __future__ import annotations

import json
import platform
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import contenders as who
from bench import cpu, overview, report
from bench.cases import DTYPES, Cell, draw, gate, gold
from bench.contenders import Contender, contenders, peer
from bench.measure import ROUNDS, measure, row_keys
from bench.parity import different, drawn, run_of
from bench.record import document, save
from bench.subject import OPS, Variant, each_once, subject
from bench.test_ops import Playback, cells
from bench.timing import input_sets, interleave, peak_bytes
from swathe.kernels.core.contract import Problem
from swathe.kernels.norm import eager
from swathe.kernels.norm.contract import EPS

NORM = subject("rms_norm")
VARIANTS = NORM.variants
TINY = Cell.of("rms_norm", NORM.tiny[0], "bfloat16", VARIANTS[0])


def contender(name: str, function: Any, **facts: Any) -> Contender:
    return Contender(name, lambda problem: function, **facts)


def right(x: Tensor, weight: Tensor, residual: Tensor | None = None, **_: Any) -> Any:
    return eager.rms_norm(x, weight, EPS, 0.0, "llama", residual)


def without_weight(x: Tensor, weight: Tensor, **_: Any) -> Any:
    return right(x, torch.ones_like(weight))


def one_bad_row(x: Tensor, weight: Tensor, **_: Any) -> Any:
    y = right(x, weight).clone()
    y[-1] = torch.nan
    return y


def frozen_weight(x: Tensor, weight: Tensor, **_: Any) -> Any:
    return right(x, weight.detach() + 0 * weight)


def wrong_h(x: Tensor, weight: Tensor, residual: Tensor, **_: Any) -> Any:
    return right(x, weight, residual)[0], x


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gate_lets_right_ones_through(op: str, dtype: str) -> None:
    of = subject(op)
    for variant in of.variants:
        cell = Cell.of(op, of.tiny[0], dtype, variant)
        problem = draw(cell, "cpu", 0)
        truth = gold(cell, problem)
        for one in contenders(of, "cpu", compiled=False):
            if one.absent:
                continue
            try:
                function = one.prepare(problem)
            except NotImplementedError as unserved:
                assert not one.ours and one.name in str(unserved)
                continue
            found = problem.run(function, backward=variant.backward)
            assert gate(found, truth, DTYPES[dtype]) is None, (one.name, variant)


@pytest.mark.parametrize(
    ("norm", "variant", "reason"),
    [
        (without_weight, VARIANTS[0], "y: relative error"),
        (one_bad_row, VARIANTS[0], "y: relative error nan"),
        (lambda x, **_: x[:1], VARIANTS[0], r"y has shape \(1, 64\)"),
        (lambda x, weight, **_: right(x, weight).double(), VARIANTS[0], "y has dtype torch.float6"),
        (frozen_weight, VARIANTS[1], "dweight: relative error"),
        (wrong_h, VARIANTS[2], "h: relative error"),
    ],
)
def test_gate_refuses_wrong_ones(norm: Any, variant: Variant, reason: str) -> None:
    cell = Cell.of("rms_norm", NORM.tiny[0], "bfloat16", variant)
    rows = measure(cell, "cpu", [contender("wrong", norm), contender("right", right)], rounds=1)
    wrong, fine = rows
    assert "median_us" not in wrong and "median_us" in fine
    assert re.match(f"gate: {reason}", wrong["error"])
    assert (
        gate({"y": torch.ones(1)}, {"z": torch.ones(1)}, torch.float32)
        == "returned ['y'], expected ['z']"
    )


def test_contender_that_raises_is_a_row_with_the_error() -> None:
    def raises(**_: Any) -> Any:
        raise RuntimeError("no kernel image")

    rows = measure(TINY, "cpu", [contender("broken", raises), contender("right", right)], rounds=1)
    assert rows[0]["error"] == "RuntimeError: no kernel image"
    assert rows[1]["median_us"] > 0


def test_absent_peers_say_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert peer("no_such_package_here.ops") == (
        None,
        "package no_such_package_here is not installed",
    )
    (tmp_path / "torn_package.py").write_text("raise RuntimeError('needs a newer driver')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module, reason = peer("torn_package")
    assert module is None
    assert reason == "import torn_package raised RuntimeError: needs a newer driver"
    monkeypatch.setattr(who, "find_spec", lambda name: None)
    absent = {c.name: c.absent for c in contenders(NORM, "cuda") if c.absent}
    assert absent["liger"] == "package liger_kernel is not installed"
    assert absent["quack"] == "package quack is not installed"
    assert measure(TINY, "cpu", [Contender("gone", who.nothing, "not here")], rounds=1) == []


def test_eager_contender_is_transformers_own_norm() -> None:
    llama = import_module("transformers.models.llama.modeling_llama")
    problem = drawn(NORM, "cpu", NORM.cpu[2], 1, "")
    x, weight = problem.inputs["x"], problem.inputs["weight"]
    module = llama.LlamaRMSNorm(x.shape[-1], EPS).to(torch.bfloat16)
    module.weight.data = weight
    mine = next(c for c in contenders(NORM, "cpu") if c.name == "eager").prepare(problem)
    theirs = problem.run(
        lambda x, weight, **_: torch.func.functional_call(module, {"weight": weight}, x)
    )
    assert different(theirs, problem.run(mine)) == []


def test_rounds_rotate() -> None:
    order: list[str] = []

    def sampler(name: str) -> Any:
        def sample() -> float:
            order.append(name)
            return 1.0

        return sample

    samples = interleave({n: sampler(n) for n in "abc"}, 3)
    assert "".join(order) == "abcbcacab"
    assert samples == {n: [1.0] * 3 for n in "abc"}
    assert len(interleave({"a": sampler("a")}, 40, seconds=0.0)["a"]) == 5


def test_traffic_counts_each_tensor_once() -> None:
    shape = NORM.tiny[0]._replace(M=10, N=64)
    found = {
        v.name: NORM.traffic(drawn(NORM, "cpu", shape, 0, v.form), v.backward) for v in VARIANTS
    }
    weight = 2 * 64
    assert found == {
        "forward": 2 * 1280 + weight,
        "forward+backward": 5 * 1280 + 3 * weight,
        "add forward": 4 * 1280 + weight,
        "add forward+backward": 8 * 1280 + 3 * weight,
    }
    x, table = torch.ones(4, 8), torch.ones(8)
    problem = Problem({"x": x}, {"y": x}, {"cos": table, "scale": 2.0})
    assert each_once(problem, False) == 2 * 128 + 32
    assert each_once(problem, True) == 5 * 128 + 2 * 32
    assert input_sets("cpu", 100) == 1
    assert input_sets("cuda", 100) == 32 and input_sets("cuda", 10**9) == 1


def test_peak_memory_counts_what_lives_at_once() -> None:
    x = torch.randn(256, 1024)
    assert peak_bytes(lambda: x * 2, "cpu") == pytest.approx(2**20, rel=0.01)
    assert peak_bytes(lambda: (x * 2) + 1, "cpu") == pytest.approx(2**21, rel=0.01)
    assert peak_bytes(lambda: (x * 2).mul_(2).add_(1), "cpu") == pytest.approx(2**20, rel=0.01)


def test_rerun_comparison_sees_one_bit() -> None:
    run = run_of(NORM, "eager", drawn(NORM, "cpu", NORM.tiny[1], 0))
    first, second = run(), run()
    assert different(first, second) == []
    second["dweight"].view(torch.int16)[3] ^= 1
    assert different(first, second) == ["dweight: 1 of 37 elements differ"]


def test_playback_clock_gives_back_the_samples() -> None:
    clock = Playback()
    clock.samples = iter([0.5, 0.25])
    assert [clock() for _ in range(4)] == [0.0, 0.5, 0.0, 0.25]


def test_pytest_cells_are_the_issues() -> None:
    norm = [c for c in cells(False) if c.op == "rms_norm"]
    forward = {(c.size, c.dtype) for c in norm if c.variant == "forward"}
    if not torch.cuda.is_available():
        sizes = {f"{m} x {n}" for m in (1, 16, 2048) for n in (576, 2048, 4096)}
        assert forward == {(size, d) for size in sizes for d in ("float32", "bfloat16")}
    every = [c for c in cells(True) if c.op == "rms_norm"]
    assert len(every) == 4 * len(forward) and len(cells(True)) > len(cells(False))


def results_of(ours: float, peer_us: float) -> dict[str, Any]:
    row = {
        **TINY.facts(), "ours": True, "backend": "cpp", "median_us": ours, "min_us": 1.0,
        "max_us": 9.0, "rounds": 3, "gbps": 5.0, "of_copy": 0.5, "copy_gbps": 10.0,
    }  # fmt: skip
    other = {**row, "ours": False, "backend": "torch", "median_us": peer_us}
    broken = {**TINY.facts(), "ours": False, "backend": "liger", "error": "gate: y is off"}
    return {**document("rms_norm", "cpu", "c0ffee"), "benchmarks": [row, other, broken]}


def test_markdown_and_worst_cell() -> None:
    text = report.markdown(results_of(2.0, 5.0))
    assert "| size | cpp | torch | liger | ours, 95 % | of copy | best peer / ours |" in text
    assert "| 3 x 64 | 2.0 | 5.0 | failed | - | 0.50 | 2.50 (torch) |" in text
    assert "commit c0ffee" in text
    (sampled := results_of(2.0, 5.0))["benchmarks"][0]["samples_us"] = [2.0, 1.5, 9.0]
    assert "| failed | 1.5 to 9.0 | 0.50 |" in report.markdown(sampled)
    assert "1.5 to 9.0" in report.summary(sampled)
    (busy := results_of(1.0, 1.0))["device"]["load"] = 3.5
    assert report.summary(busy).startswith("BUSY MACHINE: load 3.5")
    assert "1.25x the time of torch; ours is the fastest in 0 of 1" in report.worst(
        results_of(2.5, 2.0)
    )
    assert "liger on tiny bfloat16 forward: gate: y is off" in report.summary(results_of(1.0, 1.0))


def test_overview(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slower = results_of(6.0, 5.0)["benchmarks"]
    results = results_of(2.0, 5.0)
    results["benchmarks"] += [{**row, "shape": "other"} for row in slower]
    save(results, tmp_path / "rms_norm.json")
    (tmp_path / "demo.json").write_text('{"comparison": []}')  # not a benchmark
    assert overview.main([str(tmp_path), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| op | fastest in | torch | worst cell |"
    # medians of 0.4 and 1.2
    worst = "1.20 (torch): other (3 x 64) bfloat16 forward"
    assert lines[2] == f"| `rms_norm` | 1 of 2 | 0.80 (1.20) | {worst} |"
    assert overview.main([str(tmp_path)]) == 0
    assert "rms_norm      1 of 2  0.80 (1.20)" in capsys.readouterr().out
    (tmp_path / "rms_norm.json").unlink()
    assert overview.main([str(tmp_path)]) == 2
    assert "holds no results; make some with python -m bench.cpu" in capsys.readouterr().err


def test_the_cpu_sees_each_op_on_the_grid() -> None:
    sizes = {(m, n) for m in (1, 16, 2048) for n in (576, 2048, 4096)}
    for op in ("layer_norm", "gated_mlp_act"):
        of = subject(op)
        assert {(s.M, s.N) for s in of.cpu} == sizes
        assert {v.form for s in of.cpu for v in of.variants_of(s)} == {*of.forms}
    for op in ("rotary", "qk_norm_rotary"):
        assert {(s.S, s.H * s.D) for s in subject(op).cpu} == sizes
    assert sizes <= {(s.M, s.V) for s in subject("cross_entropy").cpu}
    attention = subject("attention").cpu
    assert {(s.S, s.D, s.H // s.K) for s in attention if s.T > 1} == {
        (S, D, group) for S in (128, 512, 2048, 4096) for D in (64, 128) for group in (3, 8)
    }


def test_what_a_peer_does_not_serve_is_no_failure() -> None:
    results = results_of(2.0, 5.0)
    results["benchmarks"][2]["error"] = "NotImplementedError: liger has no softcap"
    assert "| 3 x 64 | 2.0 | 5.0 | - | - | 0.50 | 2.50 (torch) |" in report.markdown(results)
    assert "liger on tiny" not in report.summary(results)


def test_a_peer_that_overwrites_harms_nobody() -> None:
    problem = drawn(NORM, "cpu", NORM.tiny[0], 1, "add")
    kept = problem.map(Tensor.clone)

    class Rude(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            doubled = x * 2, residual * 3
            x.fill_(7), residual.fill_(7)
            return doubled

        @staticmethod
        def backward(ctx: Any, dy: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
            found = dy * 2, dh * 3
            dy.fill_(5), dh.fill_(5)
            return found

    def peer_of(x: Tensor, weight: Tensor, residual: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        y, h = Rude.apply(x, residual)
        return y + 0 * weight, h

    call = problem.call(who.overwriting(peer_of, problem))
    first, again = call(), call()
    assert torch.equal(first["dx"], 2 * kept.arriving["y"])
    assert torch.equal(again["y"], torch.full_like(again["y"], 14))
    for before, now in ((kept.inputs, problem.inputs), (kept.arriving, problem.arriving)):
        assert all(torch.equal(before[name], now[name]) for name in before)


@pytest.mark.parametrize(
    ("content", "said"), [("{", "is no JSON"), ('{"schema": 0}', "schema 0"), ("[]", "schema None")]
)
def test_report_refuses_other_files(
    content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=said):
        report.read(file)
    assert report.main([str(file)]) == 2
    assert said in capsys.readouterr().err
    assert report.main([str(tmp_path / "missing.json")]) == 2


def test_cpu_run_writes_what_report_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    everyone = contenders(NORM, "cpu", compiled=False)
    monkeypatch.setattr(cpu, "contenders", lambda of, device: everyone)
    assert ROUNDS["cpu"] >= 15
    given = ["--out", str(tmp_path), "--rounds", "2", "--shapes", "smollm2_135m_decode"]
    assert cpu.main(given) == 0
    results = report.read(tmp_path / "rms_norm.json")
    rows = results["benchmarks"]
    present = [c for c in everyone if not c.absent]
    assert len(rows) == 2 * len(VARIANTS) * len(present)
    assert all(row.keys() == row_keys(NORM) and row["rounds"] == 2 for row in rows)
    assert results["absent"]["compile"]
    assert "worst cell" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(SystemExit):
        cpu.main([*given[:2], "--shapes", "nothing"])
    assert "['nothing'] unknown" in capsys.readouterr().err


def test_results_name_no_host_and_no_path(tmp_path: Path) -> None:

    save(document("rms_norm", "cpu"), tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text)["op"] == "rms_norm"
    assert platform.node() not in text and str(Path.cwd()) not in text
