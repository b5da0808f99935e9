"""qk_norm_rotary as a citizen of torch: autograd, torch.func, autocast, checkpoints, compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from support.tensors import DEVICE, DTYPES, rows
from swathe.kernels.qk_norm_rotary import eager
from swathe.kernels.qk_norm_rotary.api import qk_norm_rotary, resolve_qk_norm_rotary

OP = "qk_norm_rotary"
S, D = 5, 16
ANGLES = 6.0 * rows(S, D, seed=9)
COS, SIN = ANGLES.cos(), ANGLES.sin()
Function = Callable[..., tuple[Tensor, Tensor]]


def operands(dtype: torch.dtype = torch.float32, B: int = 2, H: int = 3) -> tuple[Tensor, ...]:
    """q, k and their weights, ready to be differentiated; q and k as projections leave them."""
    q, k = (rows(B, S, n, D, dtype=dtype, seed=n).transpose(1, 2) for n in (H, 2))
    w, v = (rows(D, dtype=dtype, seed=n) for n in (11, 12))
    return tuple(t.detach().requires_grad_() for t in (q, k, w, v))


def on(backend: str, **options: Any) -> Function:
    """The op on one backend, as a function of q, k and the weights."""

    def call(q: Tensor, k: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return qk_norm_rotary(q, k, w, v, 1e-6, COS, SIN, implementation=backend, **options)

    return call


def loss(found: tuple[Tensor, ...]) -> Tensor:
    return sum((y.float() * rows(*y.shape, seed=5)).sum() for y in found)  # type: ignore[return-value]


def same(some: Any, others: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_gradcheck_of_the_definition() -> None:
    double = [t.detach().double().requires_grad_() for t in operands(B=1, H=1)]
    tables = [t.double().requires_grad_() for t in (COS, SIN)]
    for casting in ("fp32", "llama"):
        for interleaved in (False, True):

            def definition(*t: Tensor, c: str = casting, i: bool = interleaved) -> Any:
                norm = (1e-6, 0.5, "llama", c)
                return eager.qk_norm_rotary(*t[:4], *norm, t[4], t[5], None, None, D, i)

            assert torch.autograd.gradcheck(definition, (*double, *tables))


def test_double_runs_on_eager() -> None:
    q, k, w, v = (t.double() for t in operands())
    assert qk_norm_rotary(q, k, w, v, 1e-6, COS, SIN)[0].dtype == torch.float64


@pytest.mark.parametrize("used", [0, 1])
def test_only_part_of_the_outputs_used(backend: str, used: int) -> None:
    inputs = operands()
    found = on(backend)(*inputs)
    loss((found[used],)).backward()
    expected = operands()
    loss((on("eager")(*expected)[used],)).backward()
    for ours, theirs in zip(inputs, expected, strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_only_part_of_the_inputs_differentiated(backend: str) -> None:
    everything = operands()
    loss(on(backend)(*everything)).backward()
    for index in range(4):
        inputs = [t.detach() for t in operands()]
        inputs[index].requires_grad_()
        loss(on(backend)(*inputs)).backward()
        assert torch.equal(inputs[index].grad, everything[index].grad)
        assert all(t.grad is None for i, t in enumerate(inputs) if i != index)


def test_second_derivatives_and_forward_mode_raise(backend: str) -> None:
    q, k, w, v = operands()
    found = loss(on(backend)(q, k, w, v))
    (dq,) = torch.autograd.grad(found, q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"qk_norm_rotary: .*first derivatives only"):
        dq.sum().backward()
    q, k, w, v = (t.detach() for t in (q, k, w, v))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda t: on(backend)(t, k, w, v), (q,), (q,))


def test_func_transforms(backend: str) -> None:
    q, k, w, v = (t.detach() for t in operands())
    many = rows(4, *q.shape, seed=3)
    call = on(backend)
    for dim in (0, 2):
        moved = many.movedim(0, dim)
        batched_q, batched_k = torch.func.vmap(call, (dim, None, None, None), (0, None))(
            moved, k, w, v
        )
        assert torch.equal(batched_k, call(q, k, w, v)[1])
        for one, found in zip(many, batched_q, strict=True):
            assert torch.equal(found, call(one, k, w, v)[0])
    gradients = torch.func.grad(lambda *t: loss(call(*t)), (0, 2))(q, k, w, v)
    inputs = operands()
    loss(call(*inputs)).backward()
    assert same(gradients, (inputs[0].grad, inputs[2].grad))
    with pytest.raises(NotImplementedError, match="implementation='eager'"):
        torch.func.vmap(lambda weight: call(q, k, weight, v))(rows(4, D))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_bitwise(backend: str, reentrant: bool) -> None:
    grads = []
    for wrap in (False, True):
        inputs = operands(torch.bfloat16)
        call = on(backend)
        found = checkpoint(call, *inputs, use_reentrant=reentrant) if wrap else call(*inputs)
        loss(found).backward()
        grads.append([t.grad for t in inputs])
    assert same(*grads)


def test_a_graph_may_be_walked_twice_and_its_tensors_moved(backend: str) -> None:
    inputs = operands()
    moved = []

    def pack(t: Tensor) -> Tensor:
        moved.append(t)
        return t.clone()

    with saved_tensors_hooks(pack, lambda t: t):
        found = loss(on(backend)(*inputs))
    first = torch.autograd.grad(found, inputs, retain_graph=True)
    again = torch.autograd.grad(found, inputs)
    assert same(first, again) and len(moved) >= 6
    plain = torch.autograd.grad(loss(on(backend)(*inputs)), inputs)
    assert same(first, plain)


class Layer(torch.nn.Module):
    def __init__(self, backend: str, casting: str = "fp32") -> None:
        super().__init__()
        self.q = torch.nn.Parameter(rows(D, seed=11))
        self.k = torch.nn.Parameter(rows(D, seed=12))
        self.call = on(backend, casting=casting)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.call(q, k, self.q, self.k)


def test_functional_call(backend: str) -> None:
    q, k, w, v = operands()
    found = torch.func.functional_call(Layer(backend), {"q": w * 2, "k": v}, (q, k))
    assert same(found, on(backend)(q, k, w * 2, v))


@pytest.mark.parametrize("casting", ["fp32", "llama"])
def test_autocast_changes_nothing_that_eager_does_not(backend: str, casting: str) -> None:
    for dtype in DTYPES[:2]:
        q, k, w, v = operands(dtype)
        with torch.autocast(DEVICE, torch.bfloat16):
            ours = on(backend, casting=casting)(q, k, w.float(), v.float())
            theirs = on("eager", casting=casting)(q, k, w.float(), v.float())
        for mine, definition in zip(ours, theirs, strict=True):
            assert mine.dtype == definition.dtype
            torch.testing.assert_close(mine, definition)


def test_compiles_to_one_graph_for_all_sizes(backend: str) -> None:
    graphs = []

    def counted(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, examples)

    def layer(q: Tensor, k: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        a, b = on(backend)(q * 1.5, k, w, v)
        return a + 1, b

    compiled = torch.compile(layer, fullgraph=True, backend=counted)
    for B in (2, 3, 5, 7):
        results = []
        for function in (layer, compiled):
            inputs = operands(B=B)
            found = function(*inputs)
            results.append((*found, *torch.autograd.grad(loss(found), inputs)))
        assert same(*results)
    assert len(graphs) <= 2


def test_trace_names_the_backend(backend: str) -> None:
    graphs = []

    def spy(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    inputs = tuple(t.detach() for t in operands())
    torch.compile(on(backend), backend=spy, fullgraph=True)(*inputs)
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert f"swathe.qk_norm_rotary_fwd.{backend}" in targets


def test_opcheck(backend: str) -> None:
    q, k, w, v = (t.detach() for t in operands())
    resolve_qk_norm_rotary(q, w, COS, backend)
    positions = torch.tensor([0, 1, 2, 0, 1], device=DEVICE)
    forward = getattr(torch.ops.swathe.qk_norm_rotary_fwd, backend)
    backward = getattr(torch.ops.swathe.qk_norm_rotary_bwd, backend)
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    compact = COS[:, : D // 2].contiguous()
    for rotation in (
        (COS, SIN, None, None, D, False),
        (compact, compact, positions, None, D, True),
        (COS.expand(3, 1, S, D), SIN.expand(3, 1, S, D), None, [4, 2, 2], D, False),
    ):
        norm = (1e-6, 0.0)
        for keys, weights in (((k,), (v,)), ((None,), (None,))):
            given = (q, *keys, w, *weights, *norm)
            torch.library.opcheck(forward, (*given, "llama", "fp32", *rotation), test_utils=tests)
            arriving = (q * 2, None if keys[0] is None else k * 3)
            torch.library.opcheck(backward, (*arriving, *given, *rotation), test_utils=tests)


def test_export(backend: str) -> None:
    q, k, _, _ = (t.detach() for t in operands())
    batch = torch.export.Dim("B")
    module = Layer(backend)
    program = torch.export.export(module, (q, k), dynamic_shapes={"q": {0: batch}, "k": {0: batch}})
    q, k, _, _ = (t.detach() for t in operands(B=7))
    assert same(program.module()(q, k), module(q, k))
