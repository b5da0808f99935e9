"""Column sums of partial rows: right, in a fixed order, and planted bugs are noticed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from support.interpreter import SanitizerError, sanitized
from support.mutants import Mutant, planted
from support.tensors import DEVICE, DTYPES, rows
from swathe.kernels.core import partials

SHAPES = ((1, 1), (1, 64), (4, 600), (5, 513), (31, 5), (32, 64), (33, 65), (100, 200), (7, 1))
MUTANTS = {
    "partials past P": Mutant(
        "live = (p < P)[:, None] & (n < N)[None, :]", "live = (n < N)[None, :]"
    ),
    "columns past N": Mutant("(p < P)[:, None] & (n < N)[None, :]", "(p < P)[:, None]"),
    "first block only": Mutant("for start in range(0, P, BLOCK_P):", "for start in range(0, 1):"),
    "last block only": Mutant("total += tl.load", "total = tl.load"),
    "columns of the first block": Mutant("tl.program_id(0) * BLOCK_N + ", "0 + "),
}


def wrong(module: ModuleType) -> str | None:
    """The first shape whose sums are wrong, or what the sanitizer says."""
    try:
        with sanitized(order="random", seed=1):
            for shape in SHAPES:
                partial = rows(*shape)
                out = torch.full(shape[1:], float("nan"), device=DEVICE)
                module.sum_partials(partial, out)
                exact = partial.double().sum(0)
                if not torch.allclose(out.double(), exact, rtol=0, atol=1e-5):
                    return str(shape)
    except SanitizerError as error:
        return str(error)
    return None


@pytest.mark.skipif(DEVICE == "cuda", reason="the sanitizer watches interpreted kernels")
def test_sums_are_right() -> None:
    assert wrong(partials) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_rounding_to_the_output(dtype: torch.dtype) -> None:
    partial = rows(50, 300)
    out = torch.empty(300, dtype=dtype, device=DEVICE)
    partials.sum_partials(partial, out)
    whole = torch.empty(300, device=DEVICE)
    partials.sum_partials(partial, whole)
    assert torch.equal(out, whole.to(dtype))


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels are compiled here")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted_bug_is_caught(mutant: str, tmp_path: Path) -> None:
    with planted(partials, MUTANTS[mutant], tmp_path) as module:
        assert wrong(sys.modules[module]) is not None, "nobody noticed"
