"""Pictures of results, drawn from the files alone.

    python -m bench.plot [FOLDER] [--out FOLDER] [--formats svg,png] [--check]

peers         every op beside its peers, all cells in one picture
OP-bars       each cell: time of every peer over ours
OP-sizes      GB/s against bytes, beside a copy of as many
OP-roofline   flops a byte against TFLOP/s, under the roofs that the same run measured

--check draws nothing and tells which SVGs are missing or of other results. Status: 0 well,
1 something is out of date, 2 nothing could be drawn.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from bench.plot import Picture, pictures
from bench.readme import RESULTS

FORMATS = ("svg", "png")


def main(given: list[str] | None = None) -> int:
    """Draw or check; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="of results")
    parser.add_argument(
        "--out", type=Path, help="where pictures go; the results' folder if not given"
    )
    parser.add_argument("--formats", default=",".join(FORMATS), help="by comma")
    parser.add_argument(
        "--check", action="store_true", help="draw nothing, tell what is out of date"
    )
    asked = parser.parse_args(given)
    formats = asked.formats.split(",")
    if unknown := sorted(set(formats) - set(FORMATS)):
        parser.error(f"--formats: {unknown} unknown; allowed: {','.join(FORMATS)}")
    try:
        found = pictures(asked.folder)
    except (OSError, ValueError) as error:
        print(f"bench.plot: {error}", file=sys.stderr)
        return 2
    out = asked.out or asked.folder
    if asked.check:
        return _check(found, out)
    if find_spec("matplotlib") is None:
        print(
            "bench.plot: matplotlib is not installed, and pictures are drawn with it; "
            "pip install -c constraints.txt '.[plot]' brings it",
            file=sys.stderr,
        )
        return 2
    out.mkdir(parents=True, exist_ok=True)
    for picture in found:
        paths = [out / f"{picture.name}.{suffix}" for suffix in formats]
        draw(picture, paths)
        print(*paths)
    return 0


def draw(picture: Picture, paths: list[Path]) -> None:
    """Draw one picture into files of any of FORMATS."""
    style = import_module("bench.plot.style")
    with style.settings():
        figure = import_module(f"bench.plot.{picture.kind}").draw(picture.results)
        for path in paths:
            style.write(figure, path, picture.inputs)


def _check(found: list[Picture], out: Path) -> int:
    stale = [f"{p.name}.svg" for p in found if not p.is_drawn(out / f"{p.name}.svg")]
    for name in stale:
        print(f"{out / name} is missing or of other results; make docs draws it", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
