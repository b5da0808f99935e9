"""Linear cross-entropy on every backend: the numerical contract, HF's bits, chunks and memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_utils import ForCausalLMLoss

from support.interpreter import sanitized
from support.tensors import DEVICE, DTYPES, fused_backends, rows
from swathe.kernels.core.contract import Outputs, Problem, check
from swathe.kernels.core.testing import elementwise_miss
from swathe.kernels.linear_cross_entropy import _triton as chunked
from swathe.kernels.linear_cross_entropy.api import linear_cross_entropy
from swathe.kernels.linear_cross_entropy.contract import (
    CONTRACT,
    GROUPS,
    gold,
    magnitudes,
    random,
)
from swathe.kernels.linear_cross_entropy.shapes import Shape

OP = "linear_cross_entropy"
SHAPE = Shape("small", 11, 24, 70)
NUMBERS = (-100, 0.0, 0.0, 1.0, 0.0)


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
    assert len(report.rows()) == 3


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_definition_is_hf_bit_for_bit(dtype: torch.dtype, num_items: Any) -> None:
    hidden, weight = rows(2, 9, 16, dtype=dtype), rows(50, 16, dtype=dtype, seed=1)
    labels = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    labels[0, :4] = -100
    found = []
    for ours in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if ours:
            options: dict[str, Any] = {"shift_labels": True, "num_items": num_items}
            loss = linear_cross_entropy(h, w, labels, implementation="eager", **options)
        else:
            logits = torch.nn.functional.linear(h, w)
            loss = ForCausalLMLoss(logits, labels, 50, num_items_in_batch=num_items)
        found.append((loss.detach(), *torch.autograd.grad(loss, (h, w))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_chunks_give_the_same(backend: str, dtype: torch.dtype, reduction: str) -> None:
    problem = random(SHAPE, dtype, seed=1, device=DEVICE, reduction=reduction)
    for chunk_rows in (1, 4, 10, 11, 100, None):
        part = problem.given(chunk_rows=chunk_rows)
        within(part, run(part, backend))


def test_rows_a_chunk() -> None:
    sizes = {K: chunked.rows_a_chunk(K, 0) for K in (64, 2048, 4096, 8192)}
    assert sizes == {64: 1024, 2048: 1280, 4096: 2560, 8192: 4096}
    assert chunked.rows_a_chunk(4096, 7) == 7


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_only_gradients_that_are_needed(backend: str, reduction: Any, bias: bool) -> None:
    problem = random(SHAPE, torch.bfloat16, seed=3, device=DEVICE, bias=bias, reduction=reduction)
    whole = run(problem, backend)
    for name in problem.inputs:
        inputs = {k: t.clone().requires_grad_(k == name) for k, t in problem.inputs.items()}
        loss = linear_cross_entropy(**inputs, **problem.options, implementation=backend)
        (alone,) = torch.autograd.grad(loss, inputs[name], problem.arriving["loss"])
        assert torch.equal(alone, whole[f"d{name}"])
    with torch.no_grad():
        options = {**problem.options, "implementation": backend}
        assert torch.equal(linear_cross_entropy(**problem.inputs, **options), whole["loss"])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_label_at_all_is_no_loss(backend: str, reduction: Any) -> None:
    h, w = rows(4, 8).requires_grad_(), rows(50, 8, seed=1).requires_grad_()
    labels = torch.full((4,), -100, device=DEVICE)
    for name in (backend, "eager"):
        loss = linear_cross_entropy(h, w, labels, reduction=reduction, implementation=name)
        for gradient in torch.autograd.grad(loss.sum(), (h, w)):
            assert not gradient.any()
        assert not loss.any()


def test_no_rows(backend: str) -> None:
    h, w = rows(0, 8).requires_grad_(), rows(50, 8).requires_grad_()
    labels = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    for reduction in ("mean", "none"):
        options: dict[str, Any] = {"reduction": reduction, "implementation": backend}
        loss = linear_cross_entropy(h, w, labels, **options)
        dh, dw = torch.autograd.grad(loss.sum(), (h, w))
        assert dh.shape == h.shape and torch.equal(dw, torch.zeros_like(w))


@pytest.mark.parametrize("bad", [50, -1, 10**9])
def test_a_label_out_of_range_is_nan_and_reads_nothing(backend: str, bad: int) -> None:
    h, w = rows(3, 8).requires_grad_(), rows(50, 8).requires_grad_()
    labels = torch.tensor([3, bad, 5], device=DEVICE)
    options: dict[str, Any] = {"reduction": "none", "implementation": backend}
    with sanitized():
        losses = linear_cross_entropy(h, w, labels, **options)
        (dh,) = torch.autograd.grad(losses.sum(), h)
    assert losses.isnan().tolist() == [False, True, False]
    assert dh.isnan().all(-1).tolist() == [False, True, False]


def test_confident_rows_keep_their_digits(backend: str) -> None:
    # p of the label is nearly 1: its gradient is what a rounding to bf16 would lose
    h = torch.eye(8, device=DEVICE).bfloat16()
    w = (torch.eye(8, device=DEVICE) * 6).bfloat16()
    labels = torch.arange(8, device=DEVICE)
    problem = Problem({"hidden": h, "weight": w}, {"loss": torch.ones((), device=DEVICE)},
                      {"labels": labels}, "confident")  # fmt: skip
    within(problem, run(problem, backend))


def test_reruns_are_bit_equal(backend: str) -> None:
    for reduction in ("mean", "none"):
        problem = random(Shape("rerun", 40, 16, 7), torch.bfloat16, seed=0, reduction=reduction)
        problem = problem.map(lambda t: t.to(DEVICE)).given(chunk_rows=16)
        first = run(problem, backend)
        with sanitized(order="random", seed=5):
            again = run(problem, backend)
        assert all(torch.equal(first[name], again[name]) for name in first)


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, 1),
    "every_other_row": lambda t: t[:, ::2],
    "part_of_the_features": lambda t: t[..., 3:19],
    "expanded": lambda t: t[:1, :1].expand(3, 4, -1),
    "features_not_adjacent": lambda t: t.transpose(0, 2),
    "all_but_the_last": lambda t: t[:, :-1],
    "one_row": lambda t: t[0, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_layouts_give_what_contiguous_gives(backend: str, layout: str, reduction: Any) -> None:
    view = LAYOUTS[layout](rows(4, 6, 24))
    weight = rows(view.shape[-1], 30, seed=1).t()
    labels = torch.randint(0, 30, view.shape[:-1]).to(DEVICE)
    found = []
    for h, w in ((view, weight), (view.contiguous(), weight.contiguous())):
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
        options: dict[str, Any] = {"reduction": reduction, "implementation": backend}
        loss = linear_cross_entropy(h, w, labels, **options)
        arriving = torch.ones_like(loss) * 0.5
        found.append((loss.detach(), *torch.autograd.grad(loss, (h, w), arriving)))
    for strided, plain in zip(*found, strict=True):
        torch.testing.assert_close(strided, plain, rtol=1e-5, atol=1e-6)


def test_inputs_are_left_alone(backend: str) -> None:
    problem = random(SHAPE, torch.float32, seed=0, device=DEVICE)
    before = problem.map(Tensor.clone)
    run(problem, backend)
    assert all(torch.equal(before.inputs[k], problem.inputs[k]) for k in problem.inputs)
    assert torch.equal(before.options["labels"], problem.options["labels"])


class Allocations(TorchDispatchMode):
    """The elements of every tensor that an operator returns, and the operators' names."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        self.sizes += [
            t.numel() for t in torch.utils._pytree.tree_leaves(found) if torch.is_tensor(t)
        ]
        return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_of_the_size_of_all_logits_is_made(dtype: torch.dtype) -> None:
    M, K, V, C = 96, 16, 200, 8
    hidden, weight = rows(M, K, dtype=dtype), rows(V, K, dtype=dtype, seed=1)
    labels = torch.randint(0, V, (M,)).to(DEVICE)
    with Allocations() as made:
        chunked.forward(hidden, weight, None, labels, *NUMBERS, C)
    assert max(made.sizes) <= max(C * V, V * K)
    needs = (True, True, False)
    with Allocations() as made:
        chunked.forward_total(hidden, weight, None, labels, *NUMBERS, C, needs)
    assert max(made.sizes) <= max(C * V, V * K, M * K)


