"""LayerNorm as a citizen of torch: autograd, torch.func, checkpointing, compile, export."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support import citizen
from support.tensors import DEVICE, rows
from swathe.kernels.core.contract import Problem
from swathe.kernels.layer_norm import eager
from swathe.kernels.layer_norm.api import layer_norm
from swathe.kernels.layer_norm.contract import CONTRACT, random
from swathe.kernels.layer_norm.shapes import Shape

OP = "layer_norm"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "residual": {"residual": True},
    "no weights": {"affine": "none"},
    "residual, weight alone": {"residual": True, "affine": "weight"},
}


def problem_of(M: int, kind: str = "plain") -> Problem:
    return random(Shape("citizen", M, 40), torch.bfloat16, seed=2, device=DEVICE, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_torch_finds_what_it_expects(backend: str, kind: str) -> None:
    citizen.all_of_torch(CONTRACT, backend, lambda M: problem_of(M, kind))


def test_gradcheck_of_the_definition() -> None:
    tensors = tuple(rows(*s).double().requires_grad_() for s in ((3, 17), (17,), (17,), (3, 17)))
    assert torch.autograd.gradcheck(lambda x, w, b, r: eager.layer_norm(x, w, b, 1e-5, r), tensors)
    assert torch.autograd.gradgradcheck(
        lambda x: eager.layer_norm(x, None, None, 1e-5, None), tensors[:1]
    )


def test_vmap_over_weights_is_refused(backend: str) -> None:
    x, weights = rows(2, 8), rows(4, 8)
    for residual in (None, x):
        with pytest.raises(NotImplementedError, match="implementation='eager'"):
            torch.func.vmap(
                lambda w, r=residual: layer_norm(x, w, residual=r, implementation=backend)
            )(weights)


def test_vmap_over_any_dimension(backend: str) -> None:
    x, r = rows(2, 3, 8), rows(2, 8)

    def normed(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return layer_norm(one, residual=other, implementation=backend)

    found = torch.func.vmap(normed, in_dims=(1, None))(x, r)
    for i in range(3):
        for batched, alone in zip(found, normed(x[:, i], r), strict=True):
            assert torch.equal(batched[i], alone)


def test_opcheck(backend: str) -> None:
    x, r, w = rows(3, 24), rows(3, 24, seed=1), rows(24, seed=2)
    statistics = torch.stack((x.mean(-1), torch.rsqrt(x.var(-1, correction=0) + 1e-5)))
    layer_norm(x, w, implementation=backend)  # defines the operators
    citizen.opchecks("layer_norm_fwd", backend, x, w, None, 1e-5)
    citizen.opchecks("add_layer_norm_fwd", backend, x, r, w, w, 1e-5)
    citizen.opchecks("layer_norm_bwd", backend, r, x, w, statistics, None, torch.float32)
    citizen.opchecks("layer_norm_bwd", backend, r, x, None, statistics, r, None)


def test_autocast_leaves_dtypes_alone(backend: str) -> None:
    x, w = rows(4, 16, dtype=torch.bfloat16), rows(16)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert layer_norm(x, w, implementation=backend).dtype == torch.bfloat16
        assert layer_norm(x.float(), w, implementation=backend).dtype == torch.float32
