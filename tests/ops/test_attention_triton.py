"""The Triton attention: every head size and mask against fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support import citizen
from support.tensors import DEVICE
from swathe.kernels.attention import eager
from swathe.kernels.attention._triton_blocks import pieces
from swathe.kernels.attention.api import AttentionSpec, Mask, attention, resolve_attention
from swathe.kernels.core.errors import UnsupportedFeature

BF16, FP32 = torch.bfloat16, torch.float32


def inputs(
    B: int, H: int, K: int, T: int, S: int, D: int, E: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as projections leave them; what arrives at o and lse."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(DEVICE)

    q, k, v = (
        randn(B, n, heads, width).to(dtype).transpose(1, 2)
        for n, heads, width in ((T, H, D), (S, K, D), (S, K, E))
    )
    return q, k, v, randn(B, T, H, E).to(dtype), randn(B, H, T)


def run(
    function: Any, tensors: tuple[Tensor, ...], spec: AttentionSpec, dtype: torch.dtype
) -> list[Tensor]:
    """o, lse and the gradients of q, k, v and sinks, everything in `dtype`."""
    *leaves, do, dlse = (t.detach().to(dtype) for t in tensors)
    leaves = [t.requires_grad_() for t in leaves]
    if spec.sinks is not None:
        sinks = spec.sinks.detach().to(torch.promote_types(dtype, FP32)).requires_grad_()
        spec, leaves = replace(spec, sinks=sinks), [*leaves, sinks]
    o, lse = function(*leaves[:3], replace(spec, lse=True))
    seen = lse.isfinite()
    total = (o * do).sum() + (lse * dlse.to(lse.dtype))[seen].sum()
    return [o.detach(), lse.detach().where(seen, -1.0), *torch.autograd.grad(total, leaves)]


def fused(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Any:
    return attention(
        q, k, v, spec.mask, scale=spec.scale, softcap=spec.softcap, alibi=spec.alibi,
        sinks=spec.sinks, return_lse=True, implementation="triton",
    )  # fmt: skip


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Root mean square of the differences, over that of the exact values."""
    return [
        ((a.double() - b).norm() / b.norm().clamp(min=1e-6)).item()
        for a, b in zip(found, exact, strict=True)
    ]


