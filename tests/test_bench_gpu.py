"""bench.gpu without a GPU: dry run, plan, timing on a fake torch.cuda, what failures cost."""

from __future__ import annotations

import re
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import gpu, parity, plan, report, timing
from bench import measure as bench_measure
from bench.cases import Cell, draw
from bench.contenders import Contender, contenders
from bench.lanes import Lane, Unit
from bench.measure import measure, row_keys
from bench.models import MODELS, shape_of
from bench.record import SCHEMA
from bench.subject import OPS, subject
from swathe.kernels.norm import eager
from swathe.kernels.norm.contract import EPS

NORM = subject("rms_norm")
VARIANTS = NORM.variants


def right(x: Tensor, weight: Tensor, residual: Tensor | None = None, **_: Any) -> Any:
    return eager.rms_norm(x, weight, EPS, 0.0, "llama", residual)


def contender(name: str) -> Contender:
    return Contender(name, lambda problem: right)


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
        "graph": lambda graph, stream=None: nullcontext(), "stream": lambda stream: nullcontext(),
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
    cell = Cell.of("rms_norm", NORM.tiny[0], "bfloat16", variant)
    rows = measure(cell, "cuda", [contender("a"), contender("b")], rounds=4)
    assert [set(row) for row in rows] == [row_keys(NORM)] * 2
    assert all(row["rounds"] == 4 and row["peak_mib"] == 2.0 for row in rows)
    # two contenders and the copy; three rounds to warm up, four that count
    assert fake_cuda == ["flush", "replay"] * (3 * (3 + 4))


@pytest.mark.parametrize("op", OPS)
def test_checks_of_a_gpu_see_a_graph_that_does_nothing(op: str, fake_cuda: list[str]) -> None:
    of = subject(op)
    where = (of, "eager", "cpu", of.tiny[1], True)
    assert "elements differ" in parity.graph_replay(*where)
    assert parity.other_stream(*where) == parity.layouts(*where) == "ok"
    assert of.huge is None or of.huge("eager", "cpu", True) == "ok"


