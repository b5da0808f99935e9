"""One op beside its peers, cell by cell: how long each takes where ours takes 1."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.plot import style
from bench.report import Document, Group, Row, groups, ranked, unserved, where

_BAR, _GAP = 0.108, 0.62  # inches that a bar is high, and between panels


def draw(results: Sequence[Document]) -> Figure:
    """The figure of one op's results."""
    (one,) = results
    peers = [name for name in style.timed(one) if name not in style.ours(one)]
    look = style.looks(peers, ())
    panels: dict[str, dict[str, Group]] = {}
    for (dtype, variant), group in groups(one).items():
        panels.setdefault(variant, {})[dtype] = group
    dtypes = list(dict.fromkeys(dtype for dtype, _ in groups(one)))
    tall = [max(map(len, row.values())) * (len(peers) + 1) * _BAR for row in panels.values()]
    cells = ranked(one)
    ahead = sum(ratio <= 1 for ratio, *_ in cells)
    title = f"{one['op']}: time of each peer over ours\n" + (
        f"Ours, the blue line at 1, is the fastest in {ahead} of {len(cells)} cells. "
        "To its right, ours is faster; to its left, ours loses."
    )
    entries: list[tuple[str, Any]] = [(n, Patch(color=look[n][0])) for n in peers]
    lost = Patch(facecolor=style.CARD, edgecolor=style.SOFT)
    entries.append(("hollow, with a red number: ours loses", lost))
    card = style.Card(sum(tall) + _GAP * len(panels), title, entries, note(one))
    label = max(len(label_of(row)) for row in one["benchmarks"]) * 0.062 + 0.25
    share, down = (style.WIDTH - 0.1) / len(dtypes), _GAP / 2
    for (variant, row), inches in zip(panels.items(), tall, strict=True):
        for column, dtype in enumerate(dtypes):
            if dtype in row:
                axes = card.panel(column * share + label, down, share - label - 0.25, inches)
                axes.set_title(f"{variant}, {dtype}")
                _bars(axes, row[dtype], peers, look)
                ratio_axis(axes, _all_ratios(one), 1.5)
        down += inches + _GAP
    return card.figure


def note(results: Document) -> str:
    """Who is absent and why, and where this was measured."""
    absent = dict(results.get("absent", {}))
    for row in results["benchmarks"]:
        if row["backend"] not in style.timed(results):
            why = row["error"].splitlines()[0].removeprefix("NotImplementedError: ")
            absent.setdefault(row["backend"], why.removeprefix(f"{row['backend']}: "))
    said = [f"Absent: {name} ({why})." for name, why in absent.items()]
    return "\n".join([*said, where(results)])


def label_of(row: Row) -> str:
    """A cell's numbers, or its shape's name where they are many."""
    return row["size"] if row["size"].count("x") < 3 else row["shape"]


def ratio_axis(axes: Axes, ratios: Iterable[float], room: float) -> None:
    """Powers of two around 1, where ours is, and a factor of `room` at both ends."""
    found = [*ratios, 1.0]
    low, high = min(found) / room, max(found) * room
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator([2.0**i for i in powers]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}")
    )
    axes.grid(axis="x")
    axes.axvline(1.0, color=style.OURS, linewidth=1.6, zorder=1.5)
    axes.axvspan(low, 1.0, color=style.LOSSES, linewidth=0, zorder=0)
    for spine in ("left", "bottom"):
        axes.spines[spine].set_visible(False)
    axes.tick_params(axis="x", length=0)


def _all_ratios(results: Document) -> list[float]:
    return [
        row["median_us"] / ours["median_us"]
        for group in groups(results).values()
        for cells in group.values()
        if (ours := _ours(cells))
        for row in cells.values()
        if "median_us" in row
    ]


def _ours(cells: dict[str, Row]) -> Row | None:
    return next((row for row in cells.values() if row["ours"] and "median_us" in row), None)


def _bars(axes: Axes, group: Group, peers: Sequence[str], look: dict[str, tuple[str, str]]) -> None:
    height = len(group) * (len(peers) + 1)
    for number, cells in enumerate(group.values()):
        ours = _ours(cells)
        for place, name in enumerate(peers):
            y, row = number * (len(peers) + 1) + place, cells.get(name)
            if ours is None or row is None or "median_us" not in row:
                why = "ours failed" if ours is None else _missing(row)
                axes.annotate(
                    f"{name}: {why}", (1, y), (3, 0), textcoords="offset points", fontsize=6,
                    va="center", color=style.SOFT,
                )  # fmt: skip
                continue
            time = row["median_us"] / ours["median_us"]
            lost = time < 1
            axes.barh(
                y, time - 1, left=1, height=0.86, color=style.CARD if lost else look[name][0],
                edgecolor=look[name][0], linewidth=1.1, zorder=2, clip_on=False,
            )  # fmt: skip
            axes.annotate(
                f"{time:.2f}" if time < 10 else f"{time:.0f}", (time, y),
                (-2 if lost else 2, 0), textcoords="offset points", va="center_baseline",
                ha="right" if lost else "left", fontsize=6, fontweight="bold" if lost else None,
                color=style.LOST if lost else style.SOFT,
            )  # fmt: skip
    middles = [i * (len(peers) + 1) + (len(peers) - 1) / 2 for i in range(len(group))]
    axes.set_yticks(middles, [label_of(next(iter(cells.values()))) for cells in group.values()])
    axes.set_ylim(height - 0.8, -1.0)
    axes.tick_params(axis="y", length=0)


def _missing(row: Row | None) -> str:
    if row is None:
        return "not measured"
    return "does not serve this" if unserved(row) else f"failed ({row['error'].partition(':')[0]})"