def test_the_host_waits_for_nothing(backend: str) -> None:
    h, w = rows(6, 16), rows(50, 16, seed=1)
    labels = torch.tensor([1, 2, -100, 3, 3, 900], device=DEVICE)
    with Allocations() as outside:
        leaves = [t.clone().requires_grad_() for t in (h, w)]
        for num_items in (None, torch.tensor(5, device=DEVICE)):
            options: dict[str, Any] = {"num_items": num_items, "implementation": backend}
            linear_cross_entropy(*leaves, labels, shift_labels=True, **options).backward()
    with Allocations() as inside:
        needs = (True, True, True)
        bias = rows(50)
        _, *saved = chunked.forward(h, w, bias, labels, *NUMBERS, 4)
        chunked.forward_total(h, w, bias, labels, *NUMBERS, 4, needs)
        chunked.backward(rows(6), h, w, bias, labels, *saved, *NUMBERS, 4, needs)
    assert outside.names and inside.names
    waits = ("local_scalar", "nonzero", "equal", "unique", "masked_select")
    for name in (*outside.names, *inside.names):
        assert not any(wait in name for wait in waits), name


def test_frozen_inputs_cost_nothing() -> None:
    hidden, weight = rows(8, 16), rows(200, 16, seed=1)
    labels = torch.randint(0, 200, (8,)).to(DEVICE)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        found = chunked.forward_total(hidden, weight, None, labels, *NUMBERS, 4, needs)[1:]
        assert tuple(bool(t.numel()) for t in found) == needs


