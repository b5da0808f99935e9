"""An op that is bound by matrix products, under the roofs that the same run measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from bench.plot import style
from bench.plot.bars import note
from bench.report import Document, Row

_TALL = 3.9  # inches of a panel


def draw(results: Sequence[Document]) -> Figure:
    """The figure of one op's results: a panel for each dtype."""
    (one,) = results
    rows = [row for row in one["benchmarks"] if "tflops" in row]
    names = style.timed(one)
    look = style.looks(names, style.ours(one))
    unit, factor = (
        ("TFLOP/s", 1.0) if max(r["product_tflops"] for r in rows) >= 2 else ("GFLOP/s", 1e3)
    )
    title = f"{one['op']} under the roofs of this machine: {unit} against flops a byte\n" + (
        "Roofs are the fastest matrix product and copies of the same run: of the largest tensors, "
        "and, thin, of any.\nFilled: forward. Hollow: forward and backward. "
        "A mark above the roof beats torch's own product."
    )
    entries = [(name, style.key(look[name], line=False)) for name in names]
    card = style.Card(_TALL + 0.75, title, entries, note(one))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    share = (style.WIDTH - 0.1) / len(dtypes)
    for column, dtype in enumerate(dtypes):
        axes = card.panel(column * share + 0.6, 0.3, share - 0.8, _TALL)
        axes.set_title(dtype)
        _panel(axes, [row for row in rows if row["dtype"] == dtype], look, factor)
        axes.set(xlabel="flops a byte (needed flops over fewest bytes)", ylabel=unit)
    return card.figure


def memory_speed(rows: Sequence[Row]) -> float:
    """GB/s of the copy of the largest cell, which no cache holds."""
    largest = max(row["traffic_bytes"] for row in rows)
    return max(row["copy_gbps"] for row in rows if row["traffic_bytes"] == largest)


def _panel(
    axes: Axes, rows: Sequence[Row], look: dict[str, tuple[str, str]], factor: float
) -> None:
    intensity = [row["flops"] / row["traffic_bytes"] for row in rows]
    reached = [row["tflops"] * factor for row in rows]
    product = max(row["product_tflops"] for row in rows) * factor
    slow = memory_speed(rows)
    fast = max(row["copy_gbps"] for row in rows)
    axes.set(xscale="log", yscale="log", xlim=(min(intensity) / 2, max(intensity) * 2))
    axes.set_ylim(min(reached) / 2, max(product, *reached) * 1.8)
    for row in sorted(rows, key=lambda row: row["ours"]):
        colour, mark = look[row["backend"]]
        whole = "backward" in row["variant"]
        axes.plot(
            row["flops"] / row["traffic_bytes"], row["tflops"] * factor, marker=mark,
            color=colour, markerfacecolor=style.CARD if whole else colour, markersize=5.5,
            alpha=0.85, linestyle="none", zorder=3 if row["ours"] else 2,
        )  # fmt: skip
    said = {"fontsize": 7.5, "color": style.SOFT}
    ridge = product / (slow * factor / 1e3)
    axes.text(ridge * 1.15, product * 1.05, f"matrix product {product:,.0f}", va="bottom", **said)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.grid()
    _roof(axes, slow * factor / 1e3, product, f"copy {slow:.0f} GB/s", "top")
    if fast > 1.2 * slow:
        _roof(axes, fast * factor / 1e3, product, f"copy in caches {fast:.0f} GB/s", "bottom")


def _roof(axes: Axes, slope: float, product: float, text: str, side: str) -> None:
    """A copy's slope up to the matrix product, with its name along it where that has room."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    # of a decade
    wide = axes.bbox.width / axes.figure.dpi / math.log10(right / left)
    turn = math.atan2(axes.bbox.height / axes.figure.dpi / math.log10(high / low), wide)
    ridge, start = product / slope, max(left, low / slope) * 1.1
    axes.plot(
        [left, ridge, right], [left * slope, product, product], color=style.GREY,
        linewidth=2.0 if side == "top" else 0.9, zorder=1.5,
    )  # fmt: skip
    if math.log10(ridge / start) * wide / math.cos(turn) > 0.068 * len(text):
        axes.text(
            start, start * slope, text, rotation=math.degrees(turn), rotation_mode="anchor",
            va=side, fontsize=7.5, color=style.SOFT,
        )  # fmt: skip
