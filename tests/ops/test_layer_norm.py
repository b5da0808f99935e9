"""LayerNorm on every backend: the numerical contract, invariances, layouts and properties."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from support.interpreter import sanitized
from support.tensors import DEVICE, DTYPES, fused_backends, rows, spread
from swathe.kernels.core.contract import Outputs, Problem, check
from swathe.kernels.core.testing import elementwise_miss
from swathe.kernels.layer_norm import eager
from swathe.kernels.layer_norm.api import layer_norm
from swathe.kernels.layer_norm.contract import AFFINE, CONTRACT, gold, magnitudes, random
from swathe.kernels.layer_norm.shapes import EDGES, Shape

OP = "layer_norm"


def run(problem: Problem, backend: str) -> Outputs:
    return problem.run(CONTRACT.on(backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", ["", "far"])
def test_contract(backend: str, group: str, dtype: torch.dtype) -> None:
    report = check(CONTRACT, backend, device=DEVICE, dtypes=[dtype], groups=[group])
    assert {row["dtype"] for row in report.rows()} == {str(dtype).removeprefix("torch.")}


# on a CPU torch sums the gradients of 16-bit inputs in 16 bits, as its record says
@pytest.mark.parametrize("dtype", DTYPES if DEVICE == "cuda" else DTYPES[:1], ids=str)
def test_contract_of_torch_backend(dtype: torch.dtype) -> None:
    plain = replace(
        CONTRACT,
        cases=lambda *facts: (c for c in CONTRACT.cases(*facts) if "h" not in c.problem.arriving),
    )
    check(plain, "torch", device=DEVICE, dtypes=[dtype], groups=[""])


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("residual", [False, True])
def test_the_definition_is_the_formula(affine: str, residual: bool) -> None:
    options = {"device": DEVICE, "affine": affine, "residual": residual}
    given = random(Shape("defined", 6, 50), torch.float64, seed=1, **options).inputs
    x, weight, bias = (given.get(name) for name in ("x", "weight", "bias"))
    found = eager.layer_norm(x, weight, bias, 1e-5, given.get("residual"))
    h = given["x"] + given.get("residual", 0)
    centred = h - h.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    y = y * given.get("weight", 1) + given.get("bias", 0)
    torch.testing.assert_close(found[0] if residual else found, y, rtol=1e-12, atol=1e-12)
    assert not residual or torch.equal(found[1], h)


@pytest.mark.parametrize("N", [200, 17_000])
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_weight_dtype_is_independent(backend: str, weight_dtype: torch.dtype, N: int) -> None:
    for dtype in DTYPES:
        options = {"device": DEVICE, "weight_dtype": weight_dtype}
        problem = random(Shape("mixed", 9 if N == 200 else 2, N), dtype, seed=3, **options)
        ours, exact = run(problem, backend), gold(problem)
        dtypes = {"y": dtype, "dx": dtype, "dweight": weight_dtype, "dbias": weight_dtype}
        for name, expected in dtypes.items():
            assert ours[name].dtype == expected, name
            scale = exact[name].abs().max()
            assert (ours[name].double() - exact[name]).abs().max() <= 0.01 * scale


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual_dtype", DTYPES, ids=str)
def test_residual_dtype_is_independent(
    backend: str, x_dtype: torch.dtype, residual_dtype: torch.dtype
) -> None:
    x, r = rows(5, 96, dtype=x_dtype), rows(5, 96, dtype=residual_dtype, seed=1)
    x.requires_grad_()
    r.requires_grad_()
    y, h = layer_norm(x, residual=r, implementation=backend)
    assert torch.equal(h, x + r) and h.dtype == (x + r).dtype
    assert torch.equal(y, layer_norm(h.detach(), implementation=backend))
    (y.float().pow(3).sum() + h.float().sum()).backward()
    assert x.grad is not None and r.grad is not None
    assert (x.grad.dtype, r.grad.dtype) == (x_dtype, residual_dtype)
    narrow = min((x_dtype, residual_dtype), key=lambda d: d.itemsize)
    if x_dtype == residual_dtype or torch.float32 in (x_dtype, residual_dtype):
        assert torch.equal(x.grad.to(narrow), r.grad.to(narrow))


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("N", [40, 5000])
def test_one_gradient_alone_is_the_same(backend: str, wanted: str, N: int) -> None:
    shape = Shape("alone", 4, N)
    problem = random(shape, torch.bfloat16, seed=2, device=DEVICE, residual=True)
    leaf = problem.inputs[wanted].detach().requires_grad_()
    given = {**problem.inputs, wanted: leaf}
    y, h = layer_norm(**given, implementation=backend)
    torch.autograd.backward(
        (y, h) if h.requires_grad else (y,), tuple(problem.arriving.values())[: 1 + h.requires_grad]
    )
    assert torch.equal(leaf.grad, run(problem, backend)[f"d{wanted}"])


def test_constant_rows_are_zero_and_finite(backend: str) -> None:
    for N in (1, 64, 1025, 20_000):
        for value in (0.0, 1.0, -3e4, 0.1):
            x = torch.full((2, N), value, device=DEVICE, requires_grad=True)
            y = layer_norm(x, bias=torch.full((N,), 0.5, device=DEVICE), implementation=backend)
            # 0.1 is not a multiple of 1/N's rounding: what is left of it is far below sqrt(eps)
            torch.testing.assert_close(y, torch.full_like(y, 0.5), rtol=0, atol=1e-3)
            y.sum().backward()
            assert x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("N", [64, 8192, 20_000])
def test_rows_far_from_zero_keep_their_digits(backend: str, N: int) -> None:
    x = (1e4 + rows(3, N)).to(torch.float32)
    exact = F.layer_norm(x.double(), (N,))
    error = (layer_norm(x, implementation=backend) - exact).abs().max()
    plain = (F.layer_norm(x, (N,)) - exact).abs().max()
    assert error <= 1e-6 * 6 and error <= plain


@pytest.mark.parametrize("residual", [False, True])
def test_row_is_the_same_alone_and_in_any_batch(backend: str, residual: bool) -> None:
    for M, N in ((8, 37), (8, 576), (8, 1024), (3, 8200), (3, 17_000)):
        shape = Shape("batch", M, N)
        problem = random(shape, torch.bfloat16, seed=N, device=DEVICE, residual=residual)
        whole = run(problem, backend)
        order = torch.randperm(M, generator=torch.Generator().manual_seed(N)).to(DEVICE)
        shuffled = run(_take(problem, order), backend)
        alone = run(_take(problem, order[:1]), backend)
        for name in ("y", "dx"):
            assert torch.equal(shuffled[name], whole[name][order]), (name, N)
            assert torch.equal(alone[name], whole[name][order[:1]]), (name, N)


def _take(problem: Problem, index: Tensor) -> Problem:
    return problem.map(lambda t: t[index] if t.dim() == 2 else t)


def test_reruns_are_bit_equal(backend: str) -> None:
    for M, N in ((50, 515), (7, 5000)):
        problem = random(Shape("rerun", M, N), torch.bfloat16, seed=0, device=DEVICE)
        first = run(problem, backend)
        for _ in range(2):
            again = run(problem, backend)
            assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_row_stays_in_its_row(backend: str, bad: float) -> None:
    for N in (64, 1025, 33_001):
        clean = random(Shape("nan", 4, N), torch.float32, seed=N, device=DEVICE)
        x = clean.inputs["x"].clone()
        x[2, N // 2] = bad
        dirty = replace(clean, inputs={**clean.inputs, "x": x})
        before, after = run(clean, backend), run(dirty, backend)
        others = [0, 1, 3]
        for name in ("y", "dx"):
            assert torch.equal(before[name][others], after[name][others])
        # one value that is not finite spoils its row's mean
        assert after["y"][2].isnan().all() and after["dx"][2].isnan().all()


def test_scaling_by_powers_of_two_is_exact(backend: str) -> None:
    x, weight = rows(8, 300, dtype=torch.bfloat16), rows(300, dtype=torch.bfloat16, seed=1)
    plain = layer_norm(x, weight, eps=1e-5, implementation=backend)
    scaled = layer_norm(x * 8, weight, eps=64e-5, implementation=backend)
    assert torch.equal(plain, scaled)


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, 1),
    "every_other_row": lambda t: t[:, ::2],
    "part_of_the_features": lambda t: t[..., 3:70],
    "offset_by_one": lambda t: t.flatten()[1 : 1 + 5 * 64].view(5, 64),
    "expanded": lambda t: t[:1, :1].expand(3, 4, -1),
    "features_not_adjacent": lambda t: t.transpose(0, 2),
    "one_row": lambda t: t[:, -1:],
    "one_dimension": lambda t: t[0, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_give_what_contiguous_gives(backend: str, layout: str, dtype: torch.dtype) -> None:
    view = LAYOUTS[layout](rows(4, 6, 96, dtype=dtype))
    N = view.shape[-1]
    weight, bias = rows(2 * N, dtype=dtype, seed=1)[::2], rows(N, dtype=dtype, seed=3)
    dy = LAYOUTS[layout](rows(4, 6, 96, seed=2)).to(dtype)
    results = []
    for x, grad in ((view, dy), (view.contiguous(), dy.contiguous())):
        x, w, b = (t.detach().requires_grad_() for t in (x, weight, bias))
        y, h = layer_norm(x, w, b, residual=x * 0.5, implementation=backend)
        results.append((y, h, *torch.autograd.grad((y, h), (x, w, b), (grad, grad))))
    for strided, contiguous in zip(*results, strict=True):
        assert torch.equal(strided, contiguous)


def test_inputs_are_left_alone(backend: str) -> None:
    problem = random(Shape("kept", 7, 130), torch.bfloat16, seed=0, device=DEVICE, residual=True)
    before = problem.map(Tensor.clone)
    run(problem, backend)
    for kept, now in ((before.inputs, problem.inputs), (before.arriving, problem.arriving)):
        assert all(torch.equal(kept[name], now[name]) for name in kept)


@given(M=st.integers(0, 9), N=st.integers(1, 300), gap=st.integers(0, 9), skip=st.integers(0, 3),
       seed=st.integers(0, 99), residual=st.booleans(),
       dtype=st.sampled_from(DTYPES), affine=st.sampled_from(AFFINE),
       offset=st.sampled_from([0.0, 1.0, 30.0]))  # fmt: skip
def test_any_shape_and_stride_stays_within_its_roundings(
    M: int, N: int, gap: int, skip: int, seed: int, residual: bool,
    dtype: torch.dtype, affine: str, offset: float,
) -> None:  # fmt: skip
    options = {"device": DEVICE, "residual": residual, "affine": affine, "offset": offset}
    problem = random(Shape("drawn", M, N), dtype, seed=seed, **options)
    problem = problem.map(lambda t: spread(t, gap, skip) if t.dim() == 2 else t)
    exact, sizes = gold(problem), magnitudes(problem)
    for name in fused_backends(OP):
        with sanitized(order="random", seed=seed):
            ours = run(problem, name)
        for key in ours.keys() & sizes.keys():
            assert elementwise_miss(key, ours[key], exact[key], sizes[key]) is None


def test_shapes_cover_both_kinds_of_kernel() -> None:
    from swathe.kernels.core.row_blocks import ROW_LIMIT_BACKWARD, ROW_LIMIT_FORWARD

    widths = [shape.N for shape in EDGES]
    for limit in (ROW_LIMIT_FORWARD, ROW_LIMIT_BACKWARD):
        assert any(limit == N for N in widths) and any(limit < N for N in widths)
