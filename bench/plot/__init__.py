"""Pictures of results: which there are, of which files, and whether a drawn one is up to date.

Nothing here needs matplotlib, so that a checkout without it still tells when a committed picture
is out of date. `python -m bench.plot` draws.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from bench.overview import documents
from bench.report import Document, groups

INPUTS = "drawn from results of sha256 "
FEWEST_SIZES = 4  # a line through fewer says nothing


@dataclass(frozen=True)
class Picture:
    """One picture: its name, the module of bench.plot that draws it, the results it is of."""

    name: str
    kind: str
    results: tuple[Document, ...]

    @property
    def inputs(self) -> str:
        """What a drawn file carries, to be told from one of other results."""
        return hashlib.sha256(json.dumps(self.results, sort_keys=True).encode()).hexdigest()

    def is_drawn(self, path: Path) -> bool:
        """Whether the SVG is there and of these results."""
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return re.findall(f"{INPUTS}([0-9a-f]+)", text) == [self.inputs]


def pictures(folder: Path) -> list[Picture]:
    """Every picture that a folder's results give; ValueError where it holds none."""
    found = documents(folder)
    each = [Picture(f"{one['op']}-{kind}", kind, (one,)) for one in found for kind in kinds(one)]
    return [Picture("peers", "overview", tuple(found)), *each]


def kinds(results: Document) -> list[str]:
    """What can be drawn of one op."""
    rows = [row for row in results["benchmarks"] if "median_us" in row]
    sized = any(len(group) >= FEWEST_SIZES for group in groups(results).values())
    counted = any("tflops" in row for row in rows)
    drawn = {"bars": bool(rows), "sizes": sized, "roofline": counted}
    return [kind for kind, possible in drawn.items() if possible]
