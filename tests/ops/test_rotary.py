"""rotary on every backend: the contract, HF's own functions, layouts, positions, invariances."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from support.interpreter import sanitized
from support.tensors import DEVICE, DTYPES, fused_backends, rows
from swathe.kernels.core.contract import Outputs, Problem, check
from swathe.kernels.core.testing import elementwise_miss
from swathe.kernels.rotary.api import CASTINGS, rotary
from swathe.kernels.rotary.contract import CONTRACT, gold, magnitudes, random
from swathe.kernels.rotary.shapes import Shape

OP = "rotary"


def run(problem: Problem, backend: str) -> Outputs:
    return problem.run(CONTRACT.on(backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("casting", CASTINGS)
def test_contract(backend: str, casting: str, dtype: torch.dtype) -> None:
    check(CONTRACT, backend, device=DEVICE, dtypes=[dtype], groups=[casting])


def test_contract_with_several_heads_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    if "triton" not in fused_backends(OP):
        pytest.skip("there is no Triton on this device")
    from swathe.kernels.core import heads

    monkeypatch.setattr(heads, "PROGRAMS", 0.25)
    assert heads.heads_each(3, 5, torch.device("cpu")) == 3
    check(CONTRACT, "triton", device=DEVICE, dtypes=[torch.bfloat16], groups=["fp32"])


def tables(S: int, R: int, dtype: torch.dtype, *, repeat: bool = False) -> tuple[Tensor, Tensor]:
    """cos and sin (1, S, R) as HF's rotary embeddings make them."""
    frequencies = 10_000.0 ** -(torch.arange(0, R, 2) / R)
    angles = torch.arange(S)[:, None] * frequencies
    angles = angles.repeat_interleave(2, -1) if repeat else torch.cat((angles, angles), -1)
    return angles.cos().to(dtype)[None].to(DEVICE), angles.sin().to(dtype)[None].to(DEVICE)


@pytest.mark.parametrize("heads", [1, 3, 7, 24, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_llama_bit_for_bit(backend: str, heads: int, dtype: torch.dtype) -> None:
    theirs = import_module("transformers.models.llama.modeling_llama").apply_rotary_pos_emb
    q = rows(2, 9, heads, 64, dtype=dtype).transpose(1, 2)
    k = rows(2, 9, 1, 64, dtype=dtype, seed=1).transpose(1, 2)
    cos, sin = tables(9, 64, dtype)
    ours = rotary(q, k, cos, sin, casting="llama", implementation=backend)
    for found, expected in zip(ours, theirs(q, k, cos, sin), strict=True):
        assert found.dtype == expected.dtype
        if dtype == torch.float32:  # a GPU contracts a product and a sum
            torch.testing.assert_close(found, expected)
        else:
            assert torch.equal(found, expected)


def test_gpt_neox_partial_bit_for_bit(backend: str) -> None:
    theirs = import_module("transformers.models.gpt_neox.modeling_gpt_neox").apply_rotary_pos_emb
    q, k = (rows(2, 3, 5, 96, dtype=torch.bfloat16, seed=s) for s in range(2))
    cos, sin = tables(5, 24, torch.bfloat16)
    ours = rotary(q, k, cos, sin, rotary_dim=24, casting="llama", implementation=backend)
    expected = theirs(q, k, cos, sin)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_cohere_interleaved_is_one_rounding_of_theirs(backend: str) -> None:
    theirs = import_module("transformers.models.cohere.modeling_cohere").apply_rotary_pos_emb
    q, k = (rows(2, 3, 5, 64, dtype=torch.bfloat16, seed=s) for s in range(2))
    cos, sin = tables(5, 64, torch.float32, repeat=True)
    # Cohere computes in fp32 and rounds at the end, which is casting "fp32"
    ours = rotary(q, k, cos, sin, interleaved=True, implementation=backend)
    for found, expected in zip(ours, theirs(q, k, cos, sin), strict=True):
        assert (found != expected).float().mean() < 2e-3


def test_qwen2_vl_sections_bit_for_bit(backend: str) -> None:
    theirs = import_module("transformers.models.llama.modeling_llama").apply_rotary_pos_emb
    q, k = (rows(2, 3, 5, 32, dtype=torch.bfloat16, seed=s) for s in range(2))
    cos, sin = (rows(3, 2, 5, 32, dtype=torch.bfloat16, seed=s).clamp(-1, 1) for s in (5, 6))
    section = (8, 4, 4)
    ours = rotary(q, k, cos, sin, mrope_section=section, casting="llama", implementation=backend)
    # Qwen2-VL: both halves of a table are cut into the sections, which take axes 0, 1, 2 in turn
    chosen = [
        torch.cat([part[i % 3] for i, part in enumerate(t.split(section * 2, -1))], -1)
        for t in (cos, sin)
    ]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs(q, k, *chosen), strict=True))


