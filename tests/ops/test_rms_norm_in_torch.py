"""RMSNorm as a citizen of torch: autograd, torch.func, autocast, checkpointing, compile, export."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from support import citizen
from support.tensors import DEVICE, DTYPES, rows
from swathe.kernels.core.contract import Problem
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.kernels.norm import eager
from swathe.kernels.norm.api import CASTINGS, resolve_rms_norm, rms_norm
from swathe.kernels.norm.contract import CONTRACT, random
from swathe.kernels.norm.shapes import Shape

OP = "rms_norm"


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("casting", CASTINGS)
def test_torch_finds_what_it_expects(backend: str, casting: str, residual: bool) -> None:
    def make(M: int) -> Problem:
        options = {"device": DEVICE, "casting": casting, "residual": residual}
        return random(Shape("citizen", M, 40), torch.bfloat16, seed=2, **options)

    citizen.all_of_torch(CONTRACT, backend, make)


def test_gradcheck_of_the_definition() -> None:
    x, weight, r = (rows(*s).double().requires_grad_() for s in ((3, 17), (17,), (3, 17)))
    for casting in CASTINGS:
        assert torch.autograd.gradcheck(
            lambda *t, c=casting: eager.rms_norm(t[0], t[1], 1e-6, 0.5, c, t[2]), (x, weight, r)
        )


def test_double_runs_on_eager_and_names_what_cannot(backend: str) -> None:
    x, weight = rows(3, 8).double(), rows(8).double()
    assert rms_norm(x, weight).dtype == torch.float64
    with pytest.raises(
        UnsupportedFeature, match=r"takes bfloat16 or float16 or float32, not float64.*'eager'"
    ):
        rms_norm(x, weight, implementation=backend)


def test_only_part_of_the_outputs_used(backend: str) -> None:
    x, r, w = (
        rows(4, 32).requires_grad_(),
        rows(4, 32, seed=1).requires_grad_(),
        rows(32).requires_grad_(),
    )
    _, h = rms_norm(x, w, residual=r, implementation=backend)
    h.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and torch.equal(r.grad, torch.ones_like(r))
    assert w.grad is None, "an optimiser takes zeros for a gradient, and decays the weight"
    x.grad = None
    y, _ = rms_norm(x, w.detach(), residual=r.detach(), implementation=backend)
    y.sum().backward()
    expected = x.detach().clone().requires_grad_()
    eager.rms_norm(expected + r.detach(), w.detach(), 1e-6, 0.0, "llama", None).sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)


def test_vmap_over_weights_is_refused(backend: str) -> None:
    x = rows(3, 5, 16)
    with pytest.raises(NotImplementedError, match="implementation='eager'"):
        torch.func.vmap(lambda weight: rms_norm(x, weight, implementation=backend))(rows(4, 16))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_bitwise(backend: str, reentrant: bool) -> None:
    def block(t: Tensor) -> Tensor:
        y, h = rms_norm(t * 2, weight, residual=t, implementation=backend)
        return y + h

    weight = rows(48, dtype=torch.bfloat16, seed=1).requires_grad_()
    grads = []
    for wrap in (False, True):
        x = rows(6, 48, dtype=torch.bfloat16).requires_grad_()
        weight.grad = None
        out = checkpoint(block, x, use_reentrant=reentrant) if wrap else block(x)
        out.float().square().sum().backward()
        grads.append((x.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("casting", CASTINGS)
def test_autocast_changes_nothing_that_eager_does_not(backend: str, casting: str) -> None:
    for dtype in DTYPES[:2]:
        x, w = rows(4, 64, dtype=dtype), rows(64)
        with torch.autocast(DEVICE, torch.bfloat16):
            ours = rms_norm(x, w, casting=casting, implementation=backend)
            theirs = eager.rms_norm(x, w, 1e-6, 0.0, casting, None)
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)


def test_trace_names_the_backend(backend: str) -> None:
    graphs = []

    def spy(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compile(lambda t, w: rms_norm(t, w, implementation=backend), backend=spy, fullgraph=True)(
        rows(2, 8), rows(8)
    )
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert f"swathe.rms_norm_fwd.{backend}" in targets


def test_opcheck(backend: str) -> None:
    x, w, dy = rows(3, 24), rows(24), rows(3, 24, seed=2)
    rstd = torch.rsqrt(x.square().mean(-1) + 1e-6)
    resolve_rms_norm(x, w, backend)
    citizen.opchecks("rms_norm_fwd", backend, x, w, 1e-6, 0.0, "llama")
    citizen.opchecks("add_rms_norm_fwd", backend, x, dy, w, 1e-6, 0.0, "llama")
    citizen.opchecks("rms_norm_bwd", backend, dy, x, w, rstd, None, 0.0)
    citizen.opchecks("rms_norm_bwd", backend, dy, x, w, rstd, dy, 0.0)