def agrees(spec: AttentionSpec, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """No worse than eager code in the same dtype, and right to a few roundings."""
    ours = errors(
        run(fused, tensors, spec, dtype),
        exact := run(eager.attention, tensors, spec, torch.float64),
    )
    theirs = errors(run(eager.attention, tensors, spec, dtype), exact)
    allowed = {BF16: 6e-3, torch.float16: 8e-4, FP32: 2e-6}[dtype]
    for name, mine, other in zip(
        ("o", "lse", "dq", "dk", "dv", "dsinks"), ours, theirs, strict=False
    ):
        assert mine <= max(1.2 * other, allowed / 2) and mine <= 2 * allowed, (name, mine, other)


HEADS = [(16, 16), (40, 40), (64, 64), (72, 72), (80, 80), (96, 96), (112, 112), (128, 128),
         (160, 160), (192, 128), (208, 208), (256, 256), (7, 5)]  # fmt: skip


# every size in bf16; fp16 is cut like it, fp32 in pieces of its own
SIZES = [(BF16, *heads) for heads in HEADS] + [(torch.float16, 80, 80)]
SIZES += [(FP32, *heads) for heads in ((16, 16), (72, 72), (192, 128), (256, 256), (7, 5))]


@pytest.mark.parametrize(("dtype", "D", "E"), SIZES, ids=str)
def test_head_sizes(dtype: torch.dtype, D: int, E: int) -> None:
    tensors = inputs(1, 4, 2, 37, 70, D, E, dtype, seed=D)
    agrees(AttentionSpec(Mask(causal=True), D**-0.5), tensors, dtype)


@pytest.mark.parametrize("D", range(1, 257))
def test_pieces_cover_the_features(D: int) -> None:
    found = pieces(D)
    assert D <= sum(found) < D + 16
    assert all(width >= 16 and width & (width - 1) == 0 for width in found)


LENGTHS = [(1, 1), (1, 130), (130, 1), (64, 64), (65, 63), (128, 128), (129, 257), (3, 200)]


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("T", "S"), LENGTHS)
def test_lengths(T: int, S: int, groups: int) -> None:
    tensors = inputs(2, 4, 4 // groups, T, S, 32, 32, BF16, seed=T)
    for mask in (Mask(), Mask(causal=True), Mask(causal=True, window=40)):
        agrees(AttentionSpec(mask, 0.2), tensors, BF16)


def test_nothing_to_do() -> None:
    for B, T, S in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        q, k, v, *_ = inputs(B, 2, 2, T, S, 16, 16, FP32)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        o, lse = attention(*leaves, return_lse=True, implementation="triton")
        assert o.shape == (B, T, 2, 16) and not o.any()
        assert S or torch.equal(lse, torch.full_like(lse, -torch.inf))
        assert all(not g.any() for g in torch.autograd.grad(o.sum(), leaves))


@settings(max_examples=settings().max_examples // 2)
@given(data=st.data(), T=st.integers(1, 90), S=st.integers(1, 90), seed=st.integers(0, 99))
def test_any_mask_and_score(data: st.DataObject, T: int, S: int, seed: int) -> None:
    B, H = 2, 2
    flag, small = st.booleans(), st.integers(1, 60)
    generator = torch.Generator().manual_seed(seed)

    def some(*size: int) -> Tensor:
        return (torch.rand(*size, generator=generator) > 0.4).to(DEVICE)

    causal = data.draw(flag)
    rows = torch.randint(0, S + 1, (B,), generator=generator).to(DEVICE)
    mask = Mask(
        causal=causal,
        window=data.draw(small) if data.draw(flag) else None,
        ahead=data.draw(small) if data.draw(flag) else None,
        chunk=data.draw(small) if data.draw(flag) else None,
        start=rows // 2 if data.draw(flag) else None,
        end=rows if data.draw(flag) else None,
        prefix=rows // 3 if causal and data.draw(flag) else None,
        keys=some(B, S) if data.draw(flag) else None,
        allowed=some(1, H, T, S) if data.draw(flag) else None,
        bias=torch.randn(B, 1, T, S, generator=generator).to(DEVICE) if data.draw(flag) else None,
    )
    spec = AttentionSpec(
        mask,
        0.25,
        softcap=5.0 if data.draw(flag) else None,
        alibi=torch.tensor([0.5, 0.1], device=DEVICE) if data.draw(flag) else None,
        sinks=torch.randn(H, generator=generator).to(DEVICE) if data.draw(flag) else None,
    )
    tensors = inputs(B, H, 1, T, S, 24, 16, FP32, seed)
    found = run(fused, tensors, spec, FP32)
    exact = run(eager.attention, tensors, spec, torch.float64)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)


def test_a_hidden_key_may_be_nan() -> None:
    q, k, v, *_ = inputs(2, 2, 1, 9, 40, 16, 16, FP32)
    end = torch.tensor([40, 21], device=DEVICE)
    expected = attention(q, k, v, Mask(end=end), implementation="triton")
    k, v = k.clone(), v.clone()
    k[1, :, 32:] = v[1, :, 32:] = torch.nan  # a tile that nobody sees
    assert torch.equal(attention(q, k, v, Mask(end=end), implementation="triton"), expected)


def test_torch_finds_what_it_expects() -> None:
    q, k, v, do, dlse = inputs(1, 2, 1, 9, 12, 16, 16, BF16)
    mask = Mask(causal=True)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    o, lse = attention(*leaves, mask, return_lse=True, implementation="triton")
    (dq,) = torch.autograd.grad(o.float().square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        dq.float().sum().backward()
    bounds = [b.detach() for b in mask.bounds_int32(9, 12, q.device)]
    bias = torch.zeros(1, 2, 9, 12, device=DEVICE)
    rows = (*bounds, None, None, None, bias, None, None)
    numbers = (None, 0.25, 0.0, 0.0, False)
    plain = [t.detach() for t in (q, k, v)]
    citizen.opchecks("attention_fwd", "triton", *plain, *rows, *numbers)
    citizen.opchecks("attention_decode", "triton", *plain, *rows, None, 0.25, 0.0)
    saved = (o.detach(), lse.detach())
    citizen.opchecks("attention_bwd", "triton", do, dlse, *plain, *saved, *rows, *numbers)
    stats = torch.zeros(1, 2, 2, 128, device=DEVICE)
    citizen.opchecks("attention_bias_bwd", "triton", do, *plain, stats, *rows, *numbers)


def test_what_it_does_not_serve() -> None:
    q, k, v, *_ = inputs(1, 2, 1, 4, 4, 16, 16, FP32)
    slopes = torch.ones(2, device=DEVICE, requires_grad=True)
    with pytest.raises(UnsupportedFeature, match=r"does not serve alibi_gradient=True.*'eager'"):
        attention(q, k, v, alibi=slopes, implementation="triton")
    choice = resolve_attention(q, 16, "triton", groups=2)
    with pytest.raises(ValueError, match=r"alibi requires a gradient.*'eager'"):
        attention(q, k, v, alibi=slopes, implementation=choice)
    wide = torch.zeros(1, 1, 2, 257, device=DEVICE)
    with pytest.raises(UnsupportedFeature, match="takes sizes up to 256, not 257"):
        attention(wide, wide, wide, implementation="triton")
    with pytest.raises(UnsupportedFeature, match=r"takes bfloat16 .*, not float64"):
        attention(q.double(), k.double(), v.double(), implementation="triton")
