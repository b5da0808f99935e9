"""Cross-entropy on every backend: the numerical contract, HF's bits, invariances and layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from support.interpreter import sanitized
from support.tensors import DEVICE, DTYPES, fused_backends, rows
from swathe.kernels.core import logits as row_kernels
from swathe.kernels.core.contract import Outputs, Problem, check
from swathe.kernels.core.testing import elementwise_miss
from swathe.kernels.cross_entropy.api import cross_entropy
from swathe.kernels.cross_entropy.contract import CONTRACT, GROUPS, gold, magnitudes, random
from swathe.kernels.cross_entropy.shapes import EDGES, Shape

OP = "cross_entropy"
SHAPE = Shape("small", 6, 40)
WIDTHS = (17, 1025, 4097)


def run(problem: Problem, backend: str) -> Outputs:
    return problem.run(CONTRACT.on(backend))


def within(problem: Problem, ours: Outputs) -> None:
    exact, sizes = gold(problem), magnitudes(problem)
    for name, found in ours.items():
        assert found.shape == exact[name].shape
        assert elementwise_miss(name, found, exact[name], sizes[name]) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_contract(backend: str, group: str, dtype: torch.dtype) -> None:
    report = check(CONTRACT, backend, device=DEVICE, dtypes=[dtype], groups=[group])
    assert [row["output"] for row in report.rows()] == [f"dlogits {group}"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_of_torch_backend(dtype: torch.dtype) -> None:
    check(CONTRACT, "torch", device=DEVICE, dtypes=[dtype], groups=["plain"])


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7), torch.tensor([7.0])], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_definition_is_hf_bit_for_bit(dtype: torch.dtype, num_items: Any) -> None:
    logits = rows(2, 9, 50, dtype=dtype).mul_(3)
    labels = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    labels[0, :4] = -100
    found = []
    for ours in (True, False):
        x = logits.clone().requires_grad_()
        if ours:
            options: dict[str, Any] = {"shift_labels": True, "num_items": num_items}
            loss = cross_entropy(x, labels, implementation="eager", **options)
        else:
            loss = ForCausalLMLoss(x, labels, 50, num_items_in_batch=num_items)
        found.append((loss.detach().reshape(()), *torch.autograd.grad(loss.sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_is_hf_to_fp32(backend: str, dtype: torch.dtype) -> None:
    logits = rows(3, 8, 1030, dtype=dtype).mul_(3)
    labels = torch.randint(0, 1030, (3, 8), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    labels[1] = -100
    theirs = ForCausalLMLoss(logits, labels, 1030)
    ours = cross_entropy(logits, labels, shift_labels=True, implementation=backend)
    assert ours.dtype == torch.float32 and ours.shape == ()
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)


def test_large_logits_lose_nothing(backend: str) -> None:
    # a single lse would keep two digits of the sum's logarithm beside 10^5
    labels = torch.arange(4, device=DEVICE)
    small = rows(4, 300).mul_(8).round_()
    losses = [
        cross_entropy(x, labels, reduction="none", implementation=backend)
        for x in (small, small + 100_000)
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32], ids=str)
def test_ignored_rows_and_labels_of_both_types(backend: str, label_dtype: torch.dtype) -> None:
    for ignore_index in (-100, 3, 0, -1):
        problem = random(SHAPE, torch.float32, seed=1, device=DEVICE, ignore_index=ignore_index)
        labels = problem.options["labels"].to(label_dtype)
        labels[1] = ignore_index
        within(problem.given(labels=labels), run(problem.given(labels=labels), backend))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_label_at_all_is_no_loss(backend: str, reduction: Any) -> None:
    x = rows(4, 50).requires_grad_()
    labels = torch.full((4,), -100, device=DEVICE)
    for name in (backend, "eager"):
        loss = cross_entropy(x, labels, reduction=reduction, z_loss=0.1, implementation=name)
        (dx,) = torch.autograd.grad(loss.sum(), x)
        assert not loss.any() and not dx.any()


def test_nothing_is_read_of_ignored_rows(backend: str) -> None:
    x = rows(4, 50)
    x[2] = float("nan")
    labels = torch.tensor([3, 4, -100, 5], device=DEVICE)
    x.requires_grad_()
    loss = cross_entropy(x, labels, implementation=backend)
    (dx,) = torch.autograd.grad(loss, x)
    assert loss.isfinite() and dx.isfinite().all() and not dx[2].any()


@pytest.mark.parametrize("bad", [50, 49_999, -1, -101, 2**31 - 1, -(2**31)])
def test_a_label_out_of_range_is_nan_and_reads_nothing(backend: str, bad: int) -> None:
    x = rows(3, 50)
    labels = torch.tensor([3, bad, 5], device=DEVICE)
    x.requires_grad_()
    with sanitized():
        losses = cross_entropy(x, labels, reduction="none", implementation=backend)
        (dx,) = torch.autograd.grad(losses.sum(), x)
    assert losses.isnan().tolist() == [False, True, False]
    assert dx.isnan().all(-1).tolist() == [False, True, False]
    assert dx[::2].isfinite().all()
    assert cross_entropy(x, labels, implementation="eager").isnan()


def test_row_is_the_same_alone_and_in_any_batch(backend: str) -> None:
    for V in WIDTHS:
        options: dict[str, Any] = {"reduction": "none", **GROUPS["capped"]}
        problem = random(Shape("batch", 7, V), torch.bfloat16, seed=V, device=DEVICE, **options)
        whole = run(problem, backend)
        order = torch.randperm(7, generator=torch.Generator().manual_seed(V)).to(DEVICE)
        for index in (order, order[:1]):
            part = problem.map(lambda t, i=index: t[i])
            found = run(part, backend)
            assert all(torch.equal(found[name], whole[name][index]) for name in whole)


def test_reruns_are_bit_equal(backend: str) -> None:
    problem = random(Shape("rerun", 20, 1500), torch.bfloat16, seed=0, device=DEVICE)
    first = run(problem, backend)
    with sanitized(order="random", seed=5):
        again = run(problem, backend)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_stays_in_its_row(backend: str, bad: float) -> None:
    for V in WIDTHS:
        clean = random(Shape("nan", 4, V), torch.float32, seed=V, device=DEVICE, reduction="none")
        labels = torch.arange(4, device=DEVICE)
        clean = clean.given(labels=labels)
        x = clean.inputs["logits"].clone()
        x[2, V // 2] = bad
        before, after = run(clean, backend), run(replace(clean, inputs={"logits": x}), backend)
        for name in before:
            assert torch.equal(before[name][[0, 1, 3]], after[name][[0, 1, 3]])
            assert after[name][2].isnan().any()


def test_masked_classes_have_no_part(backend: str) -> None:
    x = rows(3, 1100)
    x[:, 100:1050] = float("-inf")
    labels = torch.tensor([1, 2, 1060], device=DEVICE)
    kept = torch.cat([x[:, :100], x[:, 1050:]], 1)
    moved = torch.tensor([1, 2, 110], device=DEVICE)
    found = []
    for logits, target in ((x, labels), (kept, moved)):
        logits = logits.clone().requires_grad_()
        losses = cross_entropy(logits, target, reduction="none", implementation=backend)
        found.append((losses.detach(), *torch.autograd.grad(losses.sum(), logits)))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert not found[0][1][:, 100:1050].any() and found[0][1].isfinite().all()


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, 1),
    "every_other_row": lambda t: t[:, ::2],
    "part_of_the_classes": lambda t: t[..., 3:70],
    "offset_by_one": lambda t: t.flatten()[1 : 1 + 5 * 64].view(5, 64),
    "expanded": lambda t: t[:1, :1].expand(3, 4, -1),
    "classes_not_adjacent": lambda t: t[..., :10].transpose(0, 2),
    "all_but_the_last": lambda t: t[:, :-1],
    "one_row": lambda t: t[0, 0],
    "no_rows": lambda t: t[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_give_what_contiguous_gives(backend: str, layout: str, dtype: torch.dtype) -> None:
    view = LAYOUTS[layout](rows(4, 6, 96, dtype=dtype))
    labels = torch.randint(0, view.shape[-1], view.shape[:-1]).to(DEVICE)
    arriving = rows(*view.shape[:-1], 2)[..., 0]
    found = []
    for x, target, dy in (
        (view, labels, arriving),
        (view.contiguous(), labels.clone(), arriving.contiguous()),
    ):
        x = x.detach().requires_grad_()
        losses = cross_entropy(x, target, reduction="none", implementation=backend)
        found.append((losses.detach(), *torch.autograd.grad(losses, x, dy)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_expanded_gradients_and_strided_labels(backend: str) -> None:
    x = rows(4, 6, 30).requires_grad_()
    labels = torch.randint(0, 30, (6, 4)).to(DEVICE).t()
    losses = cross_entropy(x, labels, reduction="none", implementation=backend)
    for dy in (torch.tensor(0.5).expand(4, 6), torch.tensor([[1.0], [2], [3], [4]]).expand(4, 6)):
        dy = dy.to(DEVICE)
        (ours,) = torch.autograd.grad(losses, x, dy, retain_graph=True)
        (plain,) = torch.autograd.grad(losses, x, dy.contiguous(), retain_graph=True)
        assert torch.equal(ours, plain)


def test_inputs_are_left_alone_and_outputs_stay_in_bounds(backend: str) -> None:
    problem = random(Shape("kept", 7, 130), torch.bfloat16, seed=0, device=DEVICE)
    before = problem.map(Tensor.clone)
    run(problem, backend)
    assert torch.equal(before.inputs["logits"], problem.inputs["logits"])
    assert torch.equal(before.options["labels"], problem.options["labels"])
    band = torch.full((9, 130), 7.0, device=DEVICE, dtype=torch.bfloat16)
    numbers = (-100, 0.0, 0.0, 1.0, 0.0)
    x, labels = problem.inputs["logits"], problem.options["labels"]
    _, *saved = row_kernels.forward(x, labels, *numbers)
    one = torch.ones((), device=DEVICE)
    row_kernels.write_gradients(one, x, labels, tuple(saved), numbers, band[1:8])
    assert (band[0] == 7).all() and (band[8] == 7).all() and (band[1:8] != 7).all()


def test_what_rounding_took_is_kept(backend: str) -> None:
    del backend
    x, labels = rows(5, 2000).mul_(4), torch.tensor([3, 1999, -100, 1024, 5000], device=DEVICE)
    numbers = (-100, 0.0, 0.0, 1.0, 0.0)
    _, *saved = row_kernels.forward(x, labels, *numbers)
    one, rest = torch.ones((), device=DEVICE), torch.full((5,), 9.0, device=DEVICE)
    exact, rounded = torch.empty_like(x), torch.empty_like(x, dtype=torch.bfloat16)
    row_kernels.write_gradients(one, x, labels, tuple(saved), numbers, exact)
    row_kernels.write_gradients(one, x, labels, tuple(saved), numbers, rounded, rest)
    at = torch.tensor([0, 1, 3]), torch.tensor([3, 1999, 1024])
    assert torch.equal(rest[at[0]], exact[at] - rounded[at].float())
    assert rest[2] == 0 and rest[4] == 0


@given(M=st.integers(0, 5), V=st.integers(1, 300), seed=st.integers(0, 99), pad=st.integers(0, 3),
       dtype=st.sampled_from(DTYPES), reduction=st.sampled_from(["mean", "sum", "none"]),
       softcap=st.sampled_from([None, 2.0, 30.0]), logit_scale=st.sampled_from([1.0, 0.25, -2.0]),
       label_smoothing=st.sampled_from([0.0, 0.1, 1.0]), z_loss=st.sampled_from([0.0, 1e-3]),
       spread=st.sampled_from([0.1, 3.0, 15.0]))  # fmt: skip
def test_any_options_stay_within_their_roundings(
    M: int, V: int, seed: int, pad: int, dtype: torch.dtype, spread: float, **options: Any
) -> None:
    shape = Shape("drawn", M, V + pad)
    problem = random(shape, dtype, seed=seed, device=DEVICE, spread=spread, **options)
    view = problem.inputs["logits"][:, :V]
    labels = problem.options["labels"].clamp(max=V - 1)
    problem = replace(problem.given(labels=labels), inputs={"logits": view})
    for name in fused_backends(OP):
        with sanitized(order="random", seed=seed):
            ours = run(problem, name)
        within(problem, ours)


def test_shapes_cover_both_tiles() -> None:
    widths = [shape.V for shape in EDGES]
    for columns, _ in (row_kernels.NARROW, row_kernels.WIDE):
        assert columns in widths and any(columns < V for V in widths)
