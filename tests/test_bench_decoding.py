"""The decoding benchmark: every contender makes its tokens, figures, refused options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import decoding
from bench.models import cache_bytes, counts, shape_of

SHAPE = shape_of("qwen3_0.6b", tiny=True)
FACTS = {"shape": SHAPE, "batch": 2, "length": 10, "new": 4, "dtype": "bfloat16"}


@pytest.mark.slow
@pytest.mark.multi
def test_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--dry-run", "--rounds", "2", "--length", "12", "--new", "3", "--batch", "2"]
    given += ["--models", "gemma3_1b", "--only", "sdpa,patch,own", "--out", str(tmp_path)]
    assert decoding.main(given) == 0
    found = json.loads((tmp_path / "decoding.json").read_text())
    assert found["dry_run"] and {row["new"] for row in found["rows"]} == {3}
    first, *others = found["rows"]
    for row in others:
        assert 0 < row["slowest"] <= row["tokens_per_s"] <= row["fastest"]
        assert len(row["rounds"]) == 2 and len(row["token_us"]) == 2 * 2
        assert row["loss"] == pytest.approx(first["loss"], abs=0.02)
        assert row["first_token_s"] > 0 and row["bytes_a_step"] == first["bytes_a_step"]
    assert "decoding: gemma3_1b" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sdpa", "own"])
def test_a_speaker_in_this_process(name: str) -> None:
    speaker = decoding.Speaker()
    built = speaker.build(**FACTS, contender=name, device="cpu")
    assert built["first_s"] > 0 and built["loss"] == pytest.approx(4.85, abs=0.1)
    found = speaker.measure()
    assert len(found["seconds"]) == 3 and found["first_token_s"] > 0
    assert found["peak_bytes"] > 50 << 20


def test_figures() -> None:
    answers = [
        {"seconds": [0.1, 0.3], "first_token_s": 0.5, "peak_bytes": 2**21},
        {"seconds": [0.4, 0.4], "first_token_s": 0.7, "peak_bytes": 2**20},
        {"seconds": [0.1, 0.1], "first_token_s": 0.9, "peak_bytes": 2**20},
    ]
    built = {"first_s": 7.0, "loss": 4.0}
    ceiling = {"read_gbps": 2e-3, "copy_gbps": 1e-3}
    row = decoding.figures(FACTS, built, answers, ceiling)
    assert (row["tokens_per_s"], row["slowest"], row["fastest"]) == (10.0, 5.0, 20.0)
    assert row["rounds"] == [10.0, 5.0, 20.0] and row["first_token_s"] == 0.7
    read = 2 * counts(SHAPE).read + cache_bytes(SHAPE, 2, 12, 2)
    assert row["bytes_a_step"] == read
    assert row["of_memory"] == pytest.approx(read * 5.0 / 2e6, rel=1e-2)
    assert decoding.cells(row)[1:] == ["700.0", "7.0", "2"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--dry-run", "--out", "x", "--new", "1"], "--new 1: give two or more"),
        (["--dry-run", "--out", "x", "--only", "a,b"], r"--only: ['a', 'b'] unknown"),
    ],
)
def test_refused_options(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        decoding.main(given)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
