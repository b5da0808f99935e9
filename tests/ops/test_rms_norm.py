"""RMSNorm on every backend: the numerical contract, invariances, layouts and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from support.interpreter import sanitized
from support.tensors import DEVICE, DTYPES, fused_backends, rows, spread
from swathe.kernels.core.contract import Outputs, Problem, check
from swathe.kernels.core.testing import elementwise_miss
from swathe.kernels.norm import eager
from swathe.kernels.norm.api import CASTINGS, rms_norm
from swathe.kernels.norm.contract import CONTRACT, EPS, gold, magnitudes, random
from swathe.kernels.norm.op import output_dtype
from swathe.kernels.norm.shapes import EDGES, Shape

OP = "rms_norm"


def run(problem: Problem, backend: str) -> Outputs:
    return problem.run(CONTRACT.on(backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("casting", CASTINGS)
def test_contract(backend: str, casting: str, dtype: torch.dtype) -> None:
    report = check(CONTRACT, backend, device=DEVICE, dtypes=[dtype], groups=[casting])
    assert {row["dtype"] for row in report.rows()} == {str(dtype).removeprefix("torch.")}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_of_torch_backend(dtype: torch.dtype) -> None:
    plain = replace(
        CONTRACT,
        cases=lambda *facts: (c for c in CONTRACT.cases(*facts) if "h" not in c.problem.arriving),
    )
    check(plain, "torch", device=DEVICE, dtypes=[dtype], groups=["fp32"])


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_weight_dtype_is_independent(backend: str, weight_dtype: torch.dtype) -> None:
    for dtype in DTYPES:
        for casting in CASTINGS:
            options = {"device": DEVICE, "casting": casting, "weight_dtype": weight_dtype}
            problem = random(Shape("mixed", 9, 200), dtype, seed=3, **options)
            ours, exact = run(problem, backend), gold(problem)
            dtypes = {
                "y": output_dtype(dtype, weight_dtype, casting),
                "dx": dtype,
                "dweight": weight_dtype,
            }
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
    weight = torch.ones(96, device=DEVICE, dtype=x_dtype)
    y, h = rms_norm(x, weight, residual=r, implementation=backend)
    assert torch.equal(h, x + r) and h.dtype == (x + r).dtype
    assert torch.equal(y, rms_norm(h.detach(), weight, implementation=backend))
    (y.float().square().sum() + h.float().sum()).backward()
    assert x.grad is not None and r.grad is not None
    assert (x.grad.dtype, r.grad.dtype) == (x_dtype, residual_dtype)
    assert (
        torch.equal(x.grad.to(h.dtype).to(x_dtype), r.grad.to(x_dtype)) or x_dtype != residual_dtype
    )


@pytest.mark.parametrize("casting", CASTINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_like_hf_bit_for_bit(backend: str, casting: str, dtype: torch.dtype) -> None:
    # small integers: the sum of squares is exact in any order, so every rounding must agree
    x = torch.randint(-8, 9, (64, 256), generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = rows(256, dtype=dtype, seed=1)
    offset = 1.0 if casting == "gemma" else 0.0
    ours = rms_norm(x.to(DEVICE), weight, offset=offset, casting=casting, implementation=backend)
    theirs = eager.rms_norm(x.to(DEVICE), weight, EPS, offset, casting, None)
    if DEVICE == "cpu":
        assert torch.equal(ours, theirs)
    else:  # a GPU's rsqrt is approximate, in eager too
        assert (ours != theirs).float().mean() < 1e-3


@pytest.mark.parametrize("residual", [False, True])
def test_row_is_the_same_alone_and_in_any_batch(backend: str, residual: bool) -> None:
    for N in (37, 576, 1024, 8200):
        shape = Shape("batch", 12, N)
        problem = random(shape, torch.bfloat16, seed=N, device=DEVICE, residual=residual)
        whole = run(problem, backend)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(N)).to(DEVICE)
        shuffled = run(_take(problem, order), backend)
        alone = run(_take(problem, order[:1]), backend)
        for name in ("y", "dx"):
            assert torch.equal(shuffled[name], whole[name][order]), (name, N)
            assert torch.equal(alone[name], whole[name][order[:1]]), (name, N)


def _take(problem: Problem, index: Tensor) -> Problem:
    return problem.map(lambda t: t[index] if t.dim() == 2 else t)


def test_reruns_are_bit_equal(backend: str) -> None:
    problem = random(Shape("rerun", 50, 515), torch.bfloat16, seed=0, device=DEVICE)
    first = run(problem, backend)
    for _ in range(3):
        again = run(problem, backend)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_row_stays_in_its_row(backend: str, bad: float) -> None:
    for N in (64, 1025, 33001):
        clean = random(Shape("nan", 6, N), torch.float32, seed=N, device=DEVICE)
        x = clean.inputs["x"].clone()
        x[2, N // 2] = bad
        dirty = replace(clean, inputs={**clean.inputs, "x": x})
        before, after = run(clean, backend), run(dirty, backend)
        others = [0, 1, 3, 4, 5]
        for name in ("y", "dx"):
            assert torch.equal(before[name][others], after[name][others])
        assert not torch.isfinite(after["y"][2]).all()


@pytest.mark.parametrize("casting", ["fp32", "gemma"])
def test_scaling_by_powers_of_two_is_exact(backend: str, casting: str) -> None:
    x, weight = rows(8, 300, dtype=torch.bfloat16), rows(300, dtype=torch.bfloat16, seed=1)
    plain = rms_norm(x, weight, 1e-6, casting=casting, implementation=backend)
    scaled = rms_norm(x * 8, weight, 64e-6, casting=casting, implementation=backend)
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
    weight, dy = rows(view.shape[-1], dtype=dtype, seed=1), LAYOUTS[layout](rows(4, 6, 96, seed=2))
    results = []
    for x, grad in ((view, dy), (view.contiguous(), dy.contiguous())):
        x, w = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y, h = rms_norm(x, w, casting="fp32", residual=x * 0.5, implementation=backend)
        results.append(
            (y, h, *torch.autograd.grad((y, h), (x, w), (grad.to(dtype), grad.to(dtype))))
        )
    for strided, contiguous in zip(*results, strict=True):
        assert torch.equal(strided, contiguous)


def test_inputs_are_left_alone(backend: str) -> None:
    shape = Shape("kept", 7, 130)
    problem = random(shape, torch.bfloat16, seed=0, device=DEVICE, residual=True)
    before = problem.map(Tensor.clone)
    run(problem, backend)
    for kept, now in ((before.inputs, problem.inputs), (before.arriving, problem.arriving)):
        assert all(torch.equal(kept[name], now[name]) for name in kept)


@given(M=st.integers(0, 9), N=st.integers(1, 300), gap=st.integers(0, 9), skip=st.integers(0, 3),
       seed=st.integers(0, 99), residual=st.booleans(),
       dtype=st.sampled_from(DTYPES), amplitude=st.sampled_from([1e-3, 1.0, 30.0]))  # fmt: skip
def test_any_shape_and_stride_stays_within_its_roundings(
    M: int, N: int, gap: int, skip: int, seed: int, residual: bool,
    dtype: torch.dtype, amplitude: float,
) -> None:  # fmt: skip
    options = {"device": DEVICE, "residual": residual, "amplitude": amplitude}
    problem = random(Shape("drawn", M, N), dtype, seed=seed, **options)
    problem = problem.map(lambda t: spread(t, gap, skip) if t.dim() == 2 else t)
    exact, sizes = gold(problem), magnitudes(problem)
    for name in fused_backends(OP):
        with sanitized(order="random", seed=seed):
            ours = run(problem, name)
        for key in ("y", "dx", "dweight"):
            assert elementwise_miss(key, ours[key], exact[key], sizes[key]) is None


def test_shapes_cover_both_kinds_of_kernel() -> None:
    from swathe.kernels.core.row_blocks import ROW_LIMIT_BACKWARD, ROW_LIMIT_FORWARD

    widths = [shape.N for shape in EDGES]
    for limit in (ROW_LIMIT_FORWARD, ROW_LIMIT_BACKWARD):
        assert any(limit == N for N in widths) and any(limit < N for N in widths)
