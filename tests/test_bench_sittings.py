"""The band for another run: Student's t, and how often two made-up runs agree within it."""

from __future__ import annotations

import random
import statistics

import pytest

from bench.sittings import expected, student


@pytest.mark.parametrize(
    ("freedom", "confidence", "t"),
    [
        (1, 0.95, 12.7062),
        (2, 0.95, 4.3027),
        (4, 0.95, 2.7764),
        (9, 0.99, 3.2498),
        (24, 0.95, 2.0639),
        (200, 0.95, 1.9719),
    ],
)
def test_students_t(freedom: int, confidence: float, t: float) -> None:
    assert student(freedom, confidence) == pytest.approx(t, abs=1e-4)


def run(draw: random.Random, between: float, within: float, outliers: float) -> list[float]:
    """Medians of five sittings of seven rounds."""
    medians = []
    for _ in range(5):
        level = 100.0 * draw.lognormvariate(0.0, between)
        rounds = [
            level * draw.lognormvariate(0.0, within) * (1.5 if draw.random() < outliers else 1.0)
            for _ in range(7)
        ]
        medians.append(statistics.median(rounds))
    return medians


@pytest.mark.parametrize(
    ("between", "within", "outliers"),
    [(0.0, 0.01, 0.0), (0.02, 0.01, 0.0), (0.02, 0.01, 0.1), (0.0, 0.03, 0.1)],
)
def test_two_runs_agree_in_95_of_100_cells(between: float, within: float, outliers: float) -> None:
    draw, agree, cells = random.Random(1), 0, 2000
    for _ in range(cells):
        band = expected(run(draw, between, within, outliers))
        assert band is not None
        other = statistics.geometric_mean(run(draw, between, within, outliers))
        agree += band[0] <= other <= band[1]
    assert 0.93 < agree / cells < 0.985


def test_one_sitting_promises_nothing() -> None:
    assert expected([5.0]) is None
    assert expected([5.0, 5.0]) == pytest.approx((5.0, 5.0))
    low, high = expected([4.0, 5.0, 6.0]) or (0.0, 0.0)
    assert 0 < low < 4.0 and high > 6.0
