"""Bands hold what they promise under heavy-tailed noise, and comparisons say what moved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import compare
from bench.readme import RESULTS
from bench.report import read
from bench.spread import CONFIDENCE, band, rank

Samples = Callable[[np.random.Generator, int], np.ndarray]

# noise of a sample, as a factor: Pareto's tail has no variance, Student's is heavy on both sides
NOISES: dict[str, Samples] = {
    "pareto": lambda draw, n: 1 + 0.1 * draw.pareto(1.5, n),
    "student": lambda draw, n: np.exp(0.05 * draw.standard_t(2, n)),
    "two speeds": lambda draw, n: np.where(draw.random(n) < 0.4, 1.0, 1.3) * (1 + draw.random(n)),
}


PAIRS = 20
# three standard errors of a share of 95 % over so many cells, whose pairs share the peers' factor
LEAST = 0.95 - 3 * math.sqrt(0.05 * 0.95 * (1 / (72 * PAIRS) + 1 / (216 * PAIRS)))


@pytest.mark.parametrize("n", [1, 2, 5, 6, 9, 15, 40, 101])
def test_rank_is_the_largest_that_keeps_the_promise(n: int) -> None:
    def held(k: int) -> float:
        return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n

    k, probability = rank(n)
    assert probability == pytest.approx(held(k))
    assert 1 <= k <= (n + 1) // 2
    assert k == 1 or probability >= CONFIDENCE
    assert held(k + 1) < CONFIDENCE
    assert rank(9) == (2, pytest.approx(0.9609375)) and rank(15)[0] == 4 and rank(40)[0] == 14


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("n", [9, 15])
def test_a_band_holds_the_true_median(noise: str, n: int) -> None:
    draw, of = np.random.default_rng(1), NOISES[noise]
    truth = float(np.median(of(draw, 400_001)))
    bands = [band([*of(draw, n)]) for _ in range(4000)]
    held = sum(low <= truth <= high for low, high in bands) / len(bands)
    # four standard errors of the simulation below what was computed
    assert held > rank(n)[1] - 4 * math.sqrt(0.05 * 0.95 / 4000)
    assert held < 0.995, "a band that always holds says nothing"


def test_band_of_outliers_and_of_nothing() -> None:
    assert band([5.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 1e9]) == (2.0, 8.0)
    assert band([3.0]) == (3.0, 3.0)
    with pytest.raises(ValueError, match="one sample or more, got 0"):
        band([])


def run_of(
    draw: np.random.Generator,
    noise: Samples,
    *,
    rounds: int = 9,
    between: float = 0.0,
    slower: float = 1.0,
    peers: int = 3,
) -> dict[str, Any]:
    """A synthetic run of 72 cells; every contender's cell is off by `between` as a whole."""
    rows = []
    for cell in range(72):
        for backend in ("cpp", "eager", "torch", "compile")[: 1 + peers]:
            true = 10.0 * 1.1**cell * (slower if backend == "cpp" and cell % 8 == 0 else 1.0)
            samples = true * math.exp(between * draw.standard_t(3)) * noise(draw, rounds)
            facts = {"shape": f"s{cell}", "size": f"{cell} x 8", "dtype": "float32"}
            rows.append(
                {
                    **facts,
                    "variant": "forward",
                    "backend": backend,
                    "ours": backend == "cpp",
                    "median_us": float(np.median(samples)),
                    "samples_us": samples.tolist(),
                    "traffic_bytes": 1000 + cell,
                    "copy_gbps": 40.0,
                }
            )
    device = {"kind": "cpu", "name": "X", "cores": 2, "threads": 2, "load": 0.1, "isa": "avx2"}
    facts = {"schema": 2, "op": "rms_norm", "date": "2026-01-01", "commit": "c0ffee"}
    return {**facts, "device": device, "versions": {"torch": "1"}, "benchmarks": rows}


def share_of(verdict: str, **facts: Any) -> float:
    """Of our cells, over PAIRS of equal runs."""
    draw, noise, peers = np.random.default_rng(2), NOISES[facts.pop("noise")], facts.pop("control")
    found = [
        cell.verdict
        for _ in range(PAIRS)
        for cell in compare.cells(
            run_of(draw, noise, **facts), run_of(draw, noise, **facts), peers=peers
        )
        if cell.before["ours"]
    ]
    assert len(found) == PAIRS * 72
    return found.count(verdict) / len(found)


