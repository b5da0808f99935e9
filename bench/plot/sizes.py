"""One op's speed against its size, beside what the same rounds measured of the machine.

Bytes a second against the fewest bytes that a call moves, beside a copy of as many; where an op
counts its flops, these a second against their number, beside a matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.plot import FEWEST_SIZES, style
from bench.plot.bars import note
from bench.plot.roofline import memory_speed
from bench.report import Document, Group, Row, groups
from bench.spread import band

_TALL, _GAP = 1.75, 0.62  # inches of a panel's height, and between panels


class Axis(NamedTuple):
    """What is drawn: columns of a row, their units, what the grey line is."""

    size: str
    speed: str
    ceiling: str
    unit: str
    scale: float  # of size / microseconds, to the unit
    title: str
    beside: str


BYTES = Axis(
    *("traffic_bytes", "gbps", "copy_gbps", "GB/s", 1e-3),
    "GB/s of the bytes that a call must move, against those bytes",
    "copy",
)
FLOPS = Axis(
    *("flops", "tflops", "product_tflops", "TFLOP/s", 1e-6),
    "TFLOP/s of the matrix products that a call needs, against their flops",
    "matrix product",
)


def draw(results: Sequence[Document]) -> Figure:
    """The figure of one op's results."""
    (one,) = results
    names, ours = style.timed(one), style.ours(one)
    axis = FLOPS if any("tflops" in row for row in one["benchmarks"]) else BYTES
    look = style.looks(names, ours)
    panels: dict[str, dict[str, Group]] = {}
    for (dtype, variant), group in groups(one).items():
        if len(group) >= FEWEST_SIZES:
            panels.setdefault(variant, {})[dtype] = group
    dtypes = list(dict.fromkeys(dtype for row in panels.values() for dtype in row))
    title = f"{one['op']}: {axis.title}\n" + (
        "Medians; the shade is where the true median of ours lies (95 %). "
        f"Grey: a {axis.beside} of that size in the same rounds."
    )
    if axis is FLOPS:
        title += " Dotted: memory-bound."
    entries = [(name, style.key(look[name], line=True)) for name in names]
    entries.append((axis.beside, style.key((style.GREY, ""), line=True)))
    card = style.Card((_TALL + _GAP) * len(panels), title, entries, note(one))
    share, limits = (style.WIDTH - 0.1) / len(dtypes), _limits(axis, panels)
    for number, (variant, row) in enumerate(panels.items()):
        for column, dtype in enumerate(dtypes):
            if dtype in row:
                down = number * (_TALL + _GAP) + _GAP / 2
                axes = card.panel(column * share + 0.55, down, share - 0.8, _TALL)
                axes.set_title(f"{variant}, {dtype}")
                _lines(axes, axis, row[dtype], look)
                _scales(axes, axis, limits)
    return card.figure


def _lines(axes: Axes, axis: Axis, group: Group, look: dict[str, tuple[str, str]]) -> None:
    rows = [row for cells in group.values() for row in cells.values() if "median_us" in row]
    rows.sort(key=lambda row: row[axis.size])
    # attention's decode and prefill do not lie on one line
    below = [row for row in rows if axis is FLOPS and _waits_for_memory(row, rows)]
    for part, dash in ((below, ":"), ([row for row in rows if row not in below], "-")):
        ceiling = {row[axis.size]: row[axis.ceiling] for row in part}
        if dash == "-":
            axes.plot([*ceiling], [*ceiling.values()], color=style.GREY, linewidth=2.4, zorder=1.5)
        # ours last, on top
        for name, (colour, mark) in reversed(look.items()):
            own = [row for row in part if row["backend"] == name]
            sizes, ours = [row[axis.size] for row in own], any(row["ours"] for row in own)
            axes.plot(
                sizes, [row[axis.speed] for row in own], color=colour, marker=mark, linestyle=dash,
                markersize=3.8 + 0.7 * ours, linewidth=1.2 + ours, zorder=2 + ours,
            )  # fmt: skip
            if ours:
                times = [band(row["samples_us"]) for row in own]
                low, high = (
                    [axis.scale * size / time[end] for size, time in zip(sizes, times, strict=True)]
                    for end in (1, 0)
                )
                axes.fill_between(sizes, low, high, color=colour, alpha=0.2, lw=0, zorder=1.8)


def _waits_for_memory(row: Row, rows: Sequence[Row]) -> bool:
    """Whether a cell lies left of the ridge, where the copy's roof meets the product's."""
    product = 1e3 * max(row["product_tflops"] for row in rows)
    return row["flops"] / row["traffic_bytes"] < product / memory_speed(rows)


def _limits(axis: Axis, panels: dict[str, dict[str, Group]]) -> tuple[list[float], list[float]]:
    drawn = [group for row in panels.values() for group in row.values()]
    rows = [r for g in drawn for cells in g.values() for r in cells.values() if "median_us" in r]
    sizes = [float(row[axis.size]) for row in rows]
    return sizes, [row[column] for row in rows for column in (axis.speed, axis.ceiling)]


def _scales(axes: Axes, axis: Axis, limits: tuple[list[float], list[float]]) -> None:
    sizes, speeds = limits
    axes.set(xscale="log", yscale="log", ylabel=axis.unit)
    axes.set_xlim(min(sizes) / 1.5, max(sizes) * 1.5)
    axes.set_ylim(min(speeds) / 1.5, max(speeds) * 1.5)
    steps = [2.0**i for i in range(4, 44, 4)] if axis is BYTES else [10.0**i for i in range(3, 18)]
    named = size_of if axis is BYTES else flops_of
    axes.xaxis.set_major_locator(FixedLocator(steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: named(x)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    for each in (axes.xaxis, axes.yaxis):
        each.set_minor_locator(NullLocator())
    axes.grid()


def size_of(bytes_: float) -> str:
    """Bytes in the unit that keeps the number short."""
    power = min(4, int(math.log2(max(1.0, bytes_)) // 10))
    return f"{bytes_ / 2 ** (10 * power):.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def flops_of(count: float) -> str:
    """Flops in the unit that keeps the number short."""
    power = min(5, int(math.log10(max(1.0, count)) // 3))
    return f"{count / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P')[power]}FLOP"
