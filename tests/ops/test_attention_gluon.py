"""Attention's forward for Hopper, run by the emulator: the contract, schedules, and refusals.

One schedule a case by default, twenty with HYPOTHESIS_PROFILE=nightly.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import swathe.kernels.attention._gluon as launchers
from support.attention_gluon import forward_contract, misses, rows_of
from support.gluon import emulated
from swathe.kernels.attention._gluon_blocks import boxes, forward_blocks
from swathe.kernels.attention.contract import random, spec_of
from swathe.kernels.attention.shapes import Shape
from swathe.kernels.core.contract import Case, Problem, bound_of, measure
from swathe.kernels.core.testing import Report

BF16, FP16 = torch.bfloat16, torch.float16
SEEDS = range(20 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 1)
# shape, kind, dtype, and what else is given
CASES: dict[str, tuple[Shape, str, torch.dtype, dict[str, Any]]] = {
    "whole tiles": (Shape("", 1, 1, 1, 128, 256, 64, 64), "plain", BF16, {}),
    "causal over three row tiles": (Shape("", 1, 1, 1, 270, 270, 64, 64), "causal", BF16, {}),
    "fewer keys than rows": (Shape("", 1, 1, 1, 200, 70, 64, 64), "causal", FP16, {}),
    "one row": (Shape("", 2, 2, 1, 1, 130, 64, 64), "causal", BF16, {}),
    "one of each": (Shape("", 1, 1, 1, 1, 1, 16, 16), "plain", BF16, {}),
    "a narrow window": (Shape("", 1, 1, 1, 140, 400, 64, 64), "window", BF16, {"window": 9}),
    "a wide window": (Shape("", 1, 1, 1, 130, 520, 64, 64), "window", BF16, {"window": 300}),
    "ahead only": (Shape("", 1, 1, 1, 130, 270, 64, 64), "plain", BF16, {"ahead": 60}),
    "documents": (Shape("", 1, 2, 2, 280, 280, 64, 64), "packed", BF16, {}),
    "documents of other keys": (Shape("", 1, 2, 1, 150, 260, 64, 64), "packed", BF16, {}),
    "chunks": (Shape("", 1, 1, 1, 150, 150, 64, 64), "causal", BF16, {"chunk": 40}),
    "groups of heads": (Shape("", 2, 4, 2, 66, 70, 64, 64), "causal", BF16, {}),
    "softcap, ALiBi and sinks": (Shape("", 2, 2, 2, 66, 140, 64, 64), "scores", BF16, {}),
    "negative scale": (Shape("", 1, 1, 1, 70, 140, 64, 64), "causal", BF16, {"scale": -0.2}),
    "no scale": (Shape("", 1, 1, 1, 70, 140, 64, 64), "causal", BF16, {"scale": 0.0}),
    "features that fill no box": (Shape("", 1, 2, 2, 70, 90, 72, 24), "causal", BF16, {}),
    "two boxes": (Shape("", 1, 1, 1, 129, 200, 80, 80), "causal", BF16, {}),
    "zeros in one box": (Shape("", 1, 1, 1, 70, 140, 112, 112), "causal", FP16, {}),
    "128": (Shape("", 1, 1, 1, 130, 270, 128, 128), "causal", BF16, {}),
    "160": (Shape("", 1, 1, 1, 66, 140, 160, 160), "causal", BF16, {}),
    "192 and 128": (Shape("", 1, 1, 1, 140, 270, 192, 128), "causal", BF16, {}),
    "192": (Shape("", 1, 1, 1, 70, 140, 192, 192), "causal", FP16, {}),
    "256": (Shape("", 1, 1, 1, 130, 140, 256, 256), "causal", BF16, {}),
    "values wider than keys": (Shape("", 1, 1, 1, 70, 90, 64, 256), "causal", BF16, {}),
    "keys wider than values": (Shape("", 1, 1, 1, 70, 90, 256, 64), "causal", BF16, {}),
}


def problem_of(name: str) -> Problem:
    shape, kind, dtype, given = CASES[name]
    problem = random(shape, dtype, seed=len(name), kind=kind).given(**given)
    if given.get("ahead"):
        problem = problem.given(causal=False)
    return problem


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CASES)
def test_single_elements(name: str, seed: int) -> None:
    with emulated(seed=31 * seed + len(name)) as stats:
        assert misses(launchers, problem_of(name)) == []
    assert stats.shared_bytes <= 232_448


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_pooled_errors(dtype: torch.dtype) -> None:
    contract = forward_contract(launchers)
    report = Report("forward")
    problem = random(Shape("pool", 1, 2, 1, 90, 300, 64, 64), dtype, seed=3, kind="causal")
    with emulated(seed=5):
        measure(contract, report, Case("", problem), "gluon", backward=False)
    report.settle(partial(bound_of, contract))


def call(problem: Problem, seed: int = 0) -> tuple[Tensor, Tensor]:
    """o and lse2 of a problem."""
    q, k, v = (problem.inputs[name] for name in "qkv")
    with emulated(seed=seed):
        return launchers.forward(q, k, v, *rows_of(spec_of(problem), q, k))


def test_any_number_of_programs_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random(Shape("", 1, 4, 2, 140, 70, 32, 32), BF16, seed=2, kind="causal")
    found = []
    for programs in (1, 3):
        monkeypatch.setattr(launchers, "multiprocessors", lambda _, n=programs: n)
        found.append(call(problem, seed=programs))
    (o, lse), (o_of_three, lse_of_three) = found
    assert torch.equal(o, o_of_three) and torch.equal(lse, lse_of_three)


def test_sections_of_heads_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random(Shape("", 2, 3, 3, 140, 70, 16, 16), BF16, seed=2)
    whole = call(problem)
    monkeypatch.setattr(launchers, "SECTION", 2 * 70 * 32 * 4)  # four of six heads
    apart = call(problem)
    assert torch.equal(whole[0], apart[0]) and torch.equal(whole[1], apart[1])


def test_rows_do_not_depend_on_the_batch() -> None:
    problem = random(Shape("", 3, 2, 1, 70, 150, 64, 64), BF16, seed=4, kind="causal")
    o, lse = call(problem)
    alone = problem.map(lambda t: t[1:2])
    assert torch.equal(call(alone)[0], o[1:2]) and torch.equal(call(alone)[1], lse[1:2])


def test_rows_that_see_nothing_are_zero_whatever_the_values_hold() -> None:
    problem = random(Shape("", 1, 1, 1, 200, 40, 64, 64), BF16, seed=5, kind="causal")
    problem.inputs["v"][:, :, 0] = float("nan")  # only later rows see key 0
    o, lse = call(problem)
    assert (o[:, :160] == 0).all() and (lse[..., :160] == -torch.inf).all()
    assert o[:, 160:].isnan().all() and lse[..., 160:].isfinite().all()


def test_nan_stays_in_its_row() -> None:
    problem = random(Shape("", 1, 1, 1, 130, 130, 64, 64), BF16, seed=6, kind="causal")
    clean, _ = call(problem)
    problem.inputs["q"][:, :, 70] = float("nan")
    o, lse = call(problem)
    assert o[:, 70].isnan().all() and lse[..., 70].isnan().all()
    others = torch.arange(130) != 70
    assert torch.equal(o[:, others], clean[:, others])


def test_views_that_the_copies_can_take_are_read_where_they_lie() -> None:
    problem = random(Shape("", 1, 2, 2, 70, 70, 64, 64), BF16, seed=7)
    dense = call(problem)
    packed = torch.cat([problem.inputs[n].transpose(1, 2) for n in "qkv"], 2)  # (B, T, 3 H, D)
    views = dict(zip("qkv", packed.transpose(1, 2).split(2, 1), strict=True))
    same = call(Problem(views, problem.arriving, problem.options))
    assert torch.equal(same[0], dense[0])


def test_nothing_to_do_launches_nothing() -> None:
    for shape in (Shape("", 0, 2, 1, 3, 4, 64, 64), Shape("", 1, 2, 1, 0, 4, 64, 64)):
        with emulated() as stats:
            call(random(shape, BF16, seed=1))
        assert stats.programs == 0


def test_boxes_hold_every_head_and_every_pair_has_tiles() -> None:
    for D in range(8, 257, 8):
        widths = boxes(D)
        assert sum(widths) >= D > sum(widths) - widths[-1] and all(w >= 16 for w in widths)
        assert sum(widths) < 2 * D or D <= 16
        for E in range(8, 257, 8):
            forward_blocks(D, E)
    assert [boxes(D) for D in (64, 80, 96, 112, 160, 192, 256)] == [
        (64,), (64, 16), (64, 32), (128,), (128, 32), (128, 64), (256,)
    ]  # fmt: skip


def heads(*size: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(size, dtype=dtype)


GOOD = (heads(1, 2, 8, 64), heads(1, 1, 8, 64), heads(1, 1, 8, 64))
ROWS = rows_of(spec_of(Problem(dict(zip("qkv", GOOD, strict=True)), {})), *GOOD[:2])


@pytest.mark.parametrize(
    ("heads_given", "rows", "words"),
    [
        (tuple(t.float() for t in GOOD), {}, "torch.float32; allowed: torch.bfloat16"),
        ((heads(1, 2, 8, 60), *GOOD[1:]), {}, "q has 60 features a head; allowed: multiples of 8"),
        ((heads(1, 2, 8, 264), *GOOD[1:]), {}, "q has 264 features"),
        ((GOOD[0], heads(1, 1, 0, 64), GOOD[2]), {}, "k is empty"),
        ((GOOD[0], GOOD[1], heads(1, 1, 8, 72)[..., 4:68]), {}, "v does not begin"),
        ((heads(1, 2, 8, 68)[..., :64], *GOOD[1:]), {}, "q has strides (1088, 544, 68, 1)"),
        ((GOOD[0].expand(3, 2, 8, 64), *GOOD[1:]), {}, "q has strides (0"),
        (GOOD, {"bias": torch.zeros(1, 1, 8, 8)}, "bias needs a number"),
        (GOOD, {"keys": torch.ones(1, 8)}, "keys needs a number"),
        (GOOD, {"seed": torch.zeros(1)}, "dropout needs a number"),
        (GOOD, {"padded": True}, "may hold NaN"),
    ],
)
def test_refusals_say_what_was_given(
    heads_given: tuple[Tensor, Tensor, Tensor], rows: dict[str, Any], words: str
) -> None:
    reason = launchers.why_not(*heads_given, ROWS._replace(**rows))
    assert reason is not None and words in reason, reason


def test_other_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launchers.why_not(*GOOD, ROWS) is None
    monkeypatch.setattr(launchers, "generation", lambda _: "blackwell")
    reason = launchers.why_not(*GOOD, ROWS)
    assert reason is not None and "'blackwell'; allowed: 'hopper'" in reason
