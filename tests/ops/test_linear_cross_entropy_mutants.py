"""Bugs planted in the chunks of linear cross-entropy: the contract catches every one."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

from support.mutants import Mutant, caught, planted
from swathe.kernels.core.contract import Problem
from swathe.kernels.linear_cross_entropy import _triton as chunked
from swathe.kernels.linear_cross_entropy.contract import CONTRACT, GROUPS, random
from swathe.kernels.linear_cross_entropy.op import fused
from swathe.kernels.linear_cross_entropy.shapes import Shape

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")

MUTANTS: dict[str, tuple[str, str, int]] = {
    "bias forgotten": ("logits.add_(self.bias)", "logits.add_(0.0)", 0),
    "bias of every chunk again": ("if self.bias is not None:", "if self.bias is not None and start == 0:", 0),
    "a chunk reads the first rows": ("multiply(self.hidden[at], self.weight.t(), logits)", "multiply(self.hidden[: at.stop - start], self.weight.t(), logits)", 0),
    "labels of the first chunk": ("labels, n = self.chunks.labels[at], at.stop - at.start", "n = at.stop - at.start; labels = self.chunks.labels[:n]", 0),
    "last chunk dropped": ("range(0, self.labels.numel(), max(self.rows, 1))", "range(0, max(1, self.labels.numel() - self.rows), max(self.rows, 1))", 0),
    "dW of the last chunk only": ("(multiply if at.start == 0 else multiply_add)", "(multiply)", 0),
    "dW of the first chunk forgotten": ("(multiply if at.start == 0 else multiply_add)(dx.t(), hidden, self.dw)", "(multiply if at.start == 0 else multiply_add)(dx.t() * (at.start > 0), hidden, self.dw)", 0),
    "db of the first chunk only": ("self.db.add_(dx.sum(0, dtype=torch.float32))", "self.db.add_(0.0)", 0),
    "db in low precision": ("self.db.add_(dx.sum(0, dtype=torch.float32))", "self.db.add_(dx.sum(0).bfloat16())", 0),
    "logits in low precision": ("            yield at, logits", "            logits.copy_(logits.bfloat16())\n            yield at, logits", 0),
    "the rest of dh is not put back": ("            self.dh[at].addcmul_(", "            self.dh[at].addcmul(", 0),
    "the rest of dW is not put back": ("self.dw.index_put_((index,), column * hidden, accumulate=True)", "self.dw.add_(0.0)", 0),
    "the rest of db is not put back": ("self.db.index_put_((index,), rest, accumulate=True)", "self.db.add_(0.0)", 0),
    "the rest replaces dW": ("column * hidden, accumulate=True", "column * hidden, accumulate=False", 0),
    "the rest goes elsewhere": ("index = torch.where((labels >= 0) & (labels < V), labels.long(), anywhere)", "index = anywhere", 0),
    "arriving squared": ("        factor = arriving / _gain(dtype)", "        factor = arriving * arriving / _gain(dtype)", 0),
    "arriving forgotten": ("        factor = arriving / _gain(dtype)", "        factor = torch.ones_like(arriving) / _gain(dtype)", 0),
    "gain not taken back": ("        factor = arriving / _gain(dtype)", "        factor = arriving", 0),
    "rows: largest gradient not taken back": ("return backward_total(top, dh,", "return backward_total(torch.ones_like(top), dh,", 0),
    "rows: arriving of the first rows": ("gradients.add(at, logits, weights[at], saved, numbers)", "gradients.add(at, logits, weights[: at.stop - at.start], saved, numbers)", 0),
    "rows: statistics of the first rows": ("saved = peak.view(-1)[at], log_sum.view(-1)[at]", "saved = peak.view(-1)[: at.stop - at.start], log_sum.view(-1)[: at.stop - at.start]", 0),
    "rows: losses of the last chunk": ("losses, peak, log_sum = (t[at] for t in flat)", "losses, peak, log_sum = (t[: at.stop - at.start] for t in flat)", 0),
    "total of the first chunk": ("return losses.sum(), dh,", "return losses[: chunks.rows].sum(), dh,", 0),
    "dh rounded twice": ("multiply(dx, self.chunks.weight, self.dh[at])", "multiply(dx, self.chunks.weight, self.dh[at]); self.dh[at] = self.dh[at].bfloat16().float()", 0),
}  # fmt: skip
SHAPES = (Shape("small", 11, 24, 30), Shape("many_rows_a_label", 40, 8, 5))


def problems() -> list[Problem]:
    """Small problems of every kind, in several chunks."""
    found = []
    kinds = product(SHAPES, GROUPS, (torch.bfloat16, torch.float16, torch.float32))
    for shape, group, dtype in kinds:
        for reduction in ("mean", "none"):
            options = {**GROUPS[group], "reduction": reduction, "chunk_rows": 4}
            found.append(random(shape, dtype, seed=1, **options))
    return found


def test_the_code_as_it_is_passes() -> None:
    assert caught(CONTRACT, fused, chunked.__name__, problems()) is None


@pytest.mark.parametrize("mutant", MUTANTS)
def test_planted_bug_is_caught(mutant: str, tmp_path: Path) -> None:
    with planted(chunked, Mutant(*MUTANTS[mutant]), tmp_path) as module:
        assert caught(CONTRACT, fused, module, problems()) is not None, "nobody noticed"
