"""attention as a citizen of torch: autograd, torch.func, checkpointing, compile, export."""

from __future__ import annotations

import pytest
import torch

from support import citizen
from support.tensors import DEVICE
from swathe.kernels.attention.api import Mask, attention
from swathe.kernels.attention.contract import CONTRACT, random
from swathe.kernels.attention.shapes import Shape
from swathe.kernels.core.contract import Problem

OP = "attention"


def problem_of(T: int, kind: str = "causal") -> Problem:
    """Only the queries vary, or the keys with them where a bias must fit."""
    return random(
        Shape("citizen", 2, 4, 2, T, 13, 16, 16), torch.bfloat16, seed=2, device=DEVICE, kind=kind
    )


@pytest.mark.parametrize("kind", ["causal", "scores"])
def test_torch_finds_what_it_expects(backend: str, kind: str) -> None:
    citizen.all_of_torch(CONTRACT, backend, lambda T: problem_of(T, kind))


def test_opcheck(backend: str) -> None:
    problem = problem_of(5, "bias")
    q, k, v, bias = (t.detach() for t in problem.inputs.values())
    found = attention(q, k, v, Mask(bias=bias), return_lse=True, implementation=backend)
    o, lse = (t.detach() for t in found)
    bounds = Mask().bounds_int32(5, 13, q.device)
    rows = (*bounds, None, None, None, bias, None, None)
    numbers = (None, 0.25, 0.0, 0.0, False)
    do, dlse = problem.arriving["o"], problem.arriving["lse"]
    stats = torch.zeros(2, 4, 2, 128, device=DEVICE)
    citizen.opchecks("attention_fwd", backend, q, k, v, *rows, *numbers)
    citizen.opchecks("attention_decode", backend, q, k, v, *rows, None, 0.25, 0.0)
    citizen.opchecks("attention_bwd", backend, do, dlse, q, k, v, o, lse, *rows, *numbers)
    citizen.opchecks("attention_bias_bwd", backend, do, q, k, v, stats, *rows, *numbers)


def test_autocast_rounds_q_k_and_v(backend: str) -> None:
    q, k, v = (t.float() for t in problem_of(5).inputs.values())
    with torch.autocast(DEVICE, torch.bfloat16):
        o = attention(q, k, v, causal=True, implementation=backend)
    rounded = (t.bfloat16() for t in (q, k, v))
    assert torch.equal(o, attention(*rounded, causal=True, implementation=backend))


def test_no_tensor_has_the_size_of_the_scores(backend: str) -> None:
    """Windows, packed documents and causality at T = S: nothing of T x S elements is made."""
    T = 257
    borders = torch.tensor([0, 100, 140, T], device=DEVICE)
    q, k, v = (torch.randn(1, 2, T, 16, device=DEVICE).requires_grad_() for _ in range(3))
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            found = function(*args, **(kwargs or {}))
            made = found if isinstance(found, tuple | list) else (found,)
            sizes.extend(t.numel() for t in made if isinstance(t, torch.Tensor))
            return found

    for mask, given in (
        (Mask(causal=True, window=30), {}),
        (None, {"causal": True, "cu_seqlens": borders}),
    ):
        with Sizes():
            o = attention(q, k, v, mask, implementation=backend, **given)  # type: ignore[call-overload]
            torch.autograd.grad(o.sum(), (q, k, v))
    assert sizes and max(sizes) < T * T, max(sizes)
