"""How pictures look: one colour and mark for each contender, one card that any page can hold.

Colours are Okabe and Ito's (jfly.uni-koeln.de/color), apart for every kind of colour blindness;
marks say the same once more. The card is opaque, so that dark pages do not swallow the text.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.plot import INPUTS
from bench.report import Document, backends

INK, SOFT, FAINT, CARD = "#1f2328", "#59636e", "#d9dee3", "#ffffff"
OURS, LOST, LOSSES, GREY = "#0072b2", "#b3261e", "#fbf5f4", "#aeb6bf"
WIDTH = 9.4  # inches of every picture
_IN_A_ROW, _NOTE = 8, 150  # names in a row of the legend, letters in a line of the note
_LOOKS = {
    "eager": ("#e69f00", "s"),
    "compile": ("#009e73", "^"),
    "torch": ("#cc79a7", "D"),
    "sdpa": ("#56b4e9", "P"),
    "liger": ("#d55e00", "v"),
    "quack": ("#7b5ea7", "X"),
    "cudnn": ("#8c6d1f", "<"),
    "flash": ("#5a5a5a", ">"),
    "efficient": ("#a0522d", "h"),
    "math": ("#9e9d24", "p"),
    "flex": ("#2f8f9d", "*"),
    "varlen": ("#d9a0c0", "8"),
    "flash_attn 2": ("#1f2328", "d"),
    "flash_attn 3": ("#6b8e00", "H"),
}
# in turn, where a name is not listed
_SPARE = (("#8d8d8d", "|"), ("#b08968", "x"), ("#5f7f9f", "1"), ("#a66999", "2"), ("#77a06a", "3"))
_SETTINGS: dict[Any, Any] = {
    # text stays text: smaller files, and found by a search
    "svg.fonttype": "none",
    # names of clip paths are random without it
    "svg.hashsalt": "swathe",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#edf0f2",
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
}


def timed(results: Document) -> list[str]:
    """Contenders that were timed in any cell, ours first."""
    found = {row["backend"] for row in results["benchmarks"] if "median_us" in row}
    return [name for name in backends(results) if name in found]


def ours(results: Document) -> list[str]:
    """Names of our own backends."""
    return list(dict.fromkeys(row["backend"] for row in results["benchmarks"] if row["ours"]))


@contextmanager
def settings() -> Iterator[None]:
    """Draw and save within this, so that nobody's matplotlibrc takes part."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        yield


def looks(names: Sequence[str], ours: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and mark of each contender."""
    spare = iter(_SPARE * len(names))
    known = dict.fromkeys(ours, (OURS, "o")) | _LOOKS
    return {name: known[name] if name in known else next(spare) for name in names}


class Card:
    """A figure: headline and facts, the contenders' names, room for panels, a note at the foot.

    Panels are placed in inches: from the left edge, and down from where their room begins.
    """

    def __init__(
        self, room: float, title: str, entries: Sequence[tuple[str, Any]], note: str
    ) -> None:
        headline, *facts = title.split("\n")
        said = [part for line in note.split("\n") for part in textwrap.wrap(line, _NOTE)]
        rows = math.ceil(len(entries) / _IN_A_ROW)
        self._head = 0.6 + 0.17 * len(facts) + 0.22 * rows
        self._height = self._head + room + 0.3 + 0.14 * len(said)
        self.figure = Figure(figsize=(WIDTH, self._height), facecolor=CARD)
        text = partial(self.figure.text, 0.14 / WIDTH, linespacing=1.4)
        text(self._from_top(0.13), headline, va="top", fontsize=12, fontweight="bold")
        text(self._from_top(0.38), "\n".join(facts), va="top", color=SOFT)
        text(0.1 / self._height, "\n".join(said), va="bottom", fontsize=7, color=SOFT)
        self.figure.legend(
            [handle for _, handle in entries],
            [name for name, _ in entries],
            loc="upper left",
            bbox_to_anchor=(0.05 / WIDTH, self._from_top(0.46 + 0.17 * len(facts))),
            ncols=math.ceil(len(entries) / rows),
            frameon=False,
            handletextpad=0.5,
            columnspacing=1.6,
            borderaxespad=0,
            fontsize=8.5,
        )

    def _from_top(self, inches: float) -> float:
        return 1 - inches / self._height

    def panel(self, left: float, down: float, width: float, height: float) -> Axes:
        """Axes whose upper left corner is there."""
        bottom = self._from_top(self._head + down + height)
        return self.figure.add_axes((left / WIDTH, bottom, width / WIDTH, height / self._height))


def key(look: tuple[str, str], *, line: bool) -> Line2D:
    """A contender's entry in a legend."""
    colour, mark = look
    width = 2.0 if line else 0.0
    return Line2D([], [], color=colour, marker=mark, markersize=5.5, linewidth=width)


def write(figure: Figure, path: Path, inputs: str) -> None:
    """Save as path's suffix says; the same figure gives the same bytes on any day.

    `inputs` is the digest of what it was drawn from, which the file carries.
    """
    raw, svg = io.BytesIO(), path.suffix == ".svg"
    facts: dict[str, Any] = {"Description": f"{INPUTS}{inputs}"}
    facts |= {"Date": None, "Creator": "bench.plot"} if svg else {"Software": None}
    figure.savefig(raw, format=path.suffix[1:], dpi=110, facecolor=CARD, metadata=facts)
    data = raw.getvalue()
    data = lean(data.decode()).encode() if svg else data
    aside = path.with_suffix(f"{path.suffix}.partial")
    aside.write_bytes(data)
    aside.replace(path)


def lean(svg: str) -> str:
    """The same picture in half the bytes: what matplotlib repeats at every mark is said once."""
    for pattern, instead in (
        (r"(\d\.\d\d)\d+", r"\1"),  # a hundredth of a point is finer than any screen
        (r' transform="rotate\(-0 [^)]*\)"', ""),
        (r"font-family: 'DejaVu Sans', sans-serif; ?", ""),
        (r"; stroke-line(join: miter|cap: square)", ""),
        (r'\n *<g id="(line2d|text|patch)_\d+"/>', ""),
        (r'<g id="(line2d|text|patch)_\d+">', "<g>"),
        (r"\n([LQCz]) ?", r" \1"),
        (r"\n +", "\n"),
        (r"<svg ", "<svg font-family=\"'DejaVu Sans', sans-serif\" "),
    ):
        svg = re.sub(pattern, instead, svg)
    return re.sub(r'(<use [^>]*( style="[^"]*")/>\n)(?:<use [^>]*\2/>\n)+', _said_once, svg)


def _said_once(run: re.Match[str]) -> str:
    return f"<g{run[2]}>\n{run[0].replace(run[2], '')}</g>\n"
