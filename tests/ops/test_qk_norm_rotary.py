"""qk_norm_rotary on every backend: the numerical contract, HF's bits, invariances and layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.glm4 import modeling_glm4 as glm4
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl
from transformers.models.qwen3 import modeling_qwen3 as qwen3

import swathe.kernels.qk_norm_rotary._triton as kernels
from support.interpreter import sanitized
from support.tensors import DEVICE, DTYPES, fused_backends, rows
from swathe.kernels.core.contract import Outputs, Problem, check
from swathe.kernels.core.testing import elementwise_miss
from swathe.kernels.qk_norm_rotary.api import qk_norm_rotary
from swathe.kernels.qk_norm_rotary.contract import CONTRACT, GROUPS, gold, magnitudes, random
from swathe.kernels.qk_norm_rotary.shapes import EDGES, Shape

OP = "qk_norm_rotary"
SMALL = Shape("small", 2, 5, 3, 2, 32, 32)
PARTIAL = Shape("partial", 2, 5, 2, 1, 40, 16)


def run(problem: Problem, backend: str) -> Outputs:
    return problem.run(CONTRACT.on(backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_contract(backend: str, group: str, dtype: torch.dtype) -> None:
    report = check(CONTRACT, backend, device=DEVICE, dtypes=[dtype], groups=[group])
    assert {row["dtype"] for row in report.rows()} == {str(dtype).removeprefix("torch.")}


def whole(*size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Small integers: the sum of their squares is exact, so every rounding must agree."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, size, generator=generator).to(dtype).to(DEVICE)


def norm_of(kind: type, weight: Tensor) -> torch.nn.Module:
    module = kind(weight.shape[0], eps=1e-6).to(DEVICE, weight.dtype)
    module.weight.data.copy_(weight)
    return module


FAMILIES: dict[str, tuple[type, Callable[..., Any], dict[str, Any]]] = {
    "qwen3": (qwen3.Qwen3RMSNorm, qwen3.apply_rotary_pos_emb, {"norm_casting": "llama"}),
    "gemma3": (
        gemma3.Gemma3RMSNorm,
        gemma3.apply_rotary_pos_emb,
        {"norm_casting": "gemma", "offset": 1.0},
    ),
    "glm4": (
        qwen3.Qwen3RMSNorm,
        glm4.apply_rotary_pos_emb,
        {"norm_casting": "llama", "interleaved": True, "rotary_dim": 32},
    ),
    "qwen2_vl": (
        qwen3.Qwen3RMSNorm,
        qwen2_vl.apply_rotary_pos_emb,
        {"norm_casting": "llama", "mrope_section": (16, 8, 8)},
    ),
}


@pytest.mark.parametrize("implementation", ["triton", "cpp", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_rounds_like_hf_bit_for_bit(family: str, dtype: torch.dtype, implementation: str) -> None:
    if implementation not in (*fused_backends(OP), "eager"):
        pytest.skip(f"no {implementation} here")
    norm, rotate, options = FAMILIES[family]
    q, k = (whole(2, 9, n, 64, dtype=dtype, seed=n).transpose(1, 2) for n in (5, 2))
    w, v = (rows(64, dtype=dtype, seed=n) for n in (1, 2))
    lead = (3, 2, 9) if family == "qwen2_vl" else (2, 9)
    angle = rows(*lead, 16 if family == "glm4" else 32, seed=3)
    picked = angle
    if family == "qwen2_vl":  # as Qwen2VLRotaryEmbedding does
        picked = torch.cat([m[i % 3] for i, m in enumerate(angle.split([16, 8, 8], dim=-1))], -1)
    hf_tables = (f(torch.cat((picked, picked), -1)).to(dtype) for f in (torch.cos, torch.sin))
    theirs = rotate(norm_of(norm, w)(q), norm_of(norm, v)(k), *hf_tables)
    # Glm4 takes the first half of its tables for both members of a pair
    angle = angle if family == "glm4" else torch.cat((angle, angle), -1)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    ours = qk_norm_rotary(
        *(q, k, w, v, 1e-6, cos, sin), casting="llama", implementation=implementation, **options
    )
    for mine, hf in zip(ours, theirs, strict=True):
        if DEVICE == "cpu":
            assert torch.equal(mine, hf)
        else:  # a GPU's rsqrt is approximate, in eager too
            assert (mine != hf).float().mean() < 1e-2


def test_wider_tables_widen_the_products_as_torch_promotes_them(backend: str) -> None:
    q, k = (whole(2, 9, n, 64, dtype=torch.bfloat16, seed=n).transpose(1, 2) for n in (5, 2))
    w, angle = rows(64, dtype=torch.bfloat16), rows(9, 64, seed=3)
    found = [
        qk_norm_rotary(
            *(q, k, w, w, 1e-6, angle.cos(), angle.sin()), casting="llama", implementation=name
        )
        for name in (backend, "eager")
    ]
    for ours, theirs in zip(*found, strict=True):
        assert (ours != theirs).float().mean() <= (0.0 if DEVICE == "cpu" else 1e-2)


def test_eager_gradients_are_hf_s_own() -> None:
    dtype = torch.bfloat16
    results = []
    for ours in (True, False):
        q, k = (rows(2, 9, n, 64, dtype=dtype, seed=n).transpose(1, 2) for n in (5, 2))
        q, k = q.requires_grad_(), k.requires_grad_()
        w, v = (norm_of(qwen3.Qwen3RMSNorm, rows(64, dtype=dtype, seed=n)) for n in (1, 2))
        angle = rows(2, 9, 64, seed=3)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        if ours:
            found = qk_norm_rotary(
                *(q, k, w.weight, v.weight, 1e-6, cos, sin), casting="llama", implementation="eager"
            )
        else:
            found = qwen3.apply_rotary_pos_emb(w(q), v(k), cos, sin)
        arriving = tuple(rows(*y.shape, dtype=dtype, seed=7) for y in found)
        results.append(torch.autograd.grad(found, (q, k, w.weight, v.weight), arriving))
    for mine, hf in zip(*results, strict=True):
        assert torch.equal(mine, hf)


@pytest.mark.parametrize("shape", [SMALL, PARTIAL], ids=lambda s: s.name)
def test_token_is_the_same_alone_and_in_any_batch(backend: str, shape: Shape) -> None:
    problem = random(shape._replace(B=1, S=70), torch.bfloat16, seed=3, device=DEVICE)
    whole_batch = run(problem, backend)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for index in (order, order[:1]):
        part = run(problem.map(lambda t, i=index: _tokens(t, i)), backend)
        for name in ("yq", "yk", "dq", "dk"):
            assert torch.equal(part[name], whole_batch[name][:, :, index]), name
    heads = problem.map(lambda t: t[:, -1:] if t.dim() == 4 else t)
    alone = run(heads, backend)
    for name in ("yq", "yk", "dq", "dk"):
        assert torch.equal(alone[name], whole_batch[name][:, -1:]), name


def _tokens(t: Tensor, index: Tensor) -> Tensor:
    return t[:, :, index] if t.dim() == 4 else t[index] if t.dim() == 2 else t


@pytest.mark.parametrize("each", [1, 2, 3, 8])
def test_heads_of_a_program_change_no_bit_of_a_row(
    each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "triton" not in fused_backends(OP):
        pytest.skip("no triton here")
    shape = Shape("heads", 2, 20, 7, 4, 32, 32)
    for kind in ({}, {"interleaved": True}):
        problem = random(shape, torch.float32, seed=0, device=DEVICE, **kind)
        before = run(problem, "triton")
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "heads_each", lambda *_: each)
            after = run(problem, "triton")
        for name, found in after.items():
            if name.endswith("weight"):
                torch.testing.assert_close(found, before[name])
            else:
                assert torch.equal(found, before[name]), name


def test_reruns_are_bit_equal(backend: str) -> None:
    problem = random(SMALL._replace(S=40), torch.bfloat16, seed=0, device=DEVICE)
    first = run(problem, backend)
    for _ in range(3):
        again = run(problem, backend)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shape", [SMALL, PARTIAL], ids=lambda s: s.name)
def test_a_bad_row_stays_in_its_row(backend: str, shape: Shape, bad: float) -> None:
    clean = random(shape, torch.float32, seed=1, device=DEVICE)
    q = clean.inputs["q"].clone()
    q[1, 0, 2, 3] = bad
    before = run(clean, backend)
    after = run(replace(clean, inputs={**clean.inputs, "q": q}), backend)
    for name in ("yk", "dk", "dk_weight"):
        assert torch.equal(before[name], after[name])
    for name in ("yq", "dq"):
        assert not torch.isfinite(after[name][1, 0, 2]).all()
        after[name][1, 0, 2] = before[name][1, 0, 2]
        assert torch.equal(before[name], after[name])


def test_without_eps_tokens_that_are_not_there_stay_out_of_dw(backend: str) -> None:
    problem = random(SMALL, torch.float32, seed=1, device=DEVICE).given(eps=0.0)
    found, exact = run(problem, backend), gold(problem)
    for name, value in found.items():
        torch.testing.assert_close(value.double(), exact[name], atol=1e-4, rtol=1e-4)


def test_positions_outside_the_table_are_nan(backend: str) -> None:
    if DEVICE != "cpu":
        pytest.skip("eager code asserts on the device")
    problem = random(SMALL, torch.float32, seed=1, positions=True)
    positions = problem.options["positions"].clone()
    positions[..., 1] = problem.options["cos"].shape[0]
    bad = problem.given(positions=positions)
    if backend == "cpp":
        with pytest.raises(IndexError, match=r"qk_norm_rotary: positions go from 0 to "):
            bad.run(CONTRACT.on(backend), backward=False)
        return
    found = bad.run(CONTRACT.on(backend), backward=False)
    assert found["yq"][:, :, 1].isnan().all() and found["yq"][:, :, 2:].isfinite().all()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens_outside": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "heads_outside": lambda t: t.contiguous(),
    "part_of_a_projection": lambda t: torch.cat((t, t, t), -1)[..., 32:64],
    "offset_by_one": lambda t: torch.cat((t[..., :1], t), -1)[..., 1:],
    "every_other_token": lambda t: torch.repeat_interleave(t, 2, 2)[:, :, ::2],
    "batch_inside": lambda t: t.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
    "features_not_adjacent": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_layouts_give_what_contiguous_gives(backend: str, layout: str, interleaved: bool) -> None:
    options = {"device": DEVICE, "interleaved": interleaved}
    problem = random(SMALL, torch.bfloat16, seed=4, **options)
    laid = problem.map(lambda t: LAYOUTS[layout](t) if t.dim() == 4 else t)
    expected, found = run(problem, backend), run(laid, backend)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_expanded_inputs_and_gradients(backend: str) -> None:
    problem = random(SMALL, torch.float32, seed=4, device=DEVICE)

    def expanded(t: Tensor) -> Tensor:
        return t[:, :1, :, :].expand(t.shape) if t.dim() == 4 else t

    def constant(t: Tensor) -> Tensor:
        return t.new_tensor(0.5).expand(t.shape)

    for change in (expanded, constant):
        arriving = {name: change(t) for name, t in problem.arriving.items()}
        inputs = {name: expanded(t) for name, t in problem.inputs.items()}
        laid = replace(problem, inputs=inputs, arriving=arriving)
        found = run(laid, backend)
        copied = run(laid.map(lambda t: t.clone(memory_format=torch.contiguous_format)), backend)
        assert all(torch.equal(copied[name], found[name]) for name in found)


@pytest.mark.parametrize("heads_first", [False, True])
def test_results_lie_in_memory_as_their_inputs_do(backend: str, heads_first: bool) -> None:
    options = {"device": DEVICE, "heads_first": heads_first}
    problem = random(SMALL, torch.bfloat16, seed=4, **options)
    found = run(problem, backend)
    for name in ("q", "k"):
        expected = problem.inputs[name].stride()
        assert found[f"y{name}"].stride() == expected == found[f"d{name}"].stride()


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table_dtype", DTYPES, ids=str)
def test_weight_and_table_dtypes_are_independent(
    backend: str, weight_dtype: torch.dtype, table_dtype: torch.dtype
) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        options = {"device": DEVICE, "table_dtype": table_dtype}
        problem = random(SMALL, dtype, seed=3, **options)
        weights = {n: t.to(weight_dtype) for n, t in problem.inputs.items() if "weight" in n}
        problem = replace(problem, inputs={**problem.inputs, **weights})
        ours, exact, sizes = run(problem, backend), gold(problem), magnitudes(problem)
        for name, found in ours.items():
            assert found.dtype == (weight_dtype if "weight" in name else dtype)
            assert elementwise_miss(name, found, exact[name], sizes[name]) is None


def test_inputs_are_left_alone(backend: str) -> None:
    problem = random(PARTIAL, torch.bfloat16, seed=0, device=DEVICE, positions=True)
    before = problem.map(Tensor.clone)
    run(problem, backend)
    for kept, now in (
        (before.inputs, problem.inputs),
        (before.arriving, problem.arriving),
        (before.options, problem.options),
    ):
        for name, value in kept.items():
            assert torch.equal(value, now[name]) if isinstance(value, Tensor) else True


def test_keys_or_no_keys_are_one_function(backend: str) -> None:
    problem = random(SMALL, torch.bfloat16, seed=2, device=DEVICE)
    both = run(problem, backend)
    for name in ("q", "k"):
        inputs = {"q": problem.inputs[name], "q_weight": problem.inputs[f"{name}_weight"]}
        alone = replace(problem, inputs=inputs, arriving={"yq": problem.arriving[f"y{name}"]})
        found = run(alone.given(k=None, k_weight=None), backend)
        assert torch.equal(found["yq"], both[f"y{name}"])
        assert torch.equal(found["dq"], both[f"d{name}"])


SHAPES = st.builds(
    Shape,
    st.just("drawn"),
    B=st.integers(0, 2),
    S=st.integers(0, 7),
    H=st.integers(1, 4),
    Hk=st.integers(0, 3),
    D=st.integers(2, 48),
    R=st.integers(1, 24).map(lambda half: 2 * half),
).map(lambda s: s._replace(R=min(s.R, s.D - s.D % 2)))


FLAGS = ("interleaved", "compact", "sequences", "positions", "mrope", "heads_first")


@settings(max_examples=25)
@given(
    shape=SHAPES,
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
    flags=st.fixed_dictionaries({name: st.booleans() for name in FLAGS}),
)
def test_any_shape_stays_within_its_roundings(
    shape: Shape, seed: int, dtype: torch.dtype, flags: dict[str, bool]
) -> None:
    problem = random(shape, dtype, seed=seed, device=DEVICE, **flags)
    exact, sizes = gold(problem), magnitudes(problem)
    for backend in fused_backends(OP):
        if DEVICE == "cpu":
            with sanitized(order="random", seed=seed):
                ours = run(problem, backend)
        else:
            ours = run(problem, backend)
        for name, found in ours.items():
            assert elementwise_miss(name, found, exact[name], sizes[name]) is None


def test_edges_hold_a_backward_of_more_tiles_than_programs() -> None:
    from swathe.kernels.core.heads import blocks

    strides = []
    for shape in EDGES:
        _, D, R = shape.Hk, shape.D, shape.R
        tile = blocks(D, R)
        tiles = -(-shape.B * shape.S // tile.tokens)
        P, _, each = kernels.programs(tiles, shape.H, shape.Hk, tile.warps, torch.device("cpu"))
        strides.append(P and tiles * (-(-shape.H // each) + -(-shape.Hk // each)) > P)
    assert any(strides)
