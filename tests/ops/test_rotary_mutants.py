"""Bugs planted in the Triton kernel of rotary and the loads and stores it shares: all are caught."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import swathe.kernels.core.heads as heads
import swathe.kernels.rotary._triton as turn
from support.mutants import Mutant, apart, caught, planted
from swathe.kernels.core.contract import Problem
from swathe.kernels.rotary.contract import CONTRACT, random
from swathe.kernels.rotary.op import fused
from swathe.kernels.rotary.shapes import Shape

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")

KERNEL: dict[str, tuple[str, str, int]] = {
    "keys take the queries' pointer": ("tl.where(of_k, k_ptr, q_ptr)", "tl.where(of_k, q_ptr, q_ptr)", 0),
    "keys overwrite the queries": ("tl.where(of_k, yk_ptr, yq_ptr)", "tl.where(of_k, yq_ptr, yq_ptr)", 0),
    "keys take the queries' strides": ("tl.where(of_k, k_s, q_s)", "q_s", 0),
    "as many key heads as query heads": ("tl.where(of_k, Hk, H)", "H", 0),
    "first head of a group for all": ("n = tl.cast(head, tl.int64)", "n = tl.cast(first, tl.int64)", 0),
    "a group too few": ("q_groups + tl.cdiv(Hk, heads_each)", "q_groups + Hk // heads_each", 0),
    "token of the wrong sequence": ("m // S, m % S, m < M", "m % S, m // S, m < M", 0),
    "dead tokens live": ("m // S, m % S, m < M", "m // S, m % S, m < M + BLOCK_M", 0),
    "not turned back": ("if BACK:", "if False:", 0),
    "always turned back": ("if BACK:", "if True:", 0),
    "turned back without exchange": ("s1, s2 = -s2, -s1", "s1, s2 = -s1, -s2", 0),
    "rounded never": ("y_ptr.dtype.element_ty, ROUND)", "y_ptr.dtype.element_ty, False)", 0),
    "backward rounds products": ("interleaved, rounded, back, *tile", "interleaved, rounded or back, back, *tile", 0),
    "results in the wrong order": ("yq, yk = found[0], found[-1]", "yk, yq = found[0], found[-1]", 0),
}  # fmt: skip
SHARED: dict[str, tuple[str, str, int]] = {
    "second member from the first's place": ("at[:, None] + half + i[None, :], inside, other", "at[:, None] + i[None, :], inside, other", 0),
    "second member to the first's place": ("tl.store(at[:, None] + half + i[None, :], x2", "tl.store(at[:, None] + i[None, :], x2", 0),
    "pairs past the half": ("inside = live[:, None] & (i < half)[None, :]\n        tl.store", "inside = live[:, None]\n        tl.store", 0),
    "tail begins too early": ("n = 2 * half + tl.arange(0, BLOCK_T)\n        tail", "n = half + tl.arange(0, BLOCK_T)\n        tail", 0),
    "tail stored past the head": ("tail.to(dtype), live[:, None] & (n < D)[None, :]", "tail.to(dtype), live[:, None]", 0),
    "neighbours exchanged": ("tl.join(x1.to(dtype), x2.to(dtype))", "tl.join(x2.to(dtype), x1.to(dtype))", 0),
    "half of the neighbours": ("both, live[:, None] & (n < 2 * half)", "both, live[:, None] & (n < half)", 0),
    "sine's sign": ("y1 = x1 * c1 - x2 * s1", "y1 = x1 * c1 + x2 * s1", 0),
    "one cosine for both": ("y2 = x2 * c2 + x1 * s2", "y2 = x2 * c1 + x1 * s2", 0),
    "one sine for both": ("y2 = x2 * c2 + x1 * s2", "y2 = x2 * c2 + x1 * s1", 0),
    "a product not rounded": ("(x1 * s2).to(like).to(tl.float32)", "(x1 * s2)", 0),
    "batch ignored": ("(b * b_stride + s * s_stride)", "(s * s_stride)", 0),
    "positions ignored": ("    if POSITIONS:", "    if False:", 0),
    "positions beyond the table": ("known = inside & (row >= 0) & (row < rows)", "known = inside", 0),
    "sections ignored": ("    if MROPE:", "    if False:", 0),
    "third section left out": ("(i >= h_start).to(tl.int64) + (i >= w_start).to(tl.int64)", "(i >= h_start).to(tl.int64)", 0),
    "sine from the cosine": ("s1 = tl.load(sin_ptr + at, known", "s1 = tl.load(cos_ptr + at, known", 0),
    "neighbours' entries as halves": ("at += 2 * i[None, :]", "at += i[None, :]", 0),
    "compact entries as halves": ("c2, s2 = c1, s1", "c2, s2 = s1, c1", 0),
}  # fmt: skip
KINDS = (
    {},
    {"interleaved": True},
    {"compact": True, "positions": True},
    {"mrope": True, "heads_first": True},
    {"sequences": True},
)


def problems() -> list[Problem]:
    """Small problems of every kind in both castings, NaN between the rows of q."""
    found = []
    for casting in ("llama", "fp32"):
        for seed, kind in enumerate(KINDS):
            shape = Shape("mutant", 2, 19, 9, 4, 20, 14)
            options = {"casting": casting, **kind}
            problem = random(shape, torch.bfloat16, seed=seed, **options)
            inputs = {name: apart(t) for name, t in problem.inputs.items()}
            found.append(replace(problem, inputs=inputs))
    odd = random(Shape("no_tail", 2, 5, 3, 1, 10, 10), torch.bfloat16, seed=7, casting="fp32")
    return [*found, odd, beyond()]


@pytest.fixture(autouse=True)
def _several_heads_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "PROGRAMS", 0.25)


def beyond() -> Problem:
    """Positions outside a table that fills its memory: reading them is out of bounds."""
    shape = Shape("beyond", 1, 3, 1, 0, 4, 4)
    problem = random(shape, torch.float32, seed=0, compact=True, positions=True)
    table = problem.options["cos"].shape[0]
    return problem.given(positions=torch.tensor([0, table - 1, table - 1]))


def test_the_kernels_as_they_are_pass() -> None:
    assert caught(CONTRACT, fused, turn.__name__, problems()) is None


@pytest.mark.parametrize("mutant", KERNEL)
def test_bug_in_the_kernel_is_caught(mutant: str, tmp_path: Path) -> None:
    with planted(turn, Mutant(*KERNEL[mutant]), tmp_path) as module:
        assert caught(CONTRACT, fused, module, problems()) is not None, "nobody noticed"


@pytest.mark.parametrize("mutant", SHARED)
def test_bug_in_the_shared_pieces_is_caught(
    mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with planted(heads, Mutant(*SHARED[mutant]), tmp_path) as name:
        module = __import__(name)
        for shared in ("load_angles", "load_features", "store_features", "turned"):
            monkeypatch.setattr(turn, shared, getattr(module, shared))
        if mutant == "positions beyond the table":
            assert reads_beyond(turn) is not None
        else:
            assert caught(CONTRACT, fused, turn.__name__, problems()) is not None, "nobody noticed"


def reads_beyond(module: ModuleType) -> str | None:
    """What happens with a position past the table: NaN, or what the sanitizer says."""
    from support.interpreter import SanitizerError, sanitized

    q, table = torch.ones(1, 1, 1, 4), torch.ones(3, 2)
    try:
        with sanitized():
            far = torch.tensor([10**6])
            y, *_ = module.forward(q, None, table, table, far, None, 4, False, "fp32")
    except SanitizerError as error:
        return str(error)
    return None if y.isnan().all() else "a number"


def test_nothing_reads_beyond_the_table() -> None:
    assert reads_beyond(turn) is None
