"""What torch expects of any differentiable function, asked of one problem of an op.

    make(M)      the op's problem with M rows (or tokens); problems of one op differ in M alone
    contract     the op's
Every check runs on every fused backend of the op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from swathe.kernels.core.contract import Contract, Outputs, Problem

Make = Callable[[int], Problem]
Function = Callable[..., Any]


def same(a: Outputs, b: Outputs) -> None:
    """Bitwise equality of every output and gradient."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def leaves_of(problem: Problem) -> dict[str, Tensor]:
    """Fresh leaves that require a gradient."""
    return {k: t.detach().clone().requires_grad_() for k, t in problem.inputs.items()}


def first_of(found: Any) -> Tensor:
    """The first output."""
    return found[0] if isinstance(found, tuple) else found


def second_derivatives_and_forward_mode_raise(function: Function, problem: Problem) -> None:
    leaves = leaves_of(problem)
    name, x = next(iter(leaves.items()))
    y = first_of(function(**leaves, **problem.options))
    (dx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        dx.float().square().sum().backward()
    rest = {k: t.detach() for k, t in leaves.items() if k != name}

    def of_one(t: Tensor) -> Tensor:
        return first_of(function(**{name: t}, **rest, **problem.options))

    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(of_one, (x.detach(),), (x.detach(),))


def backward_twice_is_the_same(function: Function, problem: Problem) -> None:
    leaves = leaves_of(problem)
    found = function(**leaves, **problem.options)
    values = found if isinstance(found, tuple) else (found,)
    arriving = tuple(problem.arriving.values())
    wanted = tuple(leaves.values())
    once = torch.autograd.grad(values, wanted, arriving, retain_graph=True)
    kept = [g.clone() for g in once]
    again = torch.autograd.grad(values, wanted, arriving)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert all(torch.equal(t, leaves[k]) for k, t in problem.inputs.items())


def each_output_alone(contract: Contract, backend: str, problem: Problem) -> None:
    """The gradient of one output is what both give where the other receives zeros.

    Where eager mode leaves no gradient there is none: an optimiser would take zeros for one.
    """

    def alone(function: Function, name: str) -> tuple[Tensor | None, ...]:
        leaves = leaves_of(problem)
        found = function(**leaves, **problem.options)
        values = found if isinstance(found, tuple) else (found,)
        one, arriving = dict(zip(problem.arriving, values, strict=True)), problem.arriving[name]
        return torch.autograd.grad(one[name], tuple(leaves.values()), arriving, allow_unused=True)

    for name in problem.arriving:
        silent = {k: v if k == name else torch.zeros_like(v) for k, v in problem.arriving.items()}
        both = Problem(problem.inputs, silent, problem.options).run(contract.on(backend))
        ours, eager = alone(contract.on(backend), name), alone(contract.on("eager"), name)
        for leaf, gradient, theirs in zip(problem.inputs, ours, eager, strict=True):
            assert (gradient is None) == (theirs is None), (name, leaf)
            if gradient is None:
                assert not both[f"d{leaf}"].any(), (name, leaf)
            else:
                torch.testing.assert_close(gradient, both[f"d{leaf}"])


def checkpointing_is_bitwise(function: Function, problem: Problem) -> None:
    def recomputed(**given: Any) -> Any:
        names = list(problem.inputs)

        def body(*tensors: Tensor) -> Any:
            return function(**dict(zip(names, tensors, strict=True)), **problem.options)

        return checkpoint(body, *(given[name] for name in names), use_reentrant=False)

    same(problem.run(function), problem.run(recomputed))


def saved_tensors_can_be_packed(function: Function, problem: Problem) -> None:
    plain = problem.run(function)
    packed: list[Tensor] = []

    def pack(t: Tensor) -> int:
        packed.append(t.detach().clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: packed[index]):
        same(plain, problem.run(function))
    assert packed


def func_transforms(function: Function, problem: Problem) -> None:
    name = next(iter(problem.inputs))
    rest = {k: t.detach() for k, t in problem.inputs.items() if k != name}
    x = problem.inputs[name].detach()

    def of_one(t: Tensor) -> Tensor:
        return first_of(function(**{name: t}, **rest, **problem.options))

    gradient = torch.func.grad(lambda t: of_one(t).float().square().sum())(x)
    leaf = x.clone().requires_grad_()
    of_one(leaf).float().square().sum().backward()
    assert torch.equal(gradient, leaf.grad)
    batch = torch.stack((x, 2 * x, -x))
    batched = torch.func.vmap(of_one)(batch)
    assert torch.equal(batched, torch.stack([of_one(t) for t in batch]))
    each = torch.func.grad(lambda t: of_one(t).float().square().sum())
    assert torch.equal(torch.func.vmap(each)(batch), torch.stack([each(t) for t in batch]))


def compiles_to_one_graph(contract: Contract, backend: str, make: Make) -> None:
    """Bitwise what eager mode gives; one more graph for all sizes, not one for each."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(contract.on(backend), fullgraph=True, backend=counting)
    for M in (3, 5, 7, 9):
        problem = make(M)
        same(problem.run(contract.on(backend)), problem.run(compiled))
    assert len(graphs) <= 2, "recompiled for every size"
    torch._dynamo.reset()
    graphs.clear()
    dynamic = torch.compile(contract.on(backend), fullgraph=True, dynamic=True, backend=counting)
    counts = []
    for M in (5, 11):  # equal to no other size, which torch would take for the same
        problem = make(M)
        same(problem.run(contract.on(backend)), problem.run(dynamic))
        counts.append(len(graphs))
    assert counts[0] == counts[1], "recompiled though told that sizes vary"
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    inner = [t for t in targets if t.startswith("swathe.")]
    assert all(t.endswith(f".{backend}") for t in inner)


def opchecks(name: str, backend: str, *arguments: Any) -> None:
    """torch's own checks of schema, fake and dispatch of one registered operator."""
    overload = getattr(getattr(torch.ops.swathe, name), backend)
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    torch.library.opcheck(overload, arguments, test_utils=tests)


def exports(function: Function, make: Make) -> None:
    """torch.export of a module around the op; one program serves every number of rows."""
    problem, other = make(4), make(7)

    class Module(torch.nn.Module):
        def forward(self, tensors: dict[str, Tensor]) -> Tensor:
            return first_of(function(**{**problem.options, **tensors}))

    given, others = tensors_of(problem), tensors_of(other)
    varying = {
        name: {
            dim: torch.export.Dim.DYNAMIC
            for dim, sizes in enumerate(zip(t.shape, others[name].shape, strict=True))
            if len(set(sizes)) == 2
        }
        for name, t in given.items()
    }
    program = torch.export.export(Module(), (given,), dynamic_shapes=(varying,))
    for M in (4, 7, 9):
        tensors = tensors_of(make(M))
        assert torch.equal(program.module()(tensors), Module()(tensors))


def tensors_of(problem: Problem) -> dict[str, Tensor]:
    """Every tensor that the call takes."""
    options = {k: v for k, v in problem.options.items() if isinstance(v, Tensor)}
    return {**problem.inputs, **options}


def functional_call_takes_what_it_is_given(function: Function, problem: Problem) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            zeros = {k: torch.zeros_like(t) for k, t in problem.inputs.items()}
            self.held = torch.nn.ParameterDict(zeros)

        def forward(self) -> Any:
            return function(**self.held, **problem.options)

    layer = Layer()

    def called(**given: Any) -> Any:
        names = {f"held.{k}": given[k] for k in problem.inputs}
        return torch.func.functional_call(layer, names, ())

    same(problem.run(function), problem.run(called))


def all_of_torch(contract: Contract, backend: str, make: Make) -> None:
    """Every check that needs nothing but problems."""
    function, problem = contract.on(backend), make(4)
    second_derivatives_and_forward_mode_raise(function, problem)
    backward_twice_is_the_same(function, problem)
    each_output_alone(contract, backend, problem)
    checkpointing_is_bitwise(function, problem)
    saved_tensors_can_be_packed(function, problem)
    func_transforms(function, problem)
    functional_call_takes_what_it_is_given(function, problem)
    exports(function, make)
    compiles_to_one_graph(contract, backend, make)
