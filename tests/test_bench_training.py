"""The training benchmark: contenders train alike, failures are rows, bad options are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import training


@pytest.mark.slow
@pytest.mark.multi
def test_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--dry-run", "--rounds", "1", "--steps", "2", "--length", "16", "--out", str(tmp_path)]
    assert training.main([*given, "--only", "sdpa,patch,own"]) == 0
    found = json.loads((tmp_path / "training.json").read_text())
    assert found["dry_run"] and found["device"]["kind"] == "cpu"
    first, *others = found["rows"]
    for row in others:
        assert row["tokens_per_s"] > 0
        assert row["losses"] == pytest.approx(first["losses"], abs=0.02)
    assert first["losses"][0] != first["losses"][2]
    text = capsys.readouterr().out
    assert "of sdpa's" in text and "1.00" in text


def test_a_contender_that_fails_is_a_row() -> None:
    answer = training._in_a_process({"contender": "sdpa"})
    assert "KeyError" in answer["error"]
    row = training._row("patch", [answer], 16)
    assert row == {"contender": "patch", "error": answer["error"]}
    assert "failed" in training.table([row])


def test_rows_and_table() -> None:
    answers = [
        {"losses": [4.0, 3.5], "seconds": [0.5, 1.0, 0.25], "peak_bytes": 2**21},
        {"losses": [4.0, 3.5], "seconds": [0.5], "peak_bytes": 2**20},
    ]
    row = training._row("sdpa", answers, 100)
    assert (row["tokens_per_s"], row["slowest"], row["fastest"]) == (200.0, 100.0, 400.0)
    assert row["peak_mib"] == 2.0
    faster = {**row, "contender": "patch", "tokens_per_s": 300.0}
    line = training.table([row, faster]).splitlines()[-1].split()
    assert line[:3] == ["patch", "300", "1.50"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--dry-run"], "--out DIR is needed"),
        (["--dry-run", "--out", "x", "--only", "ligre"], r"--only: ['ligre'] unknown"),
        (["--dry-run", "--out", "x", "--length", "1"], "--length 2 or more"),
        (["--dry-run", "--out", "x", "--model", "y"], "invalid choice"),
    ],
)
def test_refused_options(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        training.parse(given)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
