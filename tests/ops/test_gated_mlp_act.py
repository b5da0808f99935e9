"""gated_mlp_act on every backend: the numerical contract, special values, layouts, invariances."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan, pi
from typing import Any

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
from swathe.kernels.gated_mlp_act import eager
from swathe.kernels.gated_mlp_act.api import (
    ACTS,
    ALPHA,
    LAYOUTS,
    LIMIT,
    SPELLINGS,
    Packed,
    gated_mlp_act,
    geglu,
    reglu,
    swiglu,
)
from swathe.kernels.gated_mlp_act.contract import (
    CONTRACT,
    FORMS,
    gold,
    magnitudes,
    pack,
    random,
)
from swathe.kernels.gated_mlp_act.shapes import EDGES, Shape

OP = "gated_mlp_act"


def run(problem: Problem, backend: str) -> Outputs:
    return problem.run(CONTRACT.on(backend))


def both_ways(gate: Tensor, up: Tensor, dy: Tensor, **options: Any) -> tuple[Tensor, ...]:
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    y = gated_mlp_act(gate, up, **options)
    return y.detach(), *torch.autograd.grad(y, (gate, up), dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract(backend: str, dtype: torch.dtype) -> None:
    report = check(CONTRACT, backend, device=DEVICE, dtypes=[dtype])
    pools = {str(row["output"]).split(" ")[1].split("-")[0] for row in report.rows()}
    assert pools == set(ACTS)


def every_bf16() -> Tensor:
    """All 65536 bit patterns."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).to(DEVICE)


def hf(act: str, gate: Tensor, up: Tensor) -> Tensor:
    """LlamaMLP and Phi3MLP's line with ACT2FN's functions, and GptOssExperts._apply_gate."""
    if act == "gpt_oss":
        gate = gate.clamp(min=None, max=LIMIT)
        up = up.clamp(min=-LIMIT, max=LIMIT)
        glu = gate * torch.sigmoid(gate * ALPHA)
        return (up + 1) * glu
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "gelu": F.gelu,
        "relu": F.relu,
        "relu2": lambda x: torch.square(F.relu(x)),
    }
    return functions[act](gate) * up


@pytest.mark.parametrize("act", ACTS)
def test_every_bf16_number_rounds_like_hf(backend: str, act: str) -> None:
    gate = every_bf16()
    up = rows(gate.numel(), dtype=torch.bfloat16, seed=1)
    ours = gated_mlp_act(gate, up, act=act, casting="llama", implementation=backend)
    theirs = hf(act, gate, up)
    differ = ~((ours == theirs) | (ours.isnan() & theirs.isnan()))
    if act.startswith("gelu"):
        # torch's 1 + erf and 1 + tanh lose their digits here, its CPU's erf more than others'
        far = (gate < -3) & (gate > -10)
        error = (ours.float() - theirs.float()).abs()[far]
        assert (error <= (2e-6 * gate.float() * up.float() + theirs / 128).abs()[far]).all()
        differ &= ~far & (gate.abs() > 1e-37) & (gate.abs() < 1e38)  # nor all magnitudes
    # at a boundary of rounding, or (silu below -88) where torch's exp overflows and ours does not
    differ &= gate > -88
    assert int(differ.sum()) <= 16, gate[differ].tolist()


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eager_with_llamas_roundings_is_hf_bit_for_bit(act: str, dtype: torch.dtype) -> None:
    gate, up = rows(40, 96, dtype=dtype) * 4, rows(40, 96, dtype=dtype, seed=1) * 4
    numbers = (act, LIMIT, ALPHA, "llama")
    assert torch.equal(eager.gated_mlp_act(gate, up, *numbers, "halves"), hf(act, gate, up))
    for packed in LAYOUTS:
        both = pack(gate, up, packed)
        y = eager.gated_mlp_act(both, None, *numbers, packed)
        # torch rounds views on another path than contiguous tensors, so it is given the same views
        assert torch.equal(y, hf(act, *eager.unpack(both, packed)))


