"""What changes attention's scores: softcap, ALiBi, sinks, biases; the log of each row's sum."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import swathe
from swathe.kernels.attention.api import Mask, attention, resolve_attention
from swathe.kernels.core.errors import UnsupportedFeature

B, H, K, T, S, D = 2, 4, 2, 5, 9, 16


def randn(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        randn(B, n, heads, D, seed=seed, dtype=dtype).transpose(1, 2)
        for seed, (n, heads) in enumerate(((T, H), (S, K), (S, K)))
    )
    return 2 * q, 2 * k, v


SLOPES = 2.0 ** -torch.arange(1.0, H + 1).double()
HOLES = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1, 1], [0] * 9]).bool()
CASES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": SLOPES, "causal": True},
    "alibi of each sequence": {"alibi": torch.stack((SLOPES, 3 * SLOPES))},
    "sinks": {"sinks": randn(H, seed=5)},
    "sinks and rows that see nothing": {"sinks": randn(H, seed=5), "mask": Mask(keys=HOLES)},
    "rows that see nothing": {"mask": Mask(keys=HOLES)},
    "everything": {
        "softcap": 2.0,
        "alibi": SLOPES,
        "sinks": randn(H, seed=5),
        "mask": Mask(causal=True, window=4, bias=randn(1, H, T, S, seed=6)),
    },
}


def by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    causal: bool = False,
    softcap: float | None = None,
    alibi: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """spec.py's formulas, one sequence and head at a time."""
    mask = mask or Mask(causal=causal)
    visible = mask.visible(T, S, q.device).expand(B, H, T, S)
    o, lse = torch.zeros(B, T, H, D, dtype=q.dtype), torch.zeros(B, H, T, dtype=q.dtype)
    distance = torch.arange(S) - torch.arange(S - T, S)[:, None]
    for b in range(B):
        for h in range(H):
            g = h * K // H
            z = q[b, h] @ k[b, g].T / D**0.5
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            if alibi is not None:
                z = z + (alibi if alibi.dim() == 1 else alibi[b])[h] * distance
            if mask.bias is not None:
                z = z + mask.bias.expand(B, H, T, S)[b, h]
            weight = torch.where(visible[b, h], z.exp(), 0.0)
            total = weight.sum(-1, keepdim=True)
            total = total if sinks is None else total + sinks[h].exp()
            o[b, :, h] = torch.where(total > 0, weight / total, 0.0) @ v[b, g]
            lse[b, h] = total[:, 0].log()
    return o, lse


@pytest.mark.parametrize("name", CASES)
def test_formulas_and_gradients(name: str) -> None:
    case = dict(CASES[name])
    tensors = [t.requires_grad_() for t in inputs()]
    for key in ("alibi", "sinks"):
        if key in case:
            case[key] = case[key].clone().requires_grad_()
            tensors.append(case[key])
    o, lse = attention(*tensors[:3], return_lse=True, implementation="eager", **case)
    expected = by_definition(*tensors[:3], **case)
    torch.testing.assert_close((o, lse), expected, rtol=1e-12, atol=1e-12)
    seen = lse.isfinite()
    do, dlse = torch.randn_like(o), torch.randn_like(lse)
    ours = torch.autograd.grad((o * do).sum() + (lse * dlse)[seen].sum(), tensors)
    theirs = (expected[0] * do).sum() + (expected[1] * dlse)[seen].sum()
    wanted = torch.autograd.grad(theirs, tensors)
    for mine, other in zip(ours, wanted, strict=True):
        assert mine.isfinite().all()
        if "see nothing" not in name:
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_a_row_that_sees_nothing() -> None:
    q, k, v = inputs()
    for sinks in (None, randn(H, seed=5)):
        mask = Mask(keys=HOLES)
        o, lse = attention(q, k, v, mask, sinks=sinks, return_lse=True, implementation="eager")
        assert not o[1].any()
        nothing = torch.full((H, T), -torch.inf).double()
        assert torch.equal(lse[1], nothing if sinks is None else sinks[:, None].expand(H, T))


def test_rounds_like_gemma2() -> None:
    theirs = import_module("transformers.models.gemma2.modeling_gemma2")
    q, k, v = inputs(torch.bfloat16)
    module = torch.nn.Module()
    module.num_key_value_groups = H // K  # type: ignore[assignment]
    expected, _ = theirs.eager_attention_forward(
        module.eval(), q, k, v, None, scaling=0.3, softcap=5.0
    )
    assert torch.equal(attention(q, k, v, scale=0.3, softcap=5.0, implementation="eager"), expected)


def test_agrees_with_gpt_oss() -> None:
    theirs = import_module("transformers.models.gpt_oss.modeling_gpt_oss")
    q, k, v = inputs(torch.float32)
    module = torch.nn.Module()
    module.num_key_value_groups = H // K  # type: ignore[assignment]
    module.sinks = torch.nn.Parameter(randn(H, seed=5, dtype=torch.float32))
    expected, _ = theirs.eager_attention_forward(module.eval(), q, k, v, None, scaling=0.3)
    ours = attention(q, k, v, scale=0.3, sinks=module.sinks, implementation="eager")
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_sdpa_refuses_what_it_cannot() -> None:
    q, k, v = inputs(torch.float32)
    for given in ({"softcap": 5.0}, {"sinks": randn(H)}, {"alibi": SLOPES}, {"return_lse": True}):
        with pytest.raises(UnsupportedFeature, match=r"does not serve \w+=True.*'eager'"):
            attention(q, k, v, implementation="sdpa", **given)  # type: ignore[call-overload]
    dropout = {"dropout": True}  # which the C++ library does not serve
    assert resolve_attention(q, D, **dropout).backend == "sdpa"
    assert resolve_attention(q, D, sinks=True, **dropout).backend == "eager"
    assert "sinks" in swathe.explain("attention", sinks=True)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"softcap": 0.0}, ValueError, r"softcap=0.0; it must be a positive number"),
        ({"softcap": float("inf")}, ValueError, "softcap=inf"),
        ({"alibi": torch.ones(3)}, ValueError, r"alibi is \(3,\).*4 heads needs \(4,\) or \(2, 4"),
        ({"alibi": torch.ones(H).int()}, TypeError, "alibi is torch.int32"),
        ({"sinks": torch.ones(B, H)}, ValueError, r"sinks is \(2, 4\).*needs \(4,\)"),
        ({"sinks": torch.ones(H, device="meta")}, ValueError, r"on meta.*on cpu"),
    ],
)
def test_refusals(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention(*inputs(), **given)
