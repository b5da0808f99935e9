"""The training benchmark: contenders train alike, figures, refused options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import report, training
from bench.models import shape_of, training_flops

FACTS = {"shape": shape_of("llama_1b", tiny=True), "batch": 2, "length": 50}


@pytest.mark.slow
@pytest.mark.multi
def test_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--dry-run", "--rounds", "1", "--steps", "2", "--length", "16", "--out", str(tmp_path)]
    assert training.main([*given, "--only", "sdpa,patch,own"]) == 0
    found = json.loads((tmp_path / "training.json").read_text())
    assert found["dry_run"] and found["device"]["kind"] == "cpu"
    first, *others = found["rows"]
    for row in others:
        assert row["tokens_per_s"] > 0 and row["peak_mib"] > 50 and row["first_s"] > 0
        assert row["losses"] == pytest.approx(first["losses"], abs=0.02)
    assert first["losses"][0] != first["losses"][2]
    text = capsys.readouterr().out
    assert "of sdpa's" in text and "1.00" in text
    assert report.main([str(tmp_path / "training.json")]) == 0
    assert capsys.readouterr().out == text
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "training.json"), "--markdown"])
    assert "whose table is text" in capsys.readouterr().err


def test_figures() -> None:
    answers = [
        {"seconds": [0.5, 1.0, 0.25], "peak_bytes": 2**21},
        {"seconds": [0.5], "peak_bytes": 2**20},
    ]
    built = {"first_s": 7.0, "loss": 4.0, "losses": [4.0, 3.5, 3.0]}
    row = training.figures(FACTS, built, answers, {"product_tflops": 1e-6})
    assert (row["tokens_per_s"], row["slowest"], row["fastest"]) == (200.0, 100.0, 400.0)
    assert row["rounds"] == [200.0, 200.0]
    assert row["peak_mib"] == 2.0 and row["first_s"] == 7.0
    assert row["flops"] == training_flops(FACTS["shape"], 2, 50)
    assert row["of_product"] == pytest.approx(row["flops"] / 0.5 / 1e6, rel=1e-2)
    assert training.cells(row)[1:] == ["7.0", "2", "4.000 3.500 3.000"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--dry-run"], "--out DIR is needed"),
        (["--dry-run", "--out", "x", "--only", "ligre"], r"--only: ['ligre'] unknown"),
        (["--dry-run", "--out", "x", "--length", "1"], "--length 2 or more"),
        (["--dry-run", "--out", "x", "--models", "y"], "--models: ['y'] unknown; allowed: ['smol"),
        (["--dry-run", "--out", "x", "--steps", "0"], "--steps 0: give one or more"),
        (["--dry-run", "--out", "x", "--device", "cuda"], "a dry run is on the CPU"),
    ],
)
def test_refused_options(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        training.main(given)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_without_a_gpu_a_cpu_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        training.main(["--out", "x"])
    assert "no GPU here; --device cpu measures a CPU" in capsys.readouterr().err
