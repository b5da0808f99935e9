"""The band for another run: Student's t, and how often two made-up runs agree within it."""

from __future__ import annotations

import random
import statistics

import pytest

from bench.sittings import change, expected, student


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
    draw, agree, unchanged, cells = random.Random(1), 0, 0, 2000
    for _ in range(cells):
        one, other = (run(draw, between, within, outliers) for _ in range(2))
        low, high = expected(one) or (0.0, 0.0)
        agree += low <= statistics.geometric_mean(other) <= high
        low, high = change(one, other) or (0.0, 0.0)
        unchanged += low <= 1.0 <= high
    assert 0.93 < agree / cells < 0.985 and 0.93 < unchanged / cells < 0.99


def test_a_change_beyond_the_noise_is_seen() -> None:
    before, after = [100.0, 101.0, 99.0], [120.0, 121.2, 118.8]
    low, high = change(before, after) or (0.0, 0.0)
    assert 1.1 < low < 1.2 < high < 1.3
    assert change(before, [120.0]) is None and change([], after) is None


def test_one_sitting_promises_nothing() -> None:
    assert expected([5.0]) is None
    assert expected([5.0, 5.0]) == pytest.approx((5.0, 5.0))
    low, high = expected([4.0, 5.0, 6.0]) or (0.0, 0.0)
    assert 0 < low < 4.0 and high > 6.0