def test_large_shapes_are_held_to_the_same_bounds() -> None:
    few = parity.parity_on("rms_norm", "eager", "cpu", "float32", ["llama_1b_batch"])
    assert "dweight float32: pooled over 2048 elements" in few[-1]["error"]
    shapes = ["llama_1b_batch", "llama_1b_batch", "llama_8b_batch", "llama_8b_batch"]
    rows = parity.parity_on("rms_norm", "eager", "cpu", "bfloat16", [*shapes, *shapes])
    assert {r["output"] for r in rows if "output" in r} == {"dx", "dweight", "h", "dresidual"}
    assert re.search(r"dx .*: element", rows[-1]["error"])


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_dry_run_walks_the_whole_plan(
    op: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--out", str(tmp_path), "--dry-run", "--commit", "abc123", "--ops", op]
    given += ["--parts", "parity,bench,host"]
    status = gpu.main(given)
    printed = capsys.readouterr().out
    results, of = report.read(tmp_path / f"{op}.json"), subject(op)
    assert results["failed"] == results["skipped"] == []
    assert status == 0, printed
    assert results["schema"] == SCHEMA and results["commit"] == "abc123" and results["dry_run"]
    assert {"name", "cores", "isa", "python"} <= {*results["device"], *results["versions"]}
    by_result = {c["check"]: c["result"] for c in results["checks"]}
    more = len(of.more) + (of.huge is not None)
    assert len(by_result) == len(of.probes) * len(of.forms) + 5 + more
    assert by_result["CUDA graph, tiny"] == "not run: needs a GPU"
    assert set(by_result.values()) == {"ok", "not run: needs a GPU"}
    assert results["parity"] and all(r["rho_eager"] <= 1.25 for r in results["parity"])
    present = [c for c in contenders(of, "cpu", compiled=False) if not c.absent]
    assert len(results["benchmarks"]) == len(of.tiny) * len(of.variants) * len(present)
    served = [row for row in results["benchmarks"] if "error" not in row]
    assert served and all(row.keys() == row_keys(of) for row in served)
    unserved = [row["error"] for row in results["benchmarks"] if "error" in row]
    assert all(error.startswith("NotImplementedError: ") for error in unserved)
    assert {"with a Choice", "eager"} <= {r["way"] for r in results["host"]}
    assert results["absent"]["compile"] == "left out of this run"
    assert printed.startswith("DRY RUN") and "worst cell: " in printed
    assert report.main([str(tmp_path / f"{op}.json")]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.slow
@pytest.mark.multi
def test_dry_run_of_whole_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--out", str(tmp_path), "--dry-run", "--commit", "abc123", "--parts", "models"]
    assert gpu.main(given) == 0
    printed = capsys.readouterr().out
    for task in ("decoding", "training"):
        results = report.read(tmp_path / f"{task}.json")
        rows = {row["contender"]: row for row in results["rows"]}
        assert {"eager", "sdpa", "patch", "own"} <= {n for n in rows if "error" not in rows[n]}
        assert results["skipped"] == [] and f"{task}: llama_1b" in printed
    assert not list(tmp_path.glob("rms_norm*"))


def test_whole_models_end_with_the_budget(tmp_path: Path) -> None:
    assert gpu.whole_models(tmp_path, True, time.monotonic() - 1, "abc123")
    results = report.read(tmp_path / "training.json")
    assert results["rows"] == [] and results["skipped"] == ["llama_1b"]


def test_plan_of_whole_models_is_of_known_ones() -> None:
    units = plan.whole_models(dry=False)
    assert [u["task"] for u in units[:2]] == ["decoding", "training"]
    assert {u["model"] for u in units} == {*MODELS} and len(units) == 2 * len(MODELS)
    assert all(shape_of(u["model"])["max_position_embeddings"] >= u["length"] for u in units)


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
        (["--ops", "rmsnorm"], r"\['rmsnorm'\] unknown; allowed: rms_norm"),
        (["--budget", "3"], "give more than 8 seconds"),
    ],
)
def test_bad_arguments(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:

    with pytest.raises(SystemExit) as stop:
        gpu.main(["--out", "x", *given])
    assert stop.value.code == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_hang_and_a_crash_cost_one_unit_each(tmp_path: Path) -> None:
    good = plan.probes(NORM, "eager", "cpu")[0]
    huge: Unit = {
        **{"kind": "check", "op": "rms_norm", "name": "endless", "check": "100 reruns"},
        **{"shape": "llama_8b_train", "dry": False, "gpu_only": False, "bytes": 0},
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
    units = plan.probes(NORM, "eager", "cpu")
    lane = Lane(tmp_path, units, deadline=0.0)
    lane.run(lambda unit, row: None)
    assert lane.skipped == units and lane.failed == []


@pytest.mark.parametrize("op", OPS)
def test_gpu_plan_covers_every_dtype_group_and_shape(op: str) -> None:
    of = subject(op)
    lanes = plan.parity_lanes(of, "triton", "cuda", dry=False)
    groups = len(parity.groups(of.contract))
    assert sum(len(lane) for lane in lanes) == 3 * (groups + 1)
    timed = plan.benchmarks(of, "triton", "cuda", dry=False, broken=[])
    assert {u["shape"] for u in timed} == {s.name for s in of.gpu}
    assert not any(u["without"] for u in timed)
    broken = plan.benchmarks(of, "triton", "cuda", dry=False, broken=list(of.probes))
    assert all(u["without"] == ["triton"] for u in broken)
    checks = plan.checks(of, "triton", "cuda", dry=False)
    names = {u["name"] for u in checks}
    more = len(of.more) + (of.huge is not None)
    assert len(names) == len(checks) == 5 * len(of.checked) + more
    for name in (*of.second_look, *of.host):
        assert of.shape(name) in of.gpu
    wide = plan.benchmarks(NORM, "triton", "cuda", dry=False, broken=["wide"])
    assert [u["shape"] for u in wide if u["without"]] == ["wide", "widest"]
