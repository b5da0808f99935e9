"""Attention's backward in a single pass for Hopper, emulated: contract, schedules, who takes it.

One schedule a case by default, twenty with HYPOTHESIS_PROFILE=nightly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import swathe.kernels.attention._gluon_backward as split
import swathe.kernels.attention._gluon_fused as launchers
from support.attention_gluon_backward import Call, call_of, contract_of, misses
from support.gluon import emulated
from swathe.kernels.attention import _gluon_sm90 as strict
from swathe.kernels.attention import _triton as portable
from swathe.kernels.attention import paths
from swathe.kernels.attention.contract import CONTRACT, random
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
    "one of each": (Shape("", 1, 1, 1, 1, 1, 64, 16), "plain", BF16, {}),
    "a narrow window": (Shape("", 1, 1, 1, 140, 400, 64, 64), "window", BF16, {"window": 9}),
    "documents": (Shape("", 1, 1, 1, 200, 200, 64, 64), "packed", BF16, {}),
    "chunks": (Shape("", 1, 1, 1, 150, 150, 64, 64), "causal", BF16, {"chunk": 40}),
    "groups of heads": (Shape("", 1, 4, 2, 40, 140, 64, 64), "causal", BF16, {}),
    "groups over many tiles": (Shape("", 1, 4, 1, 200, 260, 64, 64), "window", FP16, {}),
    "softcap, ALiBi and sinks": (Shape("", 2, 2, 2, 40, 130, 64, 64), "scores", BF16, {}),
    "negative scale": (Shape("", 1, 1, 1, 70, 140, 64, 64), "causal", BF16, {"scale": -0.2}),
    "no scale": (Shape("", 1, 1, 1, 70, 140, 64, 64), "causal", BF16, {"scale": 0.0}),
    "features that fill no box": (Shape("", 1, 2, 2, 70, 90, 104, 24), "causal", BF16, {}),
    "128": (Shape("", 1, 1, 1, 130, 200, 128, 128), "causal", BF16, {}),
    "128 in fp16, by groups": (Shape("", 1, 2, 1, 70, 140, 128, 128), "window", FP16, {}),
    "values wider than keys": (Shape("", 1, 1, 1, 70, 140, 64, 128), "causal", BF16, {}),
    "keys wider than values": (Shape("", 1, 1, 1, 70, 140, 128, 64), "causal", BF16, {}),
}


def problem_of(name: str) -> Problem:
    shape, kind, dtype, given = CASES[name]
    return random(shape, dtype, seed=len(name), kind=kind).given(**given)


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
    problem = random(Shape("pool", 1, 2, 1, 140, 400, 64, 64), dtype, seed=3, kind=kind)
    with emulated(seed=5):
        measure(contract, report, Case("", problem), "gluon")
    report.settle(partial(bound_of, contract))


def gradients(call: Call, seed: int = 0, of: ModuleType = launchers) -> tuple[Tensor, ...]:
    """dq, dk, dv and stats."""
    with emulated(seed=seed):
        return of.backward(*call.arguments)


def test_schedules_give_the_same_bits_but_for_what_is_added_up() -> None:
    call = call_of(random(Shape("", 1, 2, 1, 140, 500, 64, 64), BF16, seed=2, kind="causal"))
    once, again = gradients(call, 1), gradients(call, 2)
    assert all(torch.equal(a, b) for a, b in zip(once[1:3], again[1:3], strict=True))
    assert torch.allclose(once[0].float(), again[0].float(), rtol=2**-7, atol=1e-5)


def test_keys_have_the_bits_of_two_kernels() -> None:
    call = call_of(problem_of("softcap, ALiBi and sinks"))
    (_, dk, dv, stats), (_, dk_of_two, dv_of_two, stats_of_two) = (
        gradients(call), gradients(call, of=split)
    )  # fmt: skip
    assert torch.equal(dk, dk_of_two) and torch.equal(dv, dv_of_two)
    T = call.q.shape[2]
    assert torch.equal(stats[..., :T], stats_of_two[..., :T])


def test_rows_that_see_nothing_have_no_gradient() -> None:
    problem = random(Shape("", 1, 1, 1, 200, 40, 64, 64), BF16, seed=5, kind="causal")
    dq, dk, dv, stats = gradients(call_of(problem))
    assert (dq[:, :, :160] == 0).all() and (stats[0, 0, 0, :160] == torch.inf).all()
    assert all(t.isfinite().all() for t in (dq, dk, dv)) and dk.any() and dv.any()


def test_an_expanded_gradient_is_copied_for_the_tma() -> None:
    call = call_of(random(Shape("", 1, 2, 2, 70, 70, 64, 64), BF16, seed=7))
    flat = call.do[:, :1, :, :1].expand_as(call.do)
    found = gradients(call._replace(do=flat))
    dense = gradients(call._replace(do=flat.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(found[1:3], dense[1:3], strict=True))


def test_gradients_lie_as_their_inputs_do() -> None:
    call = call_of(random(Shape("", 2, 2, 2, 70, 90, 64, 64), BF16, seed=8))
    dq, dk, dv, _ = gradients(call._replace(k=call.k.contiguous()))
    assert dk.is_contiguous() and not dv.is_contiguous()
    assert dq.stride() == call.q.stride() and dv.stride() == call.v.stride()


def test_no_gradient_for_lse_is_a_gradient_of_zeros() -> None:
    call = call_of(random(Shape("", 1, 1, 1, 70, 90, 64, 64), BF16, seed=9, kind="causal"))
    none = gradients(call._replace(dlse=None))
    zeros = gradients(call._replace(dlse=torch.zeros_like(call.lse)))
    assert all(torch.equal(a, b) for a, b in zip(none[:3], zeros[:3], strict=True))


def test_nothing_to_do_launches_nothing() -> None:
    for shape in (Shape("", 0, 2, 1, 3, 4, 64, 64), Shape("", 1, 2, 1, 0, 4, 64, 64)):
        with emulated() as stats:
            _, dk, dv, _ = launchers.backward(*call_of(random(shape, BF16, seed=1)).arguments)
        assert stats.programs == 0 and not dk.any() and not dv.any()


@pytest.fixture
def any_order() -> None:
    """Order of sums as users have it by default; after the fixture that fills memory."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def taken(any_order: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Which of the two backwards backend "triton" takes, in order; neither runs."""
    found: list[str] = []
    for name, module in (("gluon", strict), ("gluon_fused", launchers)):
        monkeypatch.setattr(module, "backward", lambda *_, name=name: found.append(name))
    with emulated():
        yield found