@pytest.mark.parametrize("noise", NOISES)
def test_equal_runs_stay_within_the_bands(noise: str) -> None:
    """By samples alone where runs do not differ as wholes, by the peers' moves where they do."""
    assert share_of(compare.SAME, noise=noise, control=False) > 0.97
    for between in (0.0, 0.3):
        assert share_of(compare.SAME, noise=noise, control=True, between=between) >= LEAST
    # what the peers are needed for
    assert share_of(compare.SAME, noise=noise, control=False, between=0.5) < 0.9


def test_what_moved_is_found() -> None:
    draw, noise = np.random.default_rng(3), NOISES["pareto"]
    before, after = run_of(draw, noise, between=0.02), run_of(draw, noise, between=0.02, slower=2.0)
    found = {c.before["shape"]: c for c in compare.cells(before, after) if c.before["ours"]}
    slower = {shape for shape, cell in found.items() if cell.verdict == compare.SLOWER}
    changed = {f"s{i}" for i in range(0, 72, 8)}
    assert len(changed & slower) >= 8 and len(slower - changed) <= 4
    back = [c for c in compare.cells(after, before) if c.before["ours"]]
    assert {c.before["shape"] for c in back if c.verdict == compare.FASTER} == slower
    sizes = [c.before["traffic_bytes"] for c in compare.cells(before, after)]
    assert sizes == sorted(sizes)


def test_the_committed_results_compare_with_themselves() -> None:
    for file in RESULTS.glob("[!d]*.json"):
        results = read(file)
        found = compare.cells(results, results)
        assert found and {cell.verdict for cell in found} == {compare.SAME}
        assert all(cell.low <= 1 == cell.ratio <= cell.high for cell in found)


def written(folder: Path, **changed: dict[str, Any]) -> list[str]:
    files = []
    for name, results in changed.items():
        files.append(str(folder / f"{name}.json"))
        Path(files[-1]).write_text(json.dumps(results))
    return files


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw, noise = np.random.default_rng(4), NOISES["student"]
    before, after = run_of(draw, noise), run_of(draw, noise, slower=3.0)
    broken = after["benchmarks"][4]
    after["benchmarks"][4] = {
        k: broken[k] for k in ("shape", "dtype", "variant", "backend", "ours")
    }
    after["benchmarks"][4]["error"] = "gate: y is off"
    for row in after["benchmarks"]:
        row["copy_gbps"] = 50.0
    after["device"]["load"], after["versions"]["torch"] = 3.0, "2"
    files = written(tmp_path, before=before, after=after)
    assert compare.main(files) == 0
    out = capsys.readouterr().out
    assert out.count("slower\n") >= 9 and out.count("broken\n") == 1 and "torch  " not in out
    assert "copy, GB/s      40     50            1.25" in out
    assert "1 broken of 72 cells" in out and "peers: " in out
    assert "versions differ, and peers with them: torch 1 and 2" in out
    assert "after: load 3.0 when it began: BUSY" in out
    assert compare.main([*files, "--fail"]) == 1
    assert compare.main([files[0], files[0], "--fail", "--all", "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "| 0 x 8 | float32 | forward | torch |" in out and "| 1.00 |" in out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"op": "rotary"}, "different ops, rms_norm and rotary; --across op"),
        ({"schema": 3}, "different schemas, 2 and 3; --across schema"),
        ({"device": {"name": "Y"}}, "different machines, .*--across machine"),
        ({"dry_run": True}, "the second is of a dry run"),
        ({"benchmarks": []}, "no cell was timed in both"),
    ],
)
def test_what_does_not_compare_is_refused(
    change: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw, noise = np.random.default_rng(5), NOISES["student"]
    before = run_of(draw, noise)
    changed = {**before, **change}
    changed["device"] = {**before["device"], **changed["device"]}
    files = written(tmp_path, before=before, after=changed)
    assert compare.main(files) == 2
    error = capsys.readouterr().err
    assert said.split(",")[0] in error
    if "--across" in said:
        assert compare.main([*files, "--across", "op,machine,schema"]) == 0
    for wrong in (["--across", "luck"], ["--confidence", "1"]):
        with pytest.raises(SystemExit):
            compare.main([*files, *wrong])
    assert compare.main([files[0], str(tmp_path / "missing.json")]) == 2
