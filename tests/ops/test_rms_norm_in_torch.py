"""RMSNorm as a citizen of torch: autograd, torch.func, autocast, checkpointing, compile, export."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from support.tensors import DEVICE, DTYPES, rows
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.kernels.norm import eager
from swathe.kernels.norm.api import CASTINGS, resolve_rms_norm, rms_norm


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
    assert torch.equal(w.grad, torch.zeros_like(w))
    x.grad = None
    y, _ = rms_norm(x, w.detach(), residual=r.detach(), implementation=backend)
    y.sum().backward()
    expected = x.detach().clone().requires_grad_()
    eager.rms_norm(expected + r.detach(), w.detach(), 1e-6, 0.0, "llama", None).sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)


def test_second_derivatives_and_forward_mode_raise(backend: str) -> None:
    x, w = rows(2, 8).requires_grad_(), rows(8)
    (dx,) = torch.autograd.grad(rms_norm(x, w, implementation=backend).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        dx.sum().backward()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(
            lambda t: rms_norm(t, w, implementation=backend), (x.detach(),), (x.detach(),)
        )


def test_func_transforms(backend: str) -> None:
    x, w = rows(3, 5, 16), rows(16)

    def norm(t: Tensor) -> Tensor:
        return rms_norm(t, w, implementation=backend)

    batched = torch.func.vmap(norm)(x)
    assert torch.equal(batched, norm(x))
    gradient = torch.func.grad(lambda t: norm(t).square().sum())(x)
    expected = x.clone().requires_grad_()
    norm(expected).square().sum().backward()
    assert torch.equal(gradient, expected.grad)
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


@pytest.mark.parametrize("residual", [False, True])
def test_compiles_to_one_graph(backend: str, residual: bool) -> None:
    def layer(t: Tensor, w: Tensor) -> Tensor:
        if not residual:
            return rms_norm(t, w, implementation=backend) * 2
        y, h = rms_norm(t, w, residual=t * 3, implementation=backend)
        return y + h

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for M in (4, 7, 9):
        results = []
        for function in (layer, compiled):
            x, w = rows(M, 40).requires_grad_(), rows(40, seed=1).requires_grad_()
            y = function(x, w)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, w))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


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
    ops = torch.ops.swathe
    resolve_rms_norm(x, w, backend)
    y, rstd = getattr(ops.rms_norm_fwd, backend)(x, w, 1e-6, 0.0, "llama")
    assert y.shape == x.shape
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    for op, args in (
        (ops.rms_norm_fwd, (x, w, 1e-6, 0.0, "llama")),
        (ops.add_rms_norm_fwd, (x, dy, w, 1e-6, 0.0, "llama")),
        (ops.rms_norm_bwd, (dy, x, w, rstd, None, 0.0)),
        (ops.rms_norm_bwd, (dy, x, w, rstd, dy, 0.0)),
    ):
        torch.library.opcheck(getattr(op, backend), args, test_utils=tests)


def test_export(backend: str) -> None:
    class Norm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(rows(16))

        def forward(self, x: Tensor) -> Tensor:
            return rms_norm(x, self.weight, implementation=backend)

    module, x = Norm(), rows(4, 16)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: torch.export.Dim("M")}})
    assert torch.equal(program.module()(rows(9, 16, seed=4)), module(rows(9, 16, seed=4)))
