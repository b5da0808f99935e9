"""bench.hopper without a GPU: the dry run, and what decides which path ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import hopper, parity
from swathe.kernels.attention import paths

CELLS = {
    "heads_of_128": ("forward", 128),
    "llama_8b_train": ("forward", 128),
    "llama_1b_train": ("forward", 64),
    "llama_8b_decode_4k": ("decode", 128),
}


def rows(of_gluon: dict[str, float]) -> list[dict[str, Any]]:
    """Causal cells in which the portable path takes 100 us a pass, the other what is given."""
    found = []
    for shape, gluon in of_gluon.items():
        learns = CELLS[shape][0] == "forward"
        # a backward timed alone, which must not be taken for both passes
        passes = (("causal forward", 1), ("causal forward+backward", 3), ("causal backward", 9))
        for variant, share in passes:
            if variant.endswith("backward") and not learns:
                continue
            for backend, each in (("triton", 100.0), ("gluon", gluon), ("cudnn", 50.0)):
                row = {"shape": shape, "variant": variant, "dtype": "bfloat16", "ours": False}
                found.append({**row, "backend": backend, "median_us": share * each})
    return found


def results(of_gluon: dict[str, float], **more: Any) -> dict[str, Any]:
    tables: dict[str, Any] = {
        "failed": [],
        "skipped": [],
        "checks": [],
        "parity": [{"output": "o"}],
    }
    return {**tables, "benchmarks": rows(of_gluon), **more}


def test_the_faster_path_is_taken_where_it_is_faster_in_every_cell() -> None:
    given = {
        "heads_of_128": 80.0,
        "llama_8b_train": 70.0,
        "llama_1b_train": 99.5,
        "llama_8b_decode_4k": 120.0,
    }
    table, lines = hopper.decide(results(given))
    assert table == {
        ("forward", 128, 128): "gluon",
        ("backward", 128, 128): "gluon",
        ("forward", 64, 64): "portable",
        ("backward", 64, 64): "portable",
        ("decode", 128, 128): "portable",
    }
    by_pass = {(line[0], line[1]): line for line in lines}
    assert by_pass["forward", "128/128"][2:5] == ["2", "1.34", "1.25 to 1.43"]
    assert "under 1.02" in by_pass["forward", "64/64"][-1]


def test_one_cell_that_loses_decides() -> None:
    table, lines = hopper.decide(results({"heads_of_128": 40.0, "llama_8b_train": 110.0}))
    assert set(table.values()) == {"portable"}
    assert "0.91x in one cell" in lines[0][-1]


def test_a_backward_is_timed_without_its_forward() -> None:
    found = hopper.times(results({"heads_of_128": 80.0}))
    assert found["forward", 128, 128] == [(100.0, 80.0)]
    assert found["backward", 128, 128] == [(200.0, 160.0)]


def test_one_pass_is_set_beside_two_kernels() -> None:
    given = results({"heads_of_128": 150.0, "llama_8b_train": 120.0, "llama_1b_train": 90.0})
    assert [line[1:] for line in hopper.weigh(given)] == [
        ["64/64", "1", "0.90", "0.90 to 0.90"],
        ["128/128", "2", "1.34", "1.20 to 1.50"],
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"failed": [{"unit": {"name": "probe 128/128 causal", "kind": "probe"}, "error": "hung"}]},
        {"parity": [{"output": "dq", "error": "rho 3.0"}]},
        {"checks": [{"check": "100 reruns", "result": "rerun 3 of 100: dk"}]},
    ],
    ids=["hung", "inexact", "unsteady"],
)
def test_nothing_wrong_ships(wrong: dict[str, Any]) -> None:
    table, lines = hopper.decide(results({"heads_of_128": 50.0}, **wrong))
    assert set(table.values()) == {"portable"}
    assert "1 units are wrong" in lines[0][-1]


@pytest.mark.parametrize(
    "left", [{"parity": []}, {"skipped": [{"kind": "check"}]}], ids=["no parity", "no time"]
)
def test_nothing_ships_unproven(left: dict[str, Any]) -> None:
    table, lines = hopper.decide(results({"heads_of_128": 50.0}, **left))
    assert set(table.values()) == {"portable"} and "parity is not shown" in lines[0][-1]


def test_cells_that_found_no_time_do_not_decide() -> None:
    table, _ = hopper.decide(results({"heads_of_128": 50.0}, skipped=[{"kind": "bench"}]))
    assert table["forward", 128, 128] == "gluon"


def test_a_gate_that_gluon_misses_keeps_it_out() -> None:
    given = results({"heads_of_128": 50.0})
    given["benchmarks"].append(
        {
            "shape": "llama_1b_train",
            "variant": "causal forward",
            "dtype": "bfloat16",
            "backend": "gluon",
            "error": "gate: o is off",
        }
    )
    assert set(hopper.decide(given)[0].values()) == {"portable"}


def test_needs_a_hopper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hopper.main(["--out", str(tmp_path)]) == 2
    assert "no Hopper GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given", [["--parts", "speed"], ["--budget", "3"], ["--fused", "--install"]], ids=str
)
def test_the_command_line_is_checked(given: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        hopper.main(["--out", str(tmp_path), *given])


@pytest.mark.slow
def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--out", str(tmp_path), "--dry-run", "--parts", "bench"]
    assert hopper.main(given) == 0, capsys.readouterr().out
    assert paths.read(tmp_path / "paths.json") == {}
    assert "nothing was timed on both" in capsys.readouterr().out


@pytest.mark.slow
def test_dry_run_of_one_pass_decides_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--out", str(tmp_path), "--dry-run", "--parts", "bench", "--fused"]
    assert hopper.main(given) == 0, capsys.readouterr().out
    assert not (tmp_path / "paths.json").exists()
    assert "gluon/gluon_fused" in capsys.readouterr().out


def test_filled_memory_does_not_forbid_the_path_under_test(monkeypatch: pytest.MonkeyPatch) -> None:
    for path, filled in (("gluon", True), ("gluon_fused", False)):
        monkeypatch.setenv(paths.VARIABLE, path)
        with parity.poisoned():
            assert torch.are_deterministic_algorithms_enabled() == filled
    assert not torch.are_deterministic_algorithms_enabled()