def test_products_are_fp32_where_torch_widens_them() -> None:
    a, b = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((4, 8), (8, 5)))
    out = torch.empty(4, 5, device="meta")
    assert chunked.widens(a) and not chunked.widens(a.float())
    chunked.multiply(a, b, out)
    chunked.multiply_add(a, b, out)
    assert not chunked.widens(torch.empty(1, dtype=torch.bfloat16))


@settings(max_examples=25)
@given(M=st.integers(1, 7), K=st.integers(1, 20), V=st.integers(1, 90), seed=st.integers(0, 99),
       dtype=st.sampled_from(DTYPES), reduction=st.sampled_from(["mean", "sum", "none"]),
       softcap=st.sampled_from([None, 3.0]), logit_scale=st.sampled_from([1.0, 0.25, -2.0]),
       label_smoothing=st.sampled_from([0.0, 0.1]), z_loss=st.sampled_from([0.0, 1e-3]),
       bias=st.booleans(), chunk_rows=st.sampled_from([None, 2, 3]))  # fmt: skip
def test_any_options_stay_within_their_roundings(
    M: int, K: int, V: int, seed: int, dtype: torch.dtype, **options: Any
) -> None:
    problem = random(Shape("drawn", M, K, V), dtype, seed=seed, device=DEVICE, **options)
    for name in fused_backends(OP):
        with sanitized(order="random", seed=seed):
            ours = run(problem, name)
        within(problem, ours)


def test_a_bad_row_spoils_no_other_loss(backend: str) -> None:
    problem = random(SHAPE, torch.float32, seed=1, device=DEVICE, reduction="none", ignored=0.0)
    hidden = problem.inputs["hidden"].clone()
    hidden[2] = float("nan")
    dirty = replace(problem, inputs={**problem.inputs, "hidden": hidden})
    before, after = run(problem, backend), run(dirty, backend)
    others = [i for i in range(SHAPE.M) if i != 2]
    for name in ("loss", "dhidden"):
        assert torch.equal(before[name][others], after[name][others])
        assert after[name][2].isnan().all()
