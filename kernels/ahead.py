"""Compile attention's kernels for a GPU that is not here, into Triton's cache.

    python -m swathe warmup --target sm_90 [--heads 64,128,192x128] [--dtypes bfloat16]

A machine with that GPU spends no time on these kernels if it has the same Triton and finds the
cache at the same path (TRITON_CACHE_DIR, else ~/.triton/cache). Only that GPU can confirm it.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence

import torch

from swathe.kernels.core.errors import BackendUnavailable
from swathe.kernels.core.offline import CAPABILITIES, Compiled, compiling_for

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HEADS = ((64, 64), (128, 128))


def compile_ahead(
    target: str,
    *,
    heads: Sequence[tuple[int, int]] = HEADS,
    dtypes: Sequence[str] = ("bfloat16",),
    tell: Callable[[str], object] | None = None,
) -> Compiled:
    """Compile attention, forward, backward and decode, for heads of (D, E) features.

    `tell` hears of each kernel; the result says how many there were, how many the cache had, and
    where it lies. core/offline.py says when a GPU finds them. Raises ValueError for an unknown
    target, dtype or size of heads, BackendUnavailable where Triton is missing or interprets.
    """
    unknown = sorted(set(dtypes) - set(DTYPES))
    if unknown:
        raise ValueError(f"dtypes {unknown} unknown; allowed: {list(DTYPES)}")
    wrong = [pair for pair in heads if not 0 < min(pair) <= max(pair) <= 256]
    if wrong:
        raise ValueError(f"heads {wrong} have no kernels; give (D, E) of 1 to 256 features each")
    label = ""
    with compiling_for(target, lambda text: tell and tell(f"attention {label}: {text}")) as done:
        from swathe.kernels.attention.ahead import calls

        for D, E in heads:
            for name in dtypes:
                for which, call in calls(D, E, DTYPES[name]):
                    label = f"{D}x{E} {name} {which}"
                    call()
    return done


def head(text: str) -> tuple[int, int]:
    """ "128" or, where values are narrower than keys, "192x128"."""
    first, cross, second = text.partition("x")
    try:
        return int(first), int(second if cross else first)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is no head size; write 128, or 192x128") from None


def arguments(given: Sequence[str] | None) -> Namespace:
    """The command line, checked."""
    parser = ArgumentParser("python -m swathe warmup", description=__doc__)
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.add_argument("--target", required=True, choices=list(CAPABILITIES), help="the GPU's")
    parser.add_argument(
        "--heads",
        type=lambda text: [head(part) for part in text.split(",")],
        default=list(HEADS),
        help="features of q and v, by comma: 128, or 192x128 where v's differ",
    )
    parser.add_argument(
        "--dtypes",
        type=lambda text: text.split(","),
        default=["bfloat16"],
        help="by comma: bfloat16, float16, float32; bfloat16 if not given",
    )
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Compile, print; returns the exit status."""
    asked = arguments(given)

    def tell(text: str) -> None:
        print(text, flush=True)

    try:
        done = compile_ahead(asked.target, heads=asked.heads, dtypes=asked.dtypes, tell=tell)
    except (ValueError, BackendUnavailable) as error:
        print(f"warmup: {error}", file=sys.stderr)
        return 2
    print(done)
    return 0
