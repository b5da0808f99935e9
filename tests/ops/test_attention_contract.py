"""attention's fused backends: the numerical contract, and what must not change a single bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from support.interpreter import sanitized
from support.tensors import DEVICE, DTYPES
from swathe.kernels.attention.contract import CONTRACT, GROUPS, gold, magnitudes, random, share
from swathe.kernels.attention.shapes import Shape
from swathe.kernels.core.contract import Outputs, Problem, check
from swathe.kernels.core.testing import elementwise_miss

OP = "attention"
BF16, FP32 = torch.bfloat16, torch.float32
# two tiles of queries and three of keys
SMALL = Shape("small", 1, 2, 1, 130, 140, 32, 32)
PAIRS = Shape("pairs", 2, 4, 2, 35, 70, 16, 16)
ROWS = ("o", "lse", "dq")  # a result for each query, the others for each key


def shuffled(seed: int) -> AbstractContextManager[object]:
    """Programs in a drawn order under the sanitizer, where they are interpreted."""
    return sanitized(order="random", seed=seed) if DEVICE == "cpu" else nullcontext()


def drawn(kind: str = "plain", shape: Shape = SMALL, dtype: torch.dtype = BF16) -> Problem:
    return random(shape, dtype, seed=7, device=DEVICE, kind=kind)


def run(problem: Problem, backend: str) -> Outputs:
    return problem.run(CONTRACT.on(backend))


def same(found: Outputs, expected: Outputs, names: tuple[str, ...] | None = None) -> None:
    for name in names or tuple(found):
        assert torch.equal(found[name], expected[name]), name


def changed(problem: Problem, **tensors: Tensor) -> Problem:
    """The same call with other tensors; o and lse are what arrives there."""
    arriving = {n: tensors.pop(n) for n in ("o", "lse") if n in tensors}
    return replace(
        problem,
        inputs={**problem.inputs, **tensors},
        arriving={**problem.arriving, **arriving},
    )


def of_rows(problem: Problem, rows: slice, keys: slice | None = None) -> Problem:
    """The same call for some queries, and keys, alone."""
    keys = rows if keys is None else keys
    q, k, v = (problem.inputs[n] for n in ("q", "k", "v"))
    o, lse = problem.arriving["o"][:, rows], problem.arriving["lse"][:, :, rows]
    return changed(problem, q=q[:, :, rows], k=k[:, :, keys], v=v[:, :, keys], o=o, lse=lse)


def within_bounds(found: Outputs, problem: Problem) -> None:
    """Each element as near to fp64 as the contract asks."""
    exact, sizes = gold(problem), magnitudes(problem)
    for name, value in found.items():
        allowed = share(name, problem)
        assert elementwise_miss(name, value, exact[name], sizes[name], share=allowed) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_contract(backend: str, group: str, dtype: torch.dtype) -> None:
    with shuffled(seed=1):
        report = check(CONTRACT, backend, device=DEVICE, dtypes=[dtype], groups=[group])
    assert {row["dtype"] for row in report.rows()} == {str(dtype).removeprefix("torch.")}


def test_a_wrong_row_is_a_miss() -> None:
    problem = drawn("causal")
    found = run(problem, "eager")
    found["dk"][0, 0, 60] *= 1.2
    with pytest.raises(AssertionError):
        within_bounds(found, problem)


def test_order_of_batch_and_heads_changes_nothing(backend: str) -> None:
    problem = drawn("scores", PAIRS)
    whole = run(problem, backend)
    flipped = problem.map(lambda t: t.flip(0) if t.dim() > 1 else t)
    for name, value in run(flipped, backend).items():
        expected = whole[name] if name == "dsinks" else whole[name].flip(0)
        if name == "dsinks":  # a sum over the batch, whose order is another
            torch.testing.assert_close(value, expected)
        else:
            assert torch.equal(value, expected), name
    # groups of query heads move with their key head
    heads, groups = torch.tensor([2, 3, 0, 1], device=DEVICE), torch.tensor([1, 0], device=DEVICE)
    inputs = {
        n: t[heads] if t.dim() == 1 else t[:, heads if n == "q" else groups]
        for n, t in problem.inputs.items()
    }
    arriving = {"o": problem.arriving["o"][:, :, heads], "lse": problem.arriving["lse"][:, heads]}
    moved = replace(problem, inputs=inputs, arriving=arriving)
    found = run(moved.given(alibi=problem.options["alibi"][heads]), backend)
    by_head = {"o": (2, heads), "lse": (1, heads), "dq": (1, heads), "dsinks": (0, heads)}
    for name, value in found.items():
        dim, order = by_head.get(name, (1, groups))
        assert torch.equal(value, whole[name].index_select(dim, order)), name


def test_a_sequence_is_the_same_alone_and_in_any_batch(backend: str) -> None:
    problem = drawn("causal", SMALL._replace(B=3))
    whole = run(problem, backend)
    alone = run(problem.map(lambda t: t[1:2]), backend)
    same(alone, {name: value[1:2] for name, value in whole.items()})


def test_the_last_queries_are_the_same_alone(backend: str) -> None:
    problem = drawn("causal")
    whole = run(problem, backend)
    for count in (1, 33):
        rows = slice(130 - count, 130)
        alone = run(of_rows(problem, rows, slice(None)), backend)
        for name in ROWS:
            expected = whole[name][:, rows] if name == "o" else whole[name][:, :, rows]
            if DEVICE == "cpu":  # numpy's products depend on where in a tile a row lies
                torch.testing.assert_close(alone[name], expected, rtol=2.0**-7, atol=2e-6)
            else:
                assert torch.equal(alone[name], expected), name


@pytest.mark.parametrize("kind", ["plain", "scores", "packed"])
def test_reruns_in_any_order_are_bit_equal(backend: str, kind: str) -> None:
    problem = drawn(kind)
    first = run(problem, backend)
    for seed in (1, 2):
        with shuffled(seed):
            same(run(problem, backend), first)


def test_a_tail_of_padding_changes_nothing(backend: str) -> None:
    problem = drawn()
    wider = SMALL._replace(S=210)
    filler = drawn(shape=wider).inputs
    ends = torch.full((1,), 140, device=DEVICE)
    k, v = (torch.cat((problem.inputs[n], filler[n][:, :, 140:]), 2) for n in ("k", "v"))
    padded = run(changed(problem, k=k, v=v).given(end=ends), backend)
    expected = run(problem, backend)
    for name in ("dk", "dv"):
        assert not padded[name][:, :, 140:].any()
        padded[name] = padded[name][:, :, :140]
    same(padded, expected)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_a_power_of_two_passes_through_v(backend: str, dtype: torch.dtype) -> None:
    problem = drawn("causal", dtype=dtype)
    expected = run(problem, backend)
    larger = changed(problem, v=8 * problem.inputs["v"], lse=8 * problem.arriving["lse"])
    found = run(larger, backend)
    for name, value in expected.items():
        assert torch.equal(found[name], value if name in ("lse", "dv") else 8 * value), name


def test_rows_do_not_see_the_future(backend: str) -> None:
    problem = drawn("causal", SMALL._replace(S=130))
    k, v = (problem.inputs[n].clone() for n in ("k", "v"))
    k[:, :, 70:], v[:, :, 70:] = 99.0, -77.0
    before, after = run(problem, backend), run(changed(problem, k=k, v=v), backend)
    for name in ROWS:
        rows = (slice(None), slice(70)) if name == "o" else (slice(None), slice(None), slice(70))
        assert torch.equal(after[name][rows], before[name][rows]), name
    assert not torch.equal(after["o"], before["o"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_weights_of_a_row_add_up_to_one(backend: str, dtype: torch.dtype) -> None:
    problem = drawn("causal", SMALL, dtype)
    o = run(changed(problem, v=torch.ones_like(problem.inputs["v"])), backend)["o"]
    # the largest weight of a row is exact, so that the others' roundings stay below half a unit
    assert (o.double() - 1).abs().max() <= (2.0**-21 if dtype == FP32 else 0.0)


def test_groups_are_repeated_keys(backend: str) -> None:
    problem = drawn("gqa", PAIRS)
    q, k, v = (problem.inputs[n] for n in ("q", "k", "v"))
    repeated = changed(problem, k=k.repeat_interleave(2, 1), v=v.repeat_interleave(2, 1))
    grouped, found = run(problem, backend), run(repeated, backend)
    same(found, grouped, ROWS)
    # each of a group's gradients is rounded before they are added
    for name in ("dk", "dv"):
        found[name] = found[name].float().unflatten(1, (2, 2)).sum(2).to(q.dtype)
    within_bounds({name: found[name] for name in ("dk", "dv")}, problem)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_documents_on_tile_borders_are_the_documents_alone_bit_for_bit(
    backend: str, dtype: torch.dtype
) -> None:
    problem = drawn("causal", Shape("packed", 1, 2, 1, 256, 256, 32, 32), dtype)
    borders = torch.tensor([0, 128, 256], device=DEVICE)
    packed = run(problem.given(causal=True, cu_seqlens=borders), backend)
    for rows in (slice(0, 128), slice(128, 256)):
        alone = run(of_rows(problem, rows), backend)
        part = {n: t[:, rows] if n == "o" else t[:, :, rows] for n, t in packed.items()}
        same(alone, part)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_documents_anywhere_are_the_documents_alone_within_bounds(
    backend: str, dtype: torch.dtype
) -> None:
    problem = drawn("causal", Shape("packed", 1, 2, 1, 79, 79, 32, 32), dtype)
    borders = torch.tensor([0, 5, 45, 46, 46, 79], device=DEVICE)
    packed = run(problem.given(causal=True, cu_seqlens=borders), backend)
    for start, end in ((0, 5), (5, 45), (45, 46), (46, 79)):
        rows = slice(start, end)
        part = {n: t[:, rows] if n == "o" else t[:, :, rows] for n, t in packed.items()}
        within_bounds(part, of_rows(problem, rows))


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_query_stays_in_its_row(backend: str, bad: float) -> None:
    problem = drawn("causal", PAIRS)
    q = problem.inputs["q"].clone()
    q[1, 2, 27, 3] = bad
    before, after = run(problem, backend), run(changed(problem, q=q), backend)
    places: dict[str, Callable[[Tensor], Tensor]] = {
        "o": lambda t: t[1, 27, 2],
        "lse": lambda t: t[1, 2, 27],
        "dq": lambda t: t[1, 2, 27],
    }
    for name, place in places.items():
        assert not place(after[name]).isfinite().any(), name
        place(after[name]).copy_(place(before[name]))
    # the keys that it sees get its gradient, those of the other sequence and head do not
    for name in ("dk", "dv"):
        assert not after[name][1, 1, :60].isfinite().any(), name
        after[name][1, 1] = before[name][1, 1]
    same(after, before)


@pytest.mark.parametrize("name", ["k", "v"])
def test_a_bad_key_stays_in_its_head(backend: str, name: str) -> None:
    problem = drawn("causal", PAIRS._replace(T=70))
    bad = problem.inputs[name].clone()
    bad[1, 1, 69] = torch.nan
    before = run(problem, backend)
    after = run(changed(problem, **{name: bad}), backend)
    for found in ROWS:
        last = after[found][1, 69, 2:] if found == "o" else after[found][1, 2:, 69]
        assert last.isnan().all() or (name, found) == ("v", "lse"), found
    # nothing changes in other heads and sequences
    for found, value in after.items():
        head = (slice(None), slice(None), slice(2)) if found == "o" else (slice(None), slice(2))
        head = head if found in ROWS else (slice(None), slice(1))
        assert torch.equal(value[head], before[found][head]), found
        assert torch.equal(value[0], before[found][0]), found