@pytest.mark.parametrize("act", ACTS)
def test_special_values_are_torchs(backend: str, act: str) -> None:
    special = [nan, 0.0, -0.0, 7.5, -7.5, 89.0, -700.0]
    if act != "gelu":
        special += [inf, -inf]  # torch's erf makes NaN of them on a CPU
    if not act.startswith("gelu"):
        special += [3e37, -3e37]  # torch's x^2 overflows
    ordinary = torch.tensor([0.7, -1.3])
    # one of the three is special at a time: where two are, torch's own formulas disagree
    for which in range(3):
        given = [ordinary, ordinary, ordinary]
        given[which] = torch.tensor(special)
        if act == "gpt_oss" and which == 2:
            given[which] = ordinary  # autograd adds two terms, which makes NaN of infinite dy
        gate, up, dy = (t.contiguous().to(DEVICE) for t in torch.cartesian_prod(*given).unbind(-1))
        ours = both_ways(gate, up, dy, act=act, implementation=backend)
        theirs = both_ways(gate, up, dy, act=act, implementation="eager")
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("act", ACTS)
def test_finite_gates_never_make_nan(backend: str, act: str) -> None:
    largest = torch.finfo(torch.float32).max
    gate = torch.cat((torch.logspace(-40, 38, 157), torch.tensor([largest]))).to(DEVICE)
    gate = torch.cat((gate, -gate))
    ones = torch.ones_like(gate)
    if act == "relu2":
        gate = gate.clamp(max=1e19)  # whose square is finite
    for casting in ("fp32", "llama"):
        found = both_ways(gate, ones, ones, act=act, casting=casting, implementation=backend)
        assert all(t.isfinite().all() for t in found)


def test_gradients_at_the_kinks(backend: str) -> None:
    ones = torch.ones(3, device=DEVICE)
    zero = torch.tensor([-1.0, 0.0, 1.0], device=DEVICE)
    for act in ("relu", "relu2"):
        _, dgate, _ = both_ways(zero, ones, ones, act=act, implementation=backend)
        assert dgate[:2].tolist() == [0.0, 0.0] and dgate[2] > 0
    # torch.clamp lets the gradient pass at the limit itself
    limits = torch.tensor([6.5, 7.0, 7.5, -6.5, -7.0, -7.5], device=DEVICE)
    ones = torch.ones_like(limits)
    _, dgate, _ = both_ways(limits, ones, ones, act="gpt_oss", implementation=backend)
    assert (dgate != 0).tolist() == [True, True, False, True, True, True]
    _, _, dup = both_ways(ones, limits, ones, act="gpt_oss", implementation=backend)
    assert (dup != 0).tolist() == [True, True, False, True, True, False]


