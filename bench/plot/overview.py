"""Every op beside every peer in one picture: each mark is one cell, left of the line are losses."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.plot import style
from bench.plot.bars import ratio_axis
from bench.report import Document, ranked, ratios, where


def draw(results: Sequence[Document]) -> Figure:
    """The figure."""
    beside = {one["op"]: _times(one) for one in results}
    names = list(dict.fromkeys(name for peers in beside.values() for name in peers))
    look = style.looks(names, ())
    lines = sum(len(peers) for peers in beside.values())
    cells = [cell for one in results for cell in ranked(one)]
    ahead = sum(ratio <= 1 for ratio, *_ in cells)
    title = f"Time of each peer over ours: ours is the fastest in {ahead} of {len(cells)} cells"
    facts = (
        "Each mark is one cell: a shape, a dtype, forward or with backward. "
        "Hollow: ours loses. Black: the median."
    )
    absent = dict(pair for one in results for pair in one.get("absent", {}).items())
    note = "\n".join([*(f"Absent: {n} ({w})." for n, w in absent.items()), where(results[0])])
    entries = [(name, style.key(look[name], line=False)) for name in names]
    height = 0.2 * lines + 0.16 * len(results)
    card = style.Card(height + 0.6, f"{title}\n{facts}", entries, note)
    _strips(card.panel(1.27, 0.1, 7.2, height), results, beside, look)
    return card.figure


def _times(results: Document) -> dict[str, list[float]]:
    return {name: [1 / ratio for ratio in found] for name, found in ratios(results).items()}


def _strips(
    axes: Axes,
    results: Sequence[Document],
    beside: dict[str, dict[str, list[float]]],
    look: dict[str, tuple[str, str]],
) -> None:
    y, ticks = 0.0, []
    for one in results:
        first = y
        for name, times in beside[one["op"]].items():
            colour, mark = look[name]
            for lost in (False, True):
                chosen = [time for time in times if (time < 1) is lost]
                axes.plot(
                    chosen,
                    [y] * len(chosen),
                    linestyle="none",
                    marker=mark,
                    markersize=4.6,
                    markeredgecolor=style.LOST if lost else colour,
                    markerfacecolor=style.CARD if lost else colour,
                    markeredgewidth=0.9 if lost else 0,
                    alpha=0.9 if lost else 0.5,
                )
            middle = statistics.median(times)
            axes.plot([middle] * 2, [y - 0.36, y + 0.36], color=style.INK, linewidth=1.6)
            y += 1
        ticks.append((first + y - 1) / 2)
        cells = ranked(one)
        ahead = sum(ratio <= 1 for ratio, *_ in cells)
        axes.text(
            1.015, ticks[-1], f"{ahead} of {len(cells)}", transform=axes.get_yaxis_transform(),
            va="center", fontweight="bold",
        )  # fmt: skip
        if one is not results[-1]:
            axes.axhline(y - 0.1, color=style.FAINT, linewidth=0.7)
        y += 0.8
    axes.set_yticks(ticks, [one["op"] for one in results])
    axes.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=style.INK)
    axes.set_ylim(y - 0.9, -0.8)
    axes.text(
        1.015, 1.0, "fastest in", transform=axes.transAxes, va="bottom", color=style.SOFT,
        fontsize=7.5,
    )  # fmt: skip
    every = [time for peers in beside.values() for times in peers.values() for time in times]
    ratio_axis(axes, every, 1.2)
    axes.set_xlabel("time of the peer / time of ours")
    for name, x, colour in (("ours is faster", 4, style.OURS), ("ours loses", -4, style.LOST)):
        axes.annotate(
            name, (1, 1), (x, 2), xycoords=axes.get_xaxis_transform(), va="bottom", color=colour,
            textcoords="offset points", ha="left" if x > 0 else "right", fontsize=7.5,
        )  # fmt: skip
