"""Run a script whose transformers models are patched as they are made; the script stays as it is.

python -m swathe run [options] train.py its arguments ...
torchrun --nproc-per-node 8 -m swathe run [options] train.py its arguments ...
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

import swathe

SWITCHES = ("rms_norm", "layer_norm", "rope", "swiglu", "residual", "fused_linear_cross_entropy")


def main(given: list[str]) -> int:
    """Patch, then run the script as `python` would; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m swathe run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--model-type", action="append", metavar="TYPE", help="only such models (may be repeated)"
    )
    parser.add_argument("--backend", default="auto", help="default: %(default)s")
    parser.add_argument("--report", action="store_true", help="print what was patched, on stderr")
    for name in SWITCHES:
        parser.add_argument(
            f"--no-{name.replace('_', '-')}", dest=name, action="store_false", help="leave alone"
        )
    parser.add_argument("script", type=Path, help="the Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the script gets")
    asked = parser.parse_args(given)
    if not asked.script.is_file():
        parser.error(f"{asked.script}: there is no such file")
    options = {name: getattr(asked, name) for name in SWITCHES}
    types = {"all": True} if asked.model_type is None else {"model": tuple(asked.model_type)}
    try:
        creation = swathe.patch(**types, **options, backend=asked.backend)
    except ValueError as error:
        parser.error(str(error))
    sys.argv = [str(asked.script), *asked.arguments]
    sys.path[0] = str(asked.script.resolve().parent)
    try:
        runpy.run_path(str(asked.script), run_name="__main__")
    finally:
        if asked.report:
            for name, report in creation.reports:
                print(f"{name}:\n{report}", file=sys.stderr)
            if not creation.reports:
                print("no transformers model was made", file=sys.stderr)
    return 0
