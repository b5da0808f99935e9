"""Cross-entropy as a citizen of torch: autograd, torch.func, checkpointing, compile, export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from support.tensors import DEVICE, rows
from swathe.kernels.cross_entropy.api import cross_entropy, resolve_cross_entropy

OP = "cross_entropy"
NUMBERS = (-100, 0.1, 5.0, 0.5, 1e-3)
OPTIONS: dict[str, Any] = {
    "label_smoothing": 0.1,
    "softcap": 5.0,
    "logit_scale": 0.5,
    "z_loss": 1e-3,
}


def labels(*shape: int, V: int = 40) -> Tensor:
    found = torch.randint(0, V, shape, generator=torch.Generator().manual_seed(5))
    found.flatten()[0] = -100
    return found.to(DEVICE)


def gradients(function: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x if x.requires_grad else x.detach().requires_grad_()
    x.grad = None
    loss = function(x)
    loss.sum().backward()
    assert x.grad is not None
    return loss.detach(), x.grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "capped"])
def test_gradcheck_of_the_definition(reduction: Any, options: dict[str, Any]) -> None:
    x = rows(3, 7).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda t: cross_entropy(t, labels(3, V=7), reduction=reduction, **options), x
    )


def test_second_derivatives_and_forward_mode_raise(backend: str) -> None:
    x, y = rows(2, 8).requires_grad_(), labels(2, V=8)
    loss = cross_entropy(x, y, implementation=backend)
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"cross_entropy: .*first derivatives only"):
        dx.sum().backward()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(
            lambda t: cross_entropy(t, y, implementation=backend), (x.detach(),), (x.detach(),)
        )


def test_twice_through_one_graph(backend: str) -> None:
    x = rows(4, 40).requires_grad_()
    loss = cross_entropy(x, labels(4), implementation=backend)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])


def test_func_transforms(backend: str) -> None:
    x, y = rows(3, 5, 40), labels(3, 5)

    def loss(t: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(t, target, implementation=backend)

    each = torch.stack([loss(a, b) for a, b in zip(x, y, strict=True)])
    assert torch.equal(torch.func.vmap(loss)(x, y), each)
    assert torch.equal(torch.func.grad(loss)(x, y), gradients(lambda t: loss(t, y), x)[1])
    shared = torch.func.vmap(loss, in_dims=(0, None))(x, y[0])
    torch.testing.assert_close(shared, torch.stack([loss(a, y[0]) for a in x]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_bitwise(backend: str, reentrant: bool) -> None:
    def block(t: Tensor) -> Tensor:
        return cross_entropy(t * 2, labels(6), implementation=backend)

    x = rows(6, 40, dtype=torch.bfloat16)
    plain = gradients(block, x)
    again = gradients(lambda t: checkpoint(block, t, use_reentrant=reentrant), x)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_saved_tensors_go_through_hooks(backend: str) -> None:
    x, y, packed = rows(4, 40), labels(4), []

    def pack(t: Tensor) -> Tensor:
        packed.append(tuple(t.shape))
        return t.clone()

    plain = gradients(lambda t: cross_entropy(t, y, implementation=backend), x)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hooked = gradients(lambda t: cross_entropy(t, y, implementation=backend), x)
    assert all(torch.equal(a, b) for a, b in zip(plain, hooked, strict=True))
    # of the size of the logits only they themselves are kept
    assert packed.count((4, 40)) == 1


def test_functional_call_and_autocast(backend: str) -> None:
    class Head(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return cross_entropy(super().forward(input), labels(4), implementation=backend)

    head, x = Head(8, 40).to(DEVICE), rows(4, 8)
    other = {k: v.detach() * 2 for k, v in head.named_parameters()}
    loss = torch.func.functional_call(head, other, (x,))
    assert loss != head(x)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert head(x).dtype == torch.float32
        torch.testing.assert_close(head(x), head(x.bfloat16()))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_to_one_graph_and_the_same_bits(backend: str, reduction: Any) -> None:
    def layer(t: Tensor, target: Tensor) -> Tensor:
        options: dict[str, Any] = {"reduction": reduction, **OPTIONS}
        return cross_entropy(t, target, implementation=backend, **options)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for M in (4, 7, 9):
            x, y = rows(M, 40).requires_grad_(), labels(M)
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(y, 0)
            ours, traced = (
                gradients(lambda t, y=y: layer(t, y), x),
                gradients(lambda t, y=y: compiled(t, y), x),
            )
            assert all(torch.equal(a, b) for a, b in zip(ours, traced, strict=True))


def test_trace_names_the_backend(backend: str) -> None:
    graphs = []

    def spy(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch.compile(
        lambda t, y: cross_entropy(t, y, implementation=backend), backend=spy, fullgraph=True
    )(rows(2, 40), labels(2))
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert f"swathe.cross_entropy_fwd.{backend}" in targets


def test_opcheck(backend: str) -> None:
    x, y = rows(3, 40), labels(3)
    resolve_cross_entropy(x, backend)
    forward, backward = (
        getattr(getattr(torch.ops.swathe, f"cross_entropy_{way}"), backend)
        for way in ("fwd", "bwd")
    )
    _, peak, log_sum = forward(x, y, *NUMBERS)
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    torch.library.opcheck(forward, (x, y, *NUMBERS), test_utils=tests)
    for arriving in (torch.ones((), device=DEVICE), rows(3)):
        given = (arriving, x, y, peak, log_sum, *NUMBERS)
        torch.library.opcheck(backward, given, test_utils=tests)


def test_export(backend: str) -> None:
    class Loss(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(x, y, shift_labels=True, implementation=backend)

    rows_ = {0: torch.export.Dim("M", min=3)}
    program = torch.export.export(
        Loss(), (rows(4, 40), labels(4)), dynamic_shapes={"x": rows_, "y": rows_}
    )
    given = rows(9, 40, seed=4), labels(9)
    assert torch.equal(program.module()(*given), Loss()(*given))
