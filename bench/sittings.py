"""Where another run's median is to be expected, from the medians of sittings that lay apart.

Rounds of one sitting share what a minute does to a machine and where memory lies, so that any band
from them alone is too narrow: of two runs whose sittings vary by 2 % and rounds by 1 %, 20 % agree
within it. Medians of k sittings with other inputs minutes apart vary as runs do. With m the mean of
their logarithms and s the standard deviation, m of another run of k sittings lies within

    t s sqrt(2 / k),   t of Student's distribution with k - 1 degrees of freedom

of this run's, in the share `confidence` of all cells.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import lru_cache

CONFIDENCE = 0.95
_STEPS = 2000


def expected(
    medians: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """The band for another run; None where fewer than two sittings leave it open."""
    if len(medians) < 2:
        return None
    logarithms = [math.log(median) for median in medians]
    k, mean = len(medians), statistics.fmean(logarithms)
    reach = student(k - 1, confidence) * statistics.stdev(logarithms) * math.sqrt(2 / k)
    return math.exp(mean - reach), math.exp(mean + reach)


def change(
    before: Sequence[float], after: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """Between which factors the true medians of two runs differ; None as in `expected`."""
    if min(len(before), len(after)) < 2:
        return None
    both = [[math.log(median) for median in run] for run in (before, after)]
    variance = sum(statistics.variance(run) / len(run) for run in both)
    reach = student(min(map(len, both)) - 1, confidence) * math.sqrt(variance)
    moved = statistics.fmean(both[1]) - statistics.fmean(both[0])
    return math.exp(moved - reach), math.exp(moved + reach)


@lru_cache
def student(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Within which t lies in the share `confidence`; by bisection of the integrated density."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < confidence:
        low, high = high, 2 * high
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| < t), by Simpson's rule in the angle of t, where the tails are short."""
    # T = sqrt(freedom) tan(a) has the density cos(a)^(freedom - 1), up to a constant
    step = math.atan(t / math.sqrt(freedom)) / _STEPS
    values = [math.cos(i * step) ** (freedom - 1) for i in range(_STEPS + 1)]
    inner = 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2])
    area = (values[0] + inner + values[-1]) * step / 3
    whole = math.sqrt(math.pi) * math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2))
    return 2 * area / whole
