"""The benchmarks' own code: the gate, the plan's dry run, what failures leave, what is printed."""

from __future__ import annotations

import json
import platform
import re
import time
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import contenders as who
from bench import cpu, gpu, parity, plan, report, timing
from bench import measure as bench_measure
from bench.cases import CPU_SHAPES, TINY_SHAPES, VARIANTS, Cell, draw, gate, gold
from bench.contenders import Contender, contenders, peer
from bench.lanes import Lane, Unit
from bench.measure import ROUNDS, call_on, measure
from bench.parity import different, run_of
from bench.record import SCHEMA, document, save
from bench.test_rms_norm import Playback, cells
from bench.timing import input_sets, interleave, peak_bytes
from swathe.kernels.norm import eager
from swathe.kernels.norm.contract import EPS

TINY = Cell.of(TINY_SHAPES[0], "bfloat16", VARIANTS[0])
ROW_KEYS = {
    *("op", "shape", "M", "N", "dtype", "variant", "backend", "ours", "median_us", "min_us"),
    *("max_us", "rounds", "samples_us", "gbps", "of_copy", "copy_gbps", "traffic_bytes"),
    *("host_us", "peak_mib"),
}


def contender(name: str, norm: Any, **facts: Any) -> Contender:
    return Contender(name, lambda x, w, r: norm, **facts)


def right(x: Tensor, weight: Tensor, residual: Tensor | None) -> Any:
    return eager.rms_norm(x, weight, EPS, 0.0, "llama", residual)


def without_weight(x: Tensor, weight: Tensor, residual: Tensor | None) -> Any:
    return eager.rms_norm(x, torch.ones_like(weight), EPS, 0.0, "llama", residual)


def one_bad_row(x: Tensor, weight: Tensor, residual: Tensor | None) -> Any:
    y = right(x, weight, residual).clone()
    y[-1] = torch.nan
    return y


def frozen_weight(x: Tensor, weight: Tensor, residual: Tensor | None) -> Any:
    return right(x, weight.detach() + 0 * weight, residual)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gate_lets_right_ones_through(dtype: str, variant: Any) -> None:
    cell = Cell.of(CPU_SHAPES[2], dtype, variant)
    problem = draw(cell, "cpu", 0)
    truth = gold(problem, variant.backward)
    for one in contenders("cpu", compiled=False):
        if not one.absent:
            norm = one.prepare(problem.x, problem.weight, variant.residual)
            assert gate(call_on(norm, problem, variant)(), truth) is None, one.name


@pytest.mark.parametrize(
    ("norm", "variant", "reason"),
    [
        (without_weight, VARIANTS[0], "y: relative error"),
        (one_bad_row, VARIANTS[0], "y: relative error nan"),
        (lambda x, w, r: x[:1], VARIANTS[0], r"y has shape \(1, 64\)"),
        (lambda x, w, r: right(x, w, r).double(), VARIANTS[0], "y has dtype torch.float64"),
        (frozen_weight, VARIANTS[1], "dw: relative error"),
        (lambda x, w, r: (right(x, w, r)[0], x), VARIANTS[2], "h: relative error"),
        (lambda x, w, r: (right(x, w, r), x), VARIANTS[0], "returned"),
    ],
)
def test_gate_refuses_wrong_ones(norm: Any, variant: Any, reason: str) -> None:
    cell = Cell.of(TINY_SHAPES[0], "bfloat16", variant)
    rows = measure(cell, "cpu", [contender("wrong", norm), contender("right", right)], rounds=1)
    wrong, fine = rows
    assert "median_us" not in wrong and "median_us" in fine

    assert re.match(f"gate: {reason}", wrong["error"])


def test_contender_that_raises_is_a_row_with_the_error() -> None:
    def raises(x: Tensor, weight: Tensor, residual: Tensor | None) -> Any:
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
    absent = {c.name: c.absent for c in contenders("cuda") if c.absent}
    assert absent["liger"] == "package liger_kernel is not installed"
    assert absent["quack"] == "package quack is not installed"
    assert measure(TINY, "cpu", [Contender("gone", who._nothing, "not here")], rounds=1) == []


def test_eager_contender_is_transformers_own_norm() -> None:
    llama = import_module("transformers.models.llama.modeling_llama")
    problem = draw(Cell.of(CPU_SHAPES[2], "bfloat16", VARIANTS[1]), "cpu", 1)
    module = llama.LlamaRMSNorm(problem.x.shape[-1], EPS).to(torch.bfloat16)
    module.weight.data = problem.weight
    norm = next(c for c in contenders("cpu") if c.name == "eager").prepare(
        problem.x, problem.weight, False
    )
    theirs = call_on(
        lambda x, w, r: torch.func.functional_call(module, {"weight": w}, x), problem, VARIANTS[1]
    )()
    assert different(theirs, call_on(norm, problem, VARIANTS[1])()) == []


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
    rows = {v.name: Cell("s", 10, 64, "bfloat16", v.name).traffic() for v in VARIANTS}
    weight = 2 * 64
    assert rows == {
        "forward": 2 * 1280 + weight,
        "forward+backward": 5 * 1280 + 3 * weight,
        "add forward": 4 * 1280 + weight,
        "add forward+backward": 8 * 1280 + 3 * weight,
    }
    assert input_sets("cpu", 100) == 1
    assert input_sets("cuda", 100) == 32 and input_sets("cuda", 10**9) == 1


