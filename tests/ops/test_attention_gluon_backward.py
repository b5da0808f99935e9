"""Attention's backward for Hopper, run by the emulator: the contract, schedules, mixed paths.

One schedule a case by default, twenty with HYPOTHESIS_PROFILE=nightly.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import swathe.kernels.attention._gluon as forward_launchers
import swathe.kernels.attention._gluon_backward as launchers
import swathe.kernels.attention._triton as portable
from support.attention_gluon_backward import Call, call_of, contract_of, misses
from support.gluon import emulated
from swathe.kernels.attention.contract import random
from swathe.kernels.attention.shapes import Shape
from swathe.kernels.core.contract import Case, Problem, bound_of, measure
from swathe.kernels.core.testing import Report

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are emulated here")

BF16, FP16 = torch.bfloat16, torch.float16
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
SEEDS = range(20 if NIGHTLY else 1)
# shape, kind, dtype, and what else is given
CASES: dict[str, tuple[Shape, str, torch.dtype, dict[str, Any]]] = {
    "whole tiles": (Shape("", 1, 1, 1, 128, 256, 64, 64), "plain", BF16, {}),
    "causal over three row tiles": (Shape("", 1, 1, 1, 300, 300, 64, 64), "causal", BF16, {}),
    "fewer keys than rows": (Shape("", 1, 1, 1, 200, 70, 64, 64), "causal", FP16, {}),
    "one row": (Shape("", 2, 2, 1, 1, 130, 64, 64), "causal", BF16, {}),
    "one of each": (Shape("", 1, 1, 1, 1, 1, 16, 16), "plain", BF16, {}),
    "a narrow window": (Shape("", 1, 1, 1, 140, 400, 64, 64), "window", BF16, {"window": 9}),
    "ahead only": (Shape("", 1, 1, 1, 130, 270, 64, 64), "plain", BF16, {"ahead": 60}),
    "documents": (Shape("", 1, 1, 1, 200, 200, 64, 64), "packed", BF16, {}),
    "chunks": (Shape("", 1, 1, 1, 150, 150, 64, 64), "causal", BF16, {"chunk": 40}),
    "groups of heads": (Shape("", 1, 4, 2, 40, 140, 64, 64), "causal", BF16, {}),
    "softcap, ALiBi and sinks": (Shape("", 2, 2, 2, 40, 130, 64, 64), "scores", BF16, {}),
    "negative scale": (Shape("", 1, 1, 1, 70, 140, 64, 64), "causal", BF16, {"scale": -0.2}),
    "no scale": (Shape("", 1, 1, 1, 70, 140, 64, 64), "causal", BF16, {"scale": 0.0}),
    "features that fill no box": (Shape("", 1, 2, 2, 70, 90, 72, 24), "causal", BF16, {}),
    "two boxes": (Shape("", 1, 1, 1, 129, 200, 80, 80), "causal", BF16, {}),
    "128": (Shape("", 1, 1, 1, 130, 200, 128, 128), "causal", BF16, {}),
    "128 and a softcap": (Shape("", 1, 1, 1, 70, 140, 128, 128), "scores", FP16, {}),
    "192 and 128": (Shape("", 1, 1, 1, 130, 70, 192, 128), "causal", BF16, {}),
    "256": (Shape("", 1, 1, 1, 70, 140, 256, 256), "causal", BF16, {}),
    "256 and a softcap": (Shape("", 1, 1, 1, 70, 70, 256, 256), "scores", BF16, {}),
    "values wider than keys": (Shape("", 1, 1, 1, 70, 90, 64, 256), "causal", BF16, {}),
    "keys wider than values": (Shape("", 1, 1, 1, 70, 90, 256, 64), "causal", BF16, {}),
}


def problem_of(name: str) -> Problem:
    shape, kind, dtype, given = CASES[name]
    problem = random(shape, dtype, seed=len(name), kind=kind).given(**given)
    return problem.given(causal=False) if "ahead" in given else problem


@pytest.fixture(scope="module")
def contract() -> Any:
    return contract_of(launchers.backward)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CASES)
def test_single_elements(name: str, seed: int, contract: Any) -> None:
    with emulated(seed=31 * seed + len(name)) as stats:
        assert misses(contract, problem_of(name)) == []
    assert 0 < stats.shared_bytes <= 232_448


@pytest.mark.parametrize("kind", ["causal", "scores"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_pooled_errors(dtype: torch.dtype, kind: str, contract: Any) -> None:
    report = Report("backward")
    problem = random(Shape("pool", 1, 2, 1, 140, 200, 64, 64), dtype, seed=3, kind=kind)
    with emulated(seed=5):
        measure(contract, report, Case("", problem), "gluon")
    report.settle(partial(bound_of, contract))


def test_forward_and_backward_are_one_attention() -> None:
    both = contract_of(launchers.backward, forward_launchers.forward)
    with emulated(seed=1):
        assert misses(both, problem_of("one row")) == []


def gradients(call: Call, seed: int = 0) -> tuple[Tensor, ...]:
    """dq, dk, dv and stats."""
    with emulated(seed=seed):
        return launchers.backward(*call.arguments)


def test_schedules_give_the_same_bits() -> None:
    call = call_of(random(Shape("", 1, 2, 1, 140, 140, 64, 64), BF16, seed=2, kind="causal"))
    once, again = gradients(call, 1), gradients(call, 2)
    assert all(torch.equal(a, b) for a, b in zip(once[:3], again[:3], strict=True))


def test_sequences_do_not_depend_on_the_batch() -> None:
    problem = random(Shape("", 3, 2, 1, 70, 150, 64, 64), BF16, seed=4, kind="causal")
    whole = gradients(call_of(problem))
    alone = gradients(call_of(problem.map(lambda t: t[1:2])))
    assert all(torch.equal(a[1:2], b) for a, b in zip(whole[:3], alone[:3], strict=True))


def test_rows_that_see_nothing_have_no_gradient() -> None:
    problem = random(Shape("", 1, 1, 1, 200, 40, 64, 64), BF16, seed=5, kind="causal")
    dq, dk, dv, stats = gradients(call_of(problem))
    assert (dq[:, :, :160] == 0).all() and (stats[0, 0, 0, :160] == torch.inf).all()
    assert all(t.isfinite().all() for t in (dq, dk, dv)) and dk.any() and dv.any()


def test_an_expanded_gradient_arrives_as_its_copy_would() -> None:
    call = call_of(random(Shape("", 1, 2, 2, 70, 70, 64, 64), BF16, seed=7))
    flat = call.do[:, :1, :, :1].expand_as(call.do)
    assert flat.stride(3) == 0
    found = gradients(call._replace(do=flat))
    dense = gradients(call._replace(do=flat.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))


def test_gradients_lie_as_their_inputs_do() -> None:
    call = call_of(random(Shape("", 2, 2, 2, 70, 90, 64, 64), BF16, seed=8))
    dq, dk, dv, _ = gradients(call._replace(k=call.k.contiguous()))
    assert dk.is_contiguous() and not dv.is_contiguous()
    assert dq.stride() == call.q.stride() and dv.stride() == call.v.stride()


def test_no_gradient_for_lse_is_a_gradient_of_zeros() -> None:
    problem = random(Shape("", 1, 1, 1, 70, 90, 64, 64), BF16, seed=9, kind="causal")
    call = call_of(problem)
    none = gradients(call._replace(dlse=None))
    zeros = gradients(call._replace(dlse=torch.zeros_like(call.lse)))
    assert all(torch.equal(a, b) for a, b in zip(none, zeros, strict=True))


def test_nothing_to_do_launches_nothing() -> None:
    for shape in (Shape("", 0, 2, 1, 3, 4, 64, 64), Shape("", 1, 2, 1, 0, 4, 64, 64)):
        with emulated() as stats:
            _, dk, dv, _ = launchers.backward(*call_of(random(shape, BF16, seed=1)).arguments)
        assert stats.programs == 0 and not dk.any() and not dv.any()


MIXED = ("documents", "softcap, ALiBi and sinks")


@pytest.mark.parametrize("name", MIXED)
def test_the_portable_kernel_for_keys_follows_this_one_for_queries(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys(do: Tensor, *rest: Any) -> None:
        portable._backward_kv(*(do.transpose(1, 2), *rest[:-2], rest[-1], 128))

    monkeypatch.setattr(launchers, "backward_kv", keys)
    with emulated(seed=3):
        assert misses(contract_of(launchers.backward), problem_of(name)) == []


@pytest.mark.parametrize("name", MIXED)
def test_this_kernel_for_keys_follows_the_portable_one_for_queries(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys(do: Tensor, *rest: Any) -> None:
        assert rest[-1] == 128
        launchers.backward_kv(*(do.transpose(1, 2), *rest[:-2], None, rest[-2]))

    monkeypatch.setattr(portable, "_backward_kv", keys)
    with emulated(seed=4):
        assert misses(contract_of(portable.backward), problem_of(name)) == []


def test_stats_are_the_portable_kernels() -> None:
    problem = random(Shape("", 2, 1, 1, 150, 90, 64, 64), BF16, seed=6, kind="window")
    call = call_of(problem)
    ours, theirs = gradients(call)[3], portable.backward(*call.arguments)[3]
    assert torch.equal(ours[:, :, 0], theirs[:, :, 0])
    assert torch.allclose(ours[:, :, 1], theirs[:, :, 1], rtol=1e-5, atol=1e-5)


def test_every_pair_of_head_sizes_has_tiles() -> None:
    for D in range(8, 257, 8):
        for E in range(8, 257, 8):
            for scored in (False, True):
                of_q, of_kv = launchers.blocks_for(D, E, scored)
                assert of_q.k_stages > 1 and of_kv.stages > 1, "waits look one tile ahead"
                assert 128 % of_kv.queries == 0