@pytest.mark.parametrize("limit", [0.5, 7.12, 30.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limit_and_alpha_are_taken(backend: str, limit: float, dtype: torch.dtype) -> None:
    edge = torch.tensor(limit, dtype=dtype).item()  # torch clamps at what the dtype holds
    gate, up, dy = (rows(6, 80, dtype=dtype, seed=s) * 8 for s in range(3))
    gate[0], up[1], up[2] = edge, edge, -edge
    options = {"act": "gpt_oss", "limit": limit, "alpha": 0.8}
    problem = Problem({"gate": gate, "up": up}, {"y": dy}, {**options, "casting": "fp32"})
    for casting in ("fp32", "llama"):
        ours = run(problem.given(casting=casting), backend)
        assert torch.equal(ours["dgate"] == 0, (gate > edge) | (up == -1) | (dy == 0))
        assert torch.equal(ours["dup"] == 0, (up.abs() > edge) | (dy == 0))
        if casting == "fp32":
            sizes, exact = magnitudes(problem), gold(problem.given(limit=edge))
            for name, found in ours.items():
                assert elementwise_miss(name, found, exact[name], sizes[name]) is None
        else:
            theirs = eager.gated_mlp_act(gate, up, "gpt_oss", limit, 0.8, "llama", "halves")
            assert int((ours["y"] != theirs).sum()) <= 2 or dtype == torch.float32


def test_spellings_and_thin_names(backend: str) -> None:
    gate, up = rows(3, 40), rows(3, 40, seed=1)
    options: Any = {"implementation": backend}
    for spelling, act in SPELLINGS.items():
        expected = gated_mlp_act(gate, up, act=act, **options)
        assert torch.equal(gated_mlp_act(gate, up, act=spelling, **options), expected)
    for y, act in (
        (swiglu(gate, up, **options), "silu"),
        (geglu(gate, up, **options), "gelu_tanh"),
        (geglu(gate, up, approximate="none", **options), "gelu"),
        (reglu(gate, up, **options), "relu"),
    ):
        assert torch.equal(y, gated_mlp_act(gate, up, act=act, **options))
    both = pack(gate, up, "interleaved")
    for function in (swiglu, geglu, reglu):
        y = function(both, packed="interleaved", **options)
        assert torch.equal(y, function(gate, up, **options))


@pytest.mark.parametrize("packed", LAYOUTS)
@pytest.mark.parametrize("act", ["silu", "gpt_oss"])
def test_packed_is_apart_bit_for_bit(backend: str, act: str, packed: Packed) -> None:
    for M, N in ((5, 37), (3, 600), (2, 2050)):
        gate, up, dy = (rows(M, N, dtype=torch.bfloat16, seed=s) * 4 for s in range(3))
        y, dgate, dup = both_ways(gate, up, dy, act=act, implementation=backend)
        both = pack(gate, up, packed).requires_grad_()
        found = gated_mlp_act(both, act=act, packed=packed, implementation=backend)
        (dboth,) = torch.autograd.grad(found, both, dy)
        assert torch.equal(found, y) and dboth.is_contiguous()
        assert torch.equal(dboth, pack(dgate, dup, packed))


@pytest.mark.parametrize("packed", FORMS)
def test_row_is_the_same_alone_and_in_any_batch(backend: str, packed: Any) -> None:
    for N in (37, 64, 700, 2049):
        shape = Shape("batch", 12, N)
        problem = random(shape, torch.bfloat16, seed=N, device=DEVICE, packed=packed)
        whole = run(problem, backend)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(N)).to(DEVICE)
        shuffled = run(problem.map(lambda t, at=order: t[at]), backend)
        alone = run(problem.map(lambda t, at=order[:1]: t[at]), backend)
        for name, found in whole.items():
            assert torch.equal(shuffled[name], found[order]), (name, N)
            assert torch.equal(alone[name], found[order[:1]]), (name, N)


@pytest.mark.parametrize("packed", FORMS)
def test_reruns_are_bit_equal(backend: str, packed: Any) -> None:
    shape = Shape("rerun", 7, 515)
    problem = random(shape, torch.bfloat16, seed=0, device=DEVICE, packed=packed)
    first = run(problem, backend)
    for order in ("reverse", "random"):
        with sanitized(order=order):
            again = run(problem, backend)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("packed", FORMS)
def test_a_bad_element_stays_alone(backend: str, packed: Any, bad: float) -> None:
    for N in (40, 2100):
        shape = Shape("bad", 3, N)
        clean = random(shape, torch.float32, seed=N, device=DEVICE, packed=packed)
        dirty = clean.map(Tensor.clone)
        dirty.inputs["gate"][1, N // 2] = bad
        before, after = run(clean, backend), run(dirty, backend)
        for name, found in after.items():
            assert int((before[name] != found).sum()) <= (2 if name == "dgate" else 1), name
        assert not torch.equal(before["y"], after["y"])


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, 1),
    "every_other_row": lambda t: t[:, ::2],
    "part_of_the_features": lambda t: t[..., 3:69],
    "offset_by_one": lambda t: t.flatten()[1 : 1 + 5 * 64].view(5, 64),
    "expanded": lambda t: t[:1, :1].expand(3, 4, -1),
    "one_number": lambda t: t[:1, :1, :1].expand(3, 4, 64),
    "features_not_adjacent": lambda t: t.transpose(0, 2),
    "one_row": lambda t: t[:, -1:],
    "one_dimension": lambda t: t[0, 0],
    "every_other_feature": lambda t: t[0, 0, ::2],
    "one_column": lambda t: t[..., 5:7:2].expand(4, 6, 2),
    "nothing": lambda t: t[:, :0],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("packed", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_give_what_contiguous_gives(
    backend: str, view: str, packed: Any, dtype: torch.dtype
) -> None:
    change = VIEWS[view]
    gate, up, dy = (change(rows(4, 6, 96, dtype=dtype, seed=s)) for s in range(3))
    if packed is not None:
        dy = dy[..., : dy.shape[-1] // 2]
    results = []
    for contiguous in (False, True):
        given = [t.contiguous() if contiguous else t for t in (gate, up, dy)]
        gate_, up_ = (t.detach().requires_grad_() for t in given[:2])
        inputs = (gate_, up_) if packed is None else (gate_,)
        y = gated_mlp_act(*inputs, act="gpt_oss", packed=packed or "halves", implementation=backend)
        results.append((y, *torch.autograd.grad(y, inputs, given[2])))
    for strided, contiguous in zip(*results, strict=True):
        assert torch.equal(strided, contiguous)


@pytest.mark.parametrize("packed", FORMS)
def test_an_expanded_gradient_is_taken(backend: str, packed: Any) -> None:
    problem = random(Shape("sum", 4, 70), torch.float32, seed=0, device=DEVICE, packed=packed)
    grads = []
    for name in (backend, "eager"):
        inputs = {k: t.clone().requires_grad_() for k, t in problem.inputs.items()}
        gated_mlp_act(**inputs, **problem.options, implementation=name).sum().backward()
        grads.append([t.grad for t in inputs.values()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("packed", FORMS)
def test_inputs_are_left_alone_and_two_backwards_agree(backend: str, packed: Any) -> None:
    # a peer's backward writes its gradients over the saved gate and up
    problem = random(Shape("kept", 7, 130), torch.bfloat16, seed=0, device=DEVICE, packed=packed)
    before = problem.map(Tensor.clone)
    inputs = {k: t.requires_grad_() for k, t in problem.inputs.items()}
    y = gated_mlp_act(**inputs, **problem.options, implementation=backend)
    kept = y.detach().clone()
    dy = problem.arriving["y"]
    first = torch.autograd.grad(y, tuple(inputs.values()), dy, retain_graph=True)
    second = torch.autograd.grad(y, tuple(inputs.values()), dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(y, kept) and torch.equal(before.arriving["y"], dy)
    assert all(torch.equal(before.inputs[name], t) for name, t in inputs.items())


@given(M=st.integers(0, 9), N=st.integers(1, 150), gap=st.integers(0, 9), skip=st.integers(0, 3),
       seed=st.integers(0, 99), act=st.sampled_from(ACTS), packed=st.sampled_from(FORMS),
       dtype=st.sampled_from(DTYPES))  # fmt: skip
def test_any_shape_and_stride_stays_within_its_roundings(
    M: int, N: int, gap: int, skip: int, seed: int, act: str, packed: Any, dtype: torch.dtype
) -> None:
    problem = random(
        Shape("drawn", M, N), dtype, seed=seed, device=DEVICE, act=act, packed=packed
    ).map(lambda t: spread(t, gap, skip))
    exact, sizes = gold(problem), magnitudes(problem)
    for name in fused_backends(OP):
        with sanitized(order="random", seed=seed):
            ours = run(problem, name)
        for key in ours:
            assert elementwise_miss(key, ours[key], exact[key], sizes[key]) is None


def test_gold_is_the_formula() -> None:
    gate = torch.linspace(-6, 6, 97, dtype=torch.float64)
    up = torch.ones_like(gate)
    v = (2 / pi) ** 0.5 * (gate + 0.044715 * gate**3)
    problem = Problem({"gate": gate, "up": up}, {"y": up}, {"act": "gelu_tanh", "casting": "fp32"})
    torch.testing.assert_close(gold(problem)["y"], 0.5 * gate * (1 + torch.tanh(v)))


def test_shapes_are_on_both_sides_of_every_width() -> None:
    from swathe.kernels.gated_mlp_act._triton import WIDTHS

    lengths = {shape.N for shape in EDGES}
    assert all({width - 1, width} <= lengths or width == WIDTHS[-1] for width in WIDTHS)