def test_the_path_that_was_asked_for_is_taken(taken: list[str]) -> None:
    call = call_of(problem_of("one row"))
    for path in ("gluon", "gluon_fused", "gluon"):
        with paths.forced(path):
            portable.backward(*call.arguments)
    assert taken == ["gluon", "gluon_fused", "gluon"]


def test_determinism_forbids_it(taken: list[str]) -> None:
    call = call_of(problem_of("one row"))
    with paths.forced("gluon_fused"):
        torch.use_deterministic_algorithms(True)
        try:
            portable.backward(*call.arguments)
        finally:
            torch.use_deterministic_algorithms(False)
        portable.backward(*call.arguments)
    assert taken == ["gluon", "gluon_fused"]


@pytest.mark.parametrize("path", ["gluon", "gluon_fused"])
def test_backend_triton_goes_where_it_is_told(
    path: str, any_order: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = random(Shape("tile", 1, 4, 2, 70, 190, 64, 64), BF16, seed=1).given(causal=True)
    gold, calls, backward = CONTRACT.gold(problem), [], launchers.backward
    monkeypatch.setattr(launchers, "backward", lambda *given: calls.append(0) or backward(*given))
    with paths.forced(path), emulated(seed=1):
        found = problem.run(CONTRACT.on("triton"))
    assert len(calls) == (path == "gluon_fused")
    for name, ours in found.items():
        assert (ours - gold[name]).norm() <= 0.01 * gold[name].norm(), name


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_served(name: str, any_order: None) -> None:
    call = call_of(problem_of(name))
    with emulated():
        assert launchers.why_not(call.q, call.k, call.v, call.rows) is None


@pytest.mark.parametrize(
    ("D", "E", "kind"),
    [(256, 256, "plain"), (192, 128, "plain"), (32, 32, "plain"), (64, 80, "plain"),
     (128, 128, "scores"), (64, 128, "scores")],
)  # fmt: skip
def test_what_it_does_not_serve_goes_to_two_kernels(
    D: int, E: int, kind: str, taken: list[str]
) -> None:
    call = call_of(random(Shape("", 1, 1, 1, 5, 9, D, E), BF16, seed=1, kind=kind))
    reason = launchers.why_not(call.q, call.k, call.v, call.rows)
    assert reason is not None and "allowed: " in reason
    with paths.forced("gluon_fused"):
        portable.backward(*call.arguments)
    assert taken == ["gluon"]
