"""Linear cross-entropy as a citizen of torch: autograd, autocast, torch.func, compile, export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from support.tensors import DEVICE, rows
from swathe.kernels.linear_cross_entropy.api import (
    linear_cross_entropy,
    resolve_linear_cross_entropy,
)

OP = "linear_cross_entropy"
NUMBERS = (-100, 0.1, 5.0, 0.5, 1e-3, 2)
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


def head(*shape: int, V: int = 40, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """hidden, weight and bias."""
    given = rows(*shape, 8, dtype=dtype), rows(V, 8, dtype=dtype, seed=1), rows(V, dtype=dtype)
    return [t.requires_grad_() for t in given]


def gradients(function: Any, tensors: list[Tensor]) -> list[Tensor]:
    for t in tensors:
        t.grad = None
    loss = function(*tensors)
    loss.sum().backward()
    found = [t.grad for t in tensors]
    assert all(g is not None for g in found)
    return [loss.detach(), *(g for g in found if g is not None)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def loss_of(backend: str, y: Tensor, **options: Any) -> Any:
    return lambda h, w, b: linear_cross_entropy(
        h, w, y, bias=b, implementation=backend, chunk_rows=2, **options
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_of_the_definition(reduction: Any) -> None:
    tensors = [t.detach().double().requires_grad_() for t in head(3, V=7)]
    function = loss_of("eager", labels(3, V=7), reduction=reduction, **OPTIONS)
    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_and_forward_mode_raise(backend: str, reduction: Any) -> None:
    h, w, b = head(2)
    loss = loss_of(backend, labels(2), reduction=reduction)(h, w, b).sum()
    (dh,) = torch.autograd.grad(loss, h, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"linear_cross_entropy.*first derivatives only"):
        dh.sum().backward()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(
            lambda t: loss_of(backend, labels(2), reduction=reduction)(t, w, b),
            (h.detach(),),
            (h.detach(),),
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_twice_through_one_graph(backend: str, reduction: Any, dtype: torch.dtype) -> None:
    tensors = head(4, dtype=dtype)
    loss = loss_of(backend, labels(4), reduction=reduction)(*tensors).sum() * 3
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    assert equal(list(first), list(torch.autograd.grad(loss, tensors)))


def test_func_transforms(backend: str) -> None:
    h, w, b = (t.detach() for t in head(3, 5))
    y = labels(3, 5)
    for reduction in ("mean", "none"):
        function = loss_of(backend, y, reduction=reduction)
        both = torch.func.grad(lambda t, v, f=function: f(t, v, b).sum(), argnums=(0, 1))(h, w)
        leaves = [t.clone().requires_grad_() for t in (h, w, b)]
        assert equal(list(both), gradients(function, leaves)[1:3])
    each = torch.func.vmap(lambda t, target: loss_of(backend, target, reduction="none")(t, w, b))(
        h, y
    )
    assert torch.equal(each, loss_of(backend, y, reduction="none")(h, w, b))
    with pytest.raises(NotImplementedError, match=r"reduction='none' only"):
        torch.func.vmap(lambda t, target: loss_of(backend, target)(t, w, b))(h, y)
    with pytest.raises(NotImplementedError, match="vmap over weight or bias"):
        torch.func.vmap(lambda v: loss_of(backend, y, reduction="none")(h, v, b))(w[None])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_checkpointing_is_bitwise(backend: str, reentrant: bool, reduction: Any) -> None:
    block = loss_of(backend, labels(6), reduction=reduction)
    tensors = head(6, dtype=torch.bfloat16)
    plain = gradients(block, tensors)
    assert equal(
        plain, gradients(lambda *t: checkpoint(block, *t, use_reentrant=reentrant), tensors)
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_saved_tensors_go_through_hooks(backend: str, reduction: Any) -> None:
    tensors, packed = head(4), []

    def pack(t: Tensor) -> Tensor:
        packed.append(tuple(t.shape))
        return t.clone()

    block = loss_of(backend, labels(4), reduction=reduction)
    plain = gradients(block, tensors)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hooked = gradients(block, tensors)
    assert equal(plain, hooked) and (4, 40) not in packed


def test_autocast_is_that_of_torchs_linear(backend: str) -> None:
    h, w, b = head(4)
    y = labels(4)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = gradients(loss_of(backend, y), [h, w, b])
        mixed = gradients(loss_of(backend, y), [h.detach().bfloat16().requires_grad_(), w, b])
    narrow = [t.detach().bfloat16().requires_grad_() for t in (h, w, b)]
    cast = gradients(loss_of(backend, y), narrow)
    assert equal([t.float() for t in ours], [t.float() for t in cast])
    assert ours[1].dtype == torch.float32 and mixed[1].dtype == torch.bfloat16


def test_functional_call(backend: str) -> None:
    class Head(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return loss_of(backend, labels(4))(input, self.weight, self.bias)

    module, x = Head(8, 40).to(DEVICE), rows(4, 8)
    other = {k: v.detach() * 2 for k, v in module.named_parameters()}
    assert torch.func.functional_call(module, other, (x,)) != module(x)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_to_one_graph_and_the_same_bits(backend: str, reduction: Any) -> None:
    def layer(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return loss_of(backend, y, reduction=reduction, **OPTIONS)(h, w, b)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for M in (4, 7, 9):
            tensors, y = head(M), labels(M)
            torch._dynamo.mark_dynamic(tensors[0], 0)
            torch._dynamo.mark_dynamic(y, 0)
            ours = gradients(lambda *t, y=y: layer(*t, y), tensors)
            assert equal(ours, gradients(lambda *t, y=y: compiled(*t, y), tensors))


def test_trace_names_the_backend(backend: str) -> None:
    graphs = []

    def spy(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    tensors = [t.detach() for t in head(2)]
    torch.compile(loss_of(backend, labels(2)), backend=spy, fullgraph=True)(*tensors)
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert f"swathe.linear_cross_entropy_rows_fwd.{backend}" in targets


def test_opcheck(backend: str) -> None:
    h, w, b = (t.detach() for t in head(3))
    y = labels(3)
    resolve_linear_cross_entropy(h, w, backend)
    ops = {
        name: getattr(getattr(torch.ops.swathe, f"linear_cross_entropy_{name}"), backend)
        for name in ("fwd", "bwd", "rows_fwd", "rows_bwd")
    }
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    _, peak, log_sum = ops["rows_fwd"](h, w, b, y, *NUMBERS)
    for needs in ([True, True, True], [True, False, False]):
        _, *found = ops["fwd"](h, w, b, y, *NUMBERS, needs)
        for name, given in (
            ("fwd", (h, w, b, y, *NUMBERS, needs)),
            ("bwd", (torch.ones((), device=DEVICE), *found, h, w, b)),
            ("rows_fwd", (h, w, None, y, *NUMBERS)),
            ("rows_bwd", (rows(3), h, w, b, y, peak, log_sum, *NUMBERS, needs)),
        ):
            torch.library.opcheck(ops[name], given, test_utils=tests)


def test_export(backend: str) -> None:
    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(rows(40, 8))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            options: dict[str, Any] = {"shift_labels": True, "implementation": backend}
            return linear_cross_entropy(x, self.weight, y, **options)

    module, dim = Loss(), {0: torch.export.Dim("M", min=3)}
    program = torch.export.export(
        module, (rows(4, 8), labels(4)), dynamic_shapes={"x": dim, "y": dim}
    )
    given = rows(9, 8, seed=4), labels(9)
    assert torch.equal(program.module()(*given), module(*given))
