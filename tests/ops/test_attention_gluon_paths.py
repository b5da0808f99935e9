"""Backend "triton" on path "gluon", emulated: the whole contract, and who serves which call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from support.gluon import Stats, emulated
from support.tensors import DEVICE
from swathe.kernels.attention import paths
from swathe.kernels.attention._gluon_sm90 import forward as strict_forward
from swathe.kernels.attention.api import attention
from swathe.kernels.attention.contract import CONTRACT, GROUPS, random
from swathe.kernels.attention.mask import Mask
from swathe.kernels.attention.shapes import Shape
from swathe.kernels.core.contract import check
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.kernels.core.registry import registered
from swathe.kernels.core.spec import Spec

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the emulator computes on a CPU")
bf16, fp16 = torch.bfloat16, torch.float16
SHAPE = Shape("tile", 1, 4, 2, 70, 90, 64, 64)


@pytest.fixture
def hopper() -> Iterator[Stats]:
    """Path "gluon" in the emulator; gives what its kernels did."""
    with paths.forced("gluon"), emulated(seed=1) as stats:
        yield stats


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_contract(group: str, hopper: Stats) -> None:
    """With what the Gluon kernels do not serve, as users would have it."""
    check(CONTRACT, "triton", device=DEVICE, dtypes=[bf16], groups=[group])
    assert (hopper.programs > 0) == (group != "bias")


def test_forward_and_backward_are_both_taken(hopper: Stats) -> None:
    problem = random(SHAPE, fp16, seed=1).given(causal=True)
    ours = problem.run(CONTRACT.on("triton"))
    forward_and_backward = hopper.products
    with paths.forced("portable"):
        portable = problem.run(CONTRACT.on("triton"))
    assert hopper.products == forward_and_backward > 0
    gold = CONTRACT.gold(problem)
    for name, found in ours.items():
        error = (found - gold[name]).norm()
        assert error <= 1.5 * (portable[name] - gold[name]).norm() + 1e-6, name


def test_a_dense_mask_goes_to_the_portable_kernels(hopper: Stats) -> None:
    q, k, v = random(SHAPE, bf16, seed=2).inputs.values()
    allowed = torch.ones(1, 1, SHAPE.T, SHAPE.S, dtype=torch.bool)
    attention(q, k, v, Mask(allowed=allowed), implementation="triton")
    assert hopper.programs == 0


def test_a_named_backend_refuses_it() -> None:
    q, k, v = random(SHAPE, bf16, seed=2).inputs.values()
    mask = Mask(allowed=torch.ones(1, 1, SHAPE.T, SHAPE.S, dtype=torch.bool))
    first, last = mask.bounds_int32(SHAPE.T, SHAPE.S, q.device)
    rest = (first, last, None, None, mask.allowed, None, None, None, None, 0.1, 0.0, 0.0, False)
    with pytest.raises(UnsupportedFeature, match="'gluon' cannot serve this forward: allowed"):
        strict_forward(q, k, v, *rest)


def test_few_queries_take_the_kernel_for_caches(hopper: Stats) -> None:
    q, k, v = random(SHAPE._replace(T=3, S=700), bf16, seed=3).inputs.values()
    lengths = torch.tensor([650], dtype=torch.int32)
    with torch.no_grad():
        o = attention(q, k, v, seq_lens=lengths, causal=True, implementation="triton")
        with paths.forced("portable"):
            portable = attention(q, k, v, seq_lens=lengths, causal=True, implementation="triton")
    assert hopper.product_flops > 0 and hopper.loads > 0
    assert torch.allclose(o.float(), portable.float(), atol=2e-2)


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({}, None),
        ({"features": (("paged", True),)}, None),
        ({"features": (("paged", True),), "grad": True}, "no gradient"),
        ({"features": (("dropout", True),)}, "dropout"),
        ({"arch": 100}, "sm_90"),
        ({"arch": 80}, "sm_90"),
        ({"arch": None}, "sm_90"),
        ({"dtype": torch.float32}, "float32"),
    ],
)
def test_what_the_backend_says_before_a_launch(change: dict[str, Any], refused: str | None) -> None:
    spec = replace(Spec("attention", "cuda", bf16, 128, arch=90), **change)
    backend = registered("attention")["gluon"]
    reasons = backend.capabilities.reasons(spec) + backend.limits(spec)
    assert (refused is None and not reasons) or str(refused) in " ".join(reasons), reasons
