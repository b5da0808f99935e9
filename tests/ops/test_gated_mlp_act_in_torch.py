"""gated_mlp_act as a citizen of torch: autograd, torch.func, checkpointing, compile, export."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support import citizen
from support.tensors import DEVICE, rows
from swathe.kernels.core.contract import Problem
from swathe.kernels.gated_mlp_act import eager
from swathe.kernels.gated_mlp_act.api import ACTS, LAYOUTS, gated_mlp_act
from swathe.kernels.gated_mlp_act.contract import CONTRACT, random
from swathe.kernels.gated_mlp_act.shapes import Shape

OP = "gated_mlp_act"
KINDS: dict[str, dict[str, Any]] = {
    "silu": {"act": "silu", "casting": "llama"},
    "gelu, halves": {"act": "gelu", "packed": "halves"},
    "gpt_oss, interleaved": {"act": "gpt_oss", "packed": "interleaved"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_torch_finds_what_it_expects(backend: str, kind: str) -> None:
    def make(M: int) -> Problem:
        options = {"seed": 2, "device": DEVICE, **KINDS[kind]}
        return random(Shape("citizen", M, 40), torch.bfloat16, **options)

    citizen.all_of_torch(CONTRACT, backend, make)


@pytest.mark.parametrize("act", ACTS)
def test_gradcheck_of_the_definition(act: str) -> None:
    gate, up = (2 * rows(3, 6, seed=s).double().requires_grad_() for s in (0, 1))
    assert torch.autograd.gradcheck(
        lambda g, u: eager.gated_mlp_act(g, u, act, 0.7, 1.7, "fp32", "halves"), (gate, up)
    )
    for packed in LAYOUTS:
        assert torch.autograd.gradcheck(
            lambda x, p=packed: eager.gated_mlp_act(x, None, act, 0.7, 1.7, "fp32", p), (gate,)
        )


def test_vmap_over_any_dimensions(backend: str) -> None:
    gate, up = rows(2, 3, 8), rows(3, 2, 8, seed=1)

    def gated(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return gated_mlp_act(g, u, implementation=backend)

    found = torch.func.vmap(gated, in_dims=(1, 0))(gate, up)
    shared = torch.func.vmap(gated, in_dims=(1, None))(gate, up[0])
    for i in range(3):
        assert torch.equal(found[i], gated(gate[:, i], up[i]))
        assert torch.equal(shared[i], gated(gate[:, i], up[0]))


def test_opcheck(backend: str) -> None:
    gate, up, dy = (rows(3, 24, seed=s) for s in range(3))
    x = rows(3, 48, seed=3)
    gated_mlp_act(gate, up, implementation=backend)  # defines the operators
    numbers = ("gpt_oss", 7.0, 1.702)
    citizen.opchecks("gated_mlp_act_fwd", backend, gate, up, *numbers, "llama")
    citizen.opchecks("gated_mlp_act_bwd", backend, dy, gate, up, *numbers)
    for packed in LAYOUTS:
        citizen.opchecks("packed_gated_mlp_act_fwd", backend, x, *numbers, "fp32", packed)
        citizen.opchecks("packed_gated_mlp_act_bwd", backend, dy, x, *numbers, packed)


def test_autocast_leaves_dtypes_alone(backend: str) -> None:
    with torch.autocast(DEVICE, torch.bfloat16):
        assert gated_mlp_act(rows(2, 8), rows(2, 8), implementation=backend).dtype == torch.float32