def test_peak_memory_counts_what_lives_at_once() -> None:
    x = torch.randn(256, 1024)
    assert peak_bytes(lambda: x * 2, "cpu") == pytest.approx(2**20, rel=0.01)
    assert peak_bytes(lambda: (x * 2) + 1, "cpu") == pytest.approx(2**21, rel=0.01)
    assert peak_bytes(lambda: (x * 2).mul_(2).add_(1), "cpu") == pytest.approx(2**20, rel=0.01)


class FakeEvent:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A torch.cuda whose graphs do nothing; the list holds what was replayed and flushed."""
    log: list[str] = []
    graph = type("Graph", (), {"replay": lambda self: log.append("replay")})
    stream = type("Stream", (), {"wait_stream": lambda self, other: None})
    fakes = {
        "CUDAGraph": graph, "Stream": stream, "Event": FakeEvent, "current_stream": stream,
        "graph": lambda graph: nullcontext(), "stream": lambda stream: nullcontext(),
        "max_memory_allocated": lambda: 3 << 20, "memory_allocated": lambda: 1 << 20,
        "synchronize": lambda: None, "reset_peak_memory_stats": lambda: None,
        "_sleep": lambda cycles: None,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(timing, "Flush", lambda: lambda: log.append("flush"))
    monkeypatch.setattr(bench_measure, "draw", lambda cell, device, seed: draw(cell, "cpu", seed))
    copy = timing.Copy
    monkeypatch.setattr(bench_measure, "Copy", lambda size, device, sets: copy(size, "cpu", sets))
    return log


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gpu_timing_flushes_before_every_replay(variant: Any, fake_cuda: list[str]) -> None:
    cell = Cell.of(TINY_SHAPES[0], "bfloat16", variant)
    rows = measure(cell, "cuda", [contender("a", right), contender("b", right)], rounds=4)
    assert [set(row) for row in rows] == [ROW_KEYS] * 2
    assert all(row["rounds"] == 4 and row["peak_mib"] == 2.0 for row in rows)
    # two contenders and the copy; three rounds to warm up, four that count
    assert fake_cuda == ["flush", "replay"] * (3 * (3 + 4))


def test_checks_of_a_gpu_see_a_graph_that_does_nothing(fake_cuda: list[str]) -> None:
    assert "elements differ" in parity.graph_replay("eager", "cpu", TINY_SHAPES[0])
    assert parity.other_stream("eager", "cpu", TINY_SHAPES[0]) == "ok"
    assert parity.huge("eager", "cpu", 64, 32) == parity.layouts("eager", "cpu", TINY_SHAPES[1])


def test_large_shapes_are_held_to_the_same_bounds() -> None:
    few = parity.parity_on("eager", "cpu", "float32", "fp32", ("odd",))
    assert "dw float32: pooled over 37 elements" in few[-1]["error"]
    shapes = ("llama_1b_batch", "smollm2_135m_batch", "llama_8b_batch", "past_wide_limit")
    rows = parity.parity_on("eager", "cpu", "bfloat16", "gemma", shapes)
    assert {r["output"] for r in rows if "output" in r} == {"y", "dx", "dw"}
    assert re.search(r"dx .* gemma: element", rows[-1]["error"])


def test_rerun_comparison_sees_one_bit() -> None:
    run = run_of("eager", draw(Cell.of(TINY_SHAPES[1], "bfloat16", VARIANTS[3]), "cpu", 0))
    first, second = run(), run()
    assert different(first, second) == []
    second["dw"].view(torch.int16)[3] ^= 1
    assert different(first, second) == ["dw: 1 of 37 elements differ"]


def test_playback_clock_gives_back_the_samples() -> None:
    clock = Playback()
    clock.samples = iter([0.5, 0.25])
    assert [clock() for _ in range(4)] == [0.0, 0.5, 0.0, 0.25]


def test_pytest_cells_are_the_issues() -> None:
    forward = {(c.M, c.N, c.dtype) for c in cells(False) if c.variant == "forward"}
    if not torch.cuda.is_available():
        sizes = {(m, n) for m in (1, 16, 2048) for n in (576, 2048, 4096)}
        assert forward == {(m, n, d) for m, n in sizes for d in ("float32", "bfloat16")}
    assert len(cells(True)) == 4 * len(forward) > len(cells(False))


@pytest.mark.slow
def test_dry_run_walks_the_whole_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = gpu.main(["--out", str(tmp_path), "--dry-run", "--commit", "abc123"])
    printed = capsys.readouterr().out
    results = report.read(tmp_path / gpu.FILE)
    assert results["failed"] == results["skipped"] == []
    assert status == 0, printed
    assert results["schema"] == SCHEMA and results["commit"] == "abc123" and results["dry_run"]
    assert {"name", "cores", "isa", "python"} <= {*results["device"], *results["versions"]}
    backend = results["checks"][0]["backend"]
    by_result = {c["check"]: c["result"] for c in results["checks"]}
    assert by_result["probe wide with residual"] == by_result["past 2^31 elements"] == "ok"
    assert by_result["CUDA graph, tiny"] == "not run: needs a GPU"
    assert {r["output"] for r in results["parity"]} == {"y", "dx", "dw"}
    assert all(r["rho_eager"] <= 1.25 for r in results["parity"])
    expected = len(TINY_SHAPES) * len(VARIANTS) * len({"eager", "torch", backend})
    assert len(results["benchmarks"]) == expected
    assert all(row.keys() == ROW_KEYS for row in results["benchmarks"])
    assert {"with a Choice", "F.rms_norm"} <= {r["way"] for r in results["host"]}
    assert results["absent"]["compile"] == "left out of this run"
    assert printed.startswith("DRY RUN") and "worst cell: " in printed
    assert report.main([str(tmp_path / gpu.FILE)]) == 0
    assert capsys.readouterr().out == printed


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "never")]) == 2
    assert "no GPU here" in capsys.readouterr().err and not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--parts", "parity,speed"], r"\['speed'\] unknown; allowed: parity,bench,host"),
        (["--budget", "3"], "give more than 8 seconds"),
    ],
)
def test_bad_arguments(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:

    with pytest.raises(SystemExit) as stop:
        gpu.main(["--out", "x", *given])
    assert stop.value.code == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_hang_and_a_crash_cost_one_unit_each(tmp_path: Path) -> None:
    good = plan.probes("eager", "cpu")[0]
    huge: Unit = {
        **{"kind": "check", "name": "endless", "function": "reruns", "gpu_only": False},
        **{"arguments": {"shape": ["s", 64, 512], "times": 10**9}, "bytes": 0},
        **{"backend": "eager", "device": "cpu", "limit_s": 1},
    }
    crash = {**good, "backend": "no_such_backend"}
    units = [{**u, "id": i} for i, u in enumerate([huge, crash, good])]
    lane = Lane(tmp_path, units, deadline=float("inf"))
    rows: list[Any] = []
    lane.run(lambda unit, row: rows.append((unit["id"], row)))
    assert rows == [(2, {"check": good["name"], "backend": "eager", "result": "ok"})]
    assert [f["error"] for f in lane.failed] == ["no end after 1 s: stopped", "exit status 1"]
    assert "unknown backend 'no_such_backend'" in lane.failed[1]["stderr"]
    assert lane.skipped == []


def test_what_does_not_fit_is_skipped(tmp_path: Path) -> None:
    units = plan.probes("eager", "cpu")
    lane = Lane(tmp_path, units, deadline=0.0)
    lane.run(lambda unit, row: None)
    assert lane.skipped == units and lane.failed == []


def test_gpu_plan_covers_every_dtype_casting_and_shape() -> None:
    lanes = plan.parity_lanes("triton", "cuda", dry=False)
    seen = {(u["dtype"], u["casting"], u["shapes"] == "edges") for lane in lanes for u in lane}
    assert len(seen) == 3 * 3 * 2
    timed = plan.benchmarks("triton", "cuda", dry=False, broken=["wide"])
    assert {"llama_8b_train", "llama_8b_decode", "widest"} <= {u["shape"] for u in timed}
    assert [u["shape"] for u in timed if u["without"] == ["triton"]] == ["wide", "widest"]
    assert len({u["name"] for u in plan.checks("triton", "cuda", dry=False)}) == 10


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
    assert "| rows x columns | cpp | torch | liger | of copy | best peer / ours |" in text
    assert "| 3 x 64 | 2.0 | 5.0 | failed | 0.50 | 2.50 (torch) |" in text
    assert "commit c0ffee" in text
    (busy := results_of(1.0, 1.0))["device"]["load"] = 3.5
    assert report.summary(busy).startswith("BUSY MACHINE: load 3.5")
    assert "1.25x the time of torch; ours is the fastest in 0 of 1" in report.worst(
        results_of(2.5, 2.0)
    )
    assert "liger on tiny bfloat16 forward: gate: y is off" in report.summary(results_of(1.0, 1.0))


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
    everyone = contenders("cpu", compiled=False)
    monkeypatch.setattr(cpu, "contenders", lambda device: everyone)
    assert ROUNDS["cpu"] >= 15
    given = ["--out", str(tmp_path), "--rounds", "2", "--shapes", "smollm2_135m_decode"]
    assert cpu.main(given) == 0
    results = report.read(tmp_path / cpu.FILE)
    rows = results["benchmarks"]
    present = [c for c in everyone if not c.absent]
    assert len(rows) == 2 * len(VARIANTS) * len(present)
    assert all(row.keys() == ROW_KEYS and row["rounds"] == 2 for row in rows)
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
