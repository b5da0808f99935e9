"""Turns of whole models: order, failures, memory and time as rows; processes that answer."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest

from bench import remote, turns
from bench.ceilings import ceilings
from bench.model_contenders import ModelContender
from bench.remote import Remote, RemoteFailed
from bench.turns import OVER, Row, Task, Turns, fine, printed, table

FACTS: Row = {
    "model": "some", "shape": {}, "batch": 1, "length": 8, "dtype": "bfloat16", "device": "cpu"
}  # fmt: skip


def figures(facts: Row, built: Row, answers: list[Row], ceiling: Row) -> Row:
    rates = [answer["rate"] for answer in answers]
    median = sorted(rates)[len(rates) // 2]
    return {"tokens_per_s": median, "slowest": min(rates), "fastest": max(rates)}


TASK = Task(
    "some_task",
    {
        "eager": ModelContender("eager"),
        "sdpa": ModelContender("sdpa"),
        "compile": ModelContender("sdpa", compiles=True),
        "gone": ModelContender("sdpa", absent=lambda: "package gone is not installed"),
        "own": ModelContender("sdpa", ours=True),
    },
    worker=dict,
    figures=figures,
    columns=("fastest",),
    cells=lambda row: [f"{row['fastest']:.0f}"],
    training=True,
)


class Fake:
    """A Remote that answers at once, or fails as told."""

    log: list[str]
    fails: dict[str, str]
    losses: dict[str, float]

    def __init__(self, name: str, module: str, *arguments: str, errors: Path) -> None:
        assert (module, arguments) == ("bench.some_task", ("--serve",))
        self.name = name
        self.log.append(f"open {name}")

    def ask(self, do: str, limit_s: float, **facts: Any) -> Row:
        assert facts["contender"] == self.name and 0 < limit_s <= 7.0
        self.log.append(f"{do} {self.name}")
        if self.fails.get(self.name) == do:
            raise RemoteFailed(f"{self.name} ended with status 1: out of memory")
        return {"loss": self.losses.get(self.name, 4.0), "rate": float(len(self.log))}

    def close(self) -> None:
        self.log.append(f"close {self.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    Fake.log, Fake.fails, Fake.losses = [], {}, {}
    monkeypatch.setattr(turns, "Remote", Fake)
    monkeypatch.setattr(turns.models, "bytes_free", lambda device: 100 << 30)
    sizes = {True: 200 << 30, False: 2 << 30}
    monkeypatch.setattr(turns.models, "bytes_needed", lambda *_, scores, **__: sizes[scores])
    return Fake.log


def rows_of(*names: str, rounds: int = 2, **options: Any) -> dict[str, Row]:
    rows = Turns(TASK, FACTS, names, limit_s=7.0, **options).run(rounds, {})
    return {row["contender"]: row for row in rows}


def test_rounds_rotate_and_processes_live_through_them(log: list[str]) -> None:
    rows = rows_of("sdpa", "compile", "own")
    opened, built = log[:3], [line for line in log if line.startswith("build")]
    assert opened == ["open sdpa", "open compile", "open own"] and len(built) == 3
    measured = [line.split()[1] for line in log if line.startswith("measure")]
    assert measured == ["sdpa", "compile", "own", "compile", "own", "sdpa"]
    assert log[-3:] == ["close sdpa", "close compile", "close own"]
    assert rows["own"]["ours"] and not rows["sdpa"]["ours"]
    assert rows["sdpa"]["slowest"] < rows["sdpa"]["fastest"]


def test_without_room_for_all_each_has_it_to_itself(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns.models, "bytes_needed", lambda *_, **__: 60 << 30)
    rows_of("sdpa", "own")
    one = [["open", "build", "measure", "close"]] * 4
    assert [line.split()[0] for line in log[:16]] == [do for each in one for do in each]
    assert [line.split()[1] for line in log[:16:4]] == ["sdpa", "own", "own", "sdpa"]


def test_who_is_absent_or_does_not_fit_is_a_row(log: list[str]) -> None:
    rows = rows_of("eager", "sdpa", "gone")
    assert rows["gone"]["error"] == "not here: package gone is not installed"
    assert rows["eager"]["error"] == "does not fit: needs about 214.7 GB, 107.4 are free"
    assert "error" not in rows["sdpa"] and all(fine(row) for row in rows.values())
    assert not any("gone" in line or "eager" in line for line in log)


@pytest.mark.parametrize("do", ["build", "measure"])
def test_a_failure_costs_one_row(log: list[str], do: str) -> None:
    Fake.fails = {"compile": do}
    rows = rows_of("sdpa", "compile", "own")
    assert rows["compile"]["error"] == "ended with status 1: out of memory"
    assert not fine(rows["compile"]) and fine(rows["own"]) and fine(rows["sdpa"])
    assert log.count("build compile") == 1


def test_other_work_is_refused(log: list[str]) -> None:
    Fake.losses = {"own": 4.2, "compile": 4.05}
    rows = rows_of("sdpa", "compile", "own")
    assert rows["own"]["error"] == "gate: first loss 4.2000, expected 4.0000"
    assert "error" not in rows["compile"] and not fine(rows["own"])


def test_what_does_not_fit_into_the_time(log: list[str]) -> None:
    rows = rows_of("sdpa", "own", deadline=time.monotonic() - 1)
    assert {row["error"] for row in rows.values()} == {OVER}
    assert all(fine(row) for row in rows.values())


def test_rounds_until_the_deadline_count(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0, 3.0, *[11.0] * 9])
    monkeypatch.setattr(turns.time, "monotonic", lambda: next(clock))
    rows = rows_of("sdpa", "own", rounds=3, deadline=10.0)
    assert rows["sdpa"]["slowest"] == rows["sdpa"]["fastest"]
    assert "error" not in rows["own"]


def test_tables_say_who_did_not_run() -> None:
    sdpa = {"model": "some", "contender": "sdpa", "tokens_per_s": 200.0, "slowest": 100.0}
    sdpa |= {"fastest": 400.0}
    own = {**sdpa, "contender": "own", "tokens_per_s": 300.0}
    gone = {"model": "some", "contender": "gone", "error": "not here: nowhere"}
    lines = table(TASK, [own, sdpa, gone]).splitlines()
    assert lines[0].split() == ["contender", "tokens/s", "of", "sdpa's", "range", "fastest"]
    assert lines[1].split() == ["own", "300.0", "1.50", "100.0", "to", "400.0", "400"]
    assert lines[-1] == "gone: not here: nowhere"
    assert table(TASK, [gone]) == "gone: not here: nowhere"
    results = {"rows": [sdpa, gone], "dry_run": True, "skipped": ["other"]}
    text = printed(TASK, results)
    assert text.startswith("DRY RUN") and "some_task: some\n" in text
    assert text.endswith("skipped, for time: other")
    assert turns.usual(TASK, dry=True) == ["eager", "sdpa", "gone", "own"]
    assert turns.usual(TASK, dry=False) == [*TASK.contenders]


def test_serving() -> None:
    class Adding:
        def add(self, a: int, b: int) -> Row:
            return {"sum": a + b}

    replies = io.StringIO()
    requests = [json.dumps({"do": "add", "a": a, "b": 2}) for a in (1, 5)]
    remote.serve(Adding(), requests, replies)
    assert [json.loads(line) for line in replies.getvalue().splitlines()] == [
        {"sum": 3},
        {"sum": 7},
    ]


def test_ceilings() -> None:
    found = ceilings("cpu", "float32", dry=True)
    assert found.keys() == {"read_gbps", "copy_gbps", "product_tflops"}
    assert all(value > 0 for value in found.values())


@pytest.mark.multi
@pytest.mark.parametrize(
    ("module", "limit_s", "said"),
    [
        ("bench.no_such_module", 60.0, r"^it ended with status 1: .*No module named"),
        ("http.server", 0.0, r"^it took longer than 0 s$"),
    ],
)
def test_a_process_that_fails(module: str, limit_s: float, said: str, tmp_path: Path) -> None:
    one = Remote("it", module, errors=tmp_path / "errors.txt")
    try:
        with pytest.raises(RemoteFailed, match=said):
            one.ask("anything", limit_s)
    finally:
        one.close()
    assert one.process.poll() is not None