def test_packed_sequences_are_their_parts(backend: str) -> None:
    cos, sin = (t[0] for t in tables(16, 32, torch.float32))
    lengths = (7, 1, 12)
    q = rows(1, 4, sum(lengths), 32)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(DEVICE)
    for kind in (torch.int64, torch.int32):
        packed = rotary(q, None, cos, sin, positions=positions.to(kind), implementation=backend)
        for part, n in zip(packed.split(lengths, 2), lengths, strict=True):
            start = 0 if n == 7 else 7 if n == 1 else 8
            alone = rotary(
                q[:, :, start : start + n], None, cos[:n], sin[:n], implementation=backend
            )
            assert torch.equal(part, alone)


def test_positions_outside_the_table_touch_nothing_else(backend: str) -> None:
    cos, sin = (t[0] for t in tables(4, 16, torch.float32))
    q = rows(1, 2, 3, 20)
    bad = torch.tensor([1, 4, -1], device=DEVICE)
    if backend == "cpp":
        with pytest.raises(IndexError, match=r"positions go from -1 to 4; the tables have 4 rows"):
            rotary(q, None, cos, sin, rotary_dim=16, positions=bad, implementation=backend)
        return
    with sanitized():
        y = rotary(q, None, cos, sin, rotary_dim=16, positions=bad, implementation=backend)
    good = rotary(
        q, None, cos, sin, rotary_dim=16, positions=bad.clamp(0, 3), implementation=backend
    )
    assert torch.equal(y[:, :, 0], good[:, :, 0])
    assert y[:, :, 1:, :16].isnan().all() and torch.equal(y[..., 16:], q[..., 16:])
    with pytest.raises(IndexError):
        rotary(q.cpu(), None, cos.cpu(), sin.cpu(), rotary_dim=16, positions=bad.cpu())


@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_back_gives_the_input(backend: str, interleaved: bool) -> None:
    q = rows(2, 3, 7, 40).requires_grad_()
    cos, sin = tables(7, 40, torch.float32, repeat=interleaved)
    y = rotary(q, None, cos, sin, interleaved=interleaved, implementation=backend)
    torch.testing.assert_close(y.norm(dim=-1), q.norm(dim=-1))
    (back,) = torch.autograd.grad(y, q, y.detach())
    torch.testing.assert_close(back, q)


def test_results_lie_as_their_inputs_do(backend: str) -> None:
    cos, sin = tables(5, 16, torch.float32)
    projected = rows(2, 5, 3, 16).transpose(1, 2).requires_grad_()
    y = rotary(projected, None, cos, sin, implementation=backend)
    assert y.transpose(1, 2).is_contiguous()
    plain = rows(2, 3, 5, 16)
    assert rotary(plain, None, cos, sin, implementation=backend).is_contiguous()


LAYOUTS = {
    "projection": lambda t: t.transpose(1, 2),
    "part of a fused projection": lambda t: t[..., 3:27].transpose(1, 2),
    "offset by one": lambda t: (
        t.flatten()[1 : 1 + 2 * 5 * 2 * 24].view(2, 5, 2, 24).transpose(1, 2)
    ),
    "every other token": lambda t: t[:, ::2].transpose(1, 2),
    "expanded": lambda t: t[:1, :, :1].expand(3, -1, 4, -1).transpose(1, 2),
    "features apart": lambda t: t.transpose(0, 3),
    "one token": lambda t: t[:, 2:3].transpose(1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_layouts_give_what_contiguous_gives(backend: str, layout: str, interleaved: bool) -> None:
    q = LAYOUTS[layout](rows(2, 5, 3, 28, dtype=torch.bfloat16))
    dq = LAYOUTS[layout](rows(2, 5, 3, 28, dtype=torch.bfloat16, seed=3))
    R = min(24, q.shape[-1] // 2 * 2)
    cos, sin = (t[0] for t in tables(q.shape[2], R, torch.bfloat16))
    options: dict[str, Any] = {"rotary_dim": R, "interleaved": interleaved}
    found = []
    for x, d in ((q, dq), (q.contiguous(), dq.contiguous())):
        leaf = x.detach().requires_grad_()
        y = rotary(leaf, None, cos, sin, **options, implementation=backend)
        found.append((y, *torch.autograd.grad(y, leaf, d)))
    for strided, contiguous in zip(*found, strict=True):
        assert torch.equal(strided, contiguous)
    wide = rows(*cos.shape[:-1], 2 * R, dtype=torch.bfloat16, seed=9)
    wide[..., ::2], apart = cos, wide[..., ::2]
    assert torch.equal(rotary(q, None, apart, sin, **options, implementation=backend), found[0][0])


def test_an_element_depends_on_its_pair_alone(backend: str) -> None:
    problem = random(Shape("alone", 3, 6, 5, 2, 24, 16), torch.bfloat16, seed=1, device=DEVICE)
    whole = run(problem, backend)
    part = problem.map(lambda t: t[1:2] if t.dim() == 4 else t)
    for name, value in run(part, backend).items():
        assert torch.equal(value, whole[name][1:2])
    q = problem.inputs["q"].clone()
    q[1, 2, 3, 4] = float("nan")
    bad = run(replace(problem, inputs={**problem.inputs, "q": q}), backend)
    changed = bad["yq"].isnan().nonzero().tolist()
    assert changed == [[1, 2, 3, 4], [1, 2, 3, 12]], "its own place and its partner's"
    assert torch.equal(bad["dq"], whole["dq"])


def test_inputs_are_left_alone_and_reruns_are_bit_equal(backend: str) -> None:
    problem = random(Shape("kept", 2, 5, 3, 1, 16, 16), torch.bfloat16, seed=0, device=DEVICE)
    before = problem.map(Tensor.clone)
    first, second = run(problem, backend), run(problem, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name, value in before.inputs.items():
        assert torch.equal(value, problem.inputs[name])
    for name in ("cos", "sin"):
        assert torch.equal(before.options[name], problem.options[name])


@given(
    B=st.integers(0, 3), S=st.integers(0, 6), H=st.integers(1, 9), Hk=st.integers(0, 3),
    half=st.integers(1, 20), tail=st.integers(0, 9), seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES), interleaved=st.booleans(), compact=st.booleans(),
    positions=st.booleans(), mrope=st.booleans(), heads_first=st.booleans(),
)  # fmt: skip
def test_any_shape_stays_within_its_roundings(
    B: int, S: int, H: int, Hk: int, half: int, tail: int, seed: int, dtype: torch.dtype,
    **kinds: bool,
) -> None:  # fmt: skip
    shape = Shape("drawn", B, S, H, Hk, 2 * half + tail, 2 * half)
    problem = random(shape, dtype, seed=seed, device=DEVICE, **kinds)
    exact, sizes = gold(problem), magnitudes(problem)
    for name in fused_backends(OP):
        with sanitized(order="random", seed=seed):
            ours = run(problem, name)
        for key, value in ours.items():
            assert elementwise_miss(key, value, exact[key], sizes[key]) is None
