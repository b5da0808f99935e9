"""A kernel launcher as a registered torch operator, used only where a graph is being built.

Eager mode calls the launcher directly: going through the dispatcher costs 7 to 30 us a call.
Under torch.compile, export, fake tensors or any dispatch mode the same launcher is one operator
`swathe::<name>.<backend>`, so a trace says which backend ran. Registered with define + impl +
register_fake, the cheapest of torch's ways and the only one that also compiles where Triton
interprets.
"""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from swathe.kernels.core.cpp import is_noting

_PLAIN = frozenset((Tensor, Parameter, type(None), bool, int, float, str))
_OPERATORS: dict[str, Op] = {}


class Op:
    """One overload of one operator.

    `schema` is torch's, without namespace: "rms_norm_fwd(Tensor x, ...) -> (Tensor, Tensor)".
    `module` holds the launcher under the name `function` and is imported on the first call.
    `fake` makes outputs of the right shape, dtype and strides from the same arguments.
    """

    def __init__(
        self, schema: str, backend: str, module: str, function: str, fake: Callable[..., Any]
    ) -> None:
        name, arguments = schema.split("(", 1)
        full = f"swathe::{name}.{backend}"
        self._module, self._function = module, function
        self._launcher: Callable[..., Any] | None = None
        torch.library.define(full, "(" + arguments)
        torch.library.impl(full, "CompositeExplicitAutograd", self.launch)
        torch.library.register_fake(full, fake)
        self._handle = getattr(getattr(torch.ops.swathe, name), backend)
        _OPERATORS[f"{name}.{backend}"] = self

    def launch(self, *args: Any) -> Any:
        """Run the kernel on real tensors."""
        launcher = self._launcher
        if launcher is None:
            launcher = self._launcher = getattr(import_module(self._module), self._function)
        return launcher(*args)

    def __call__(self, *args: Any) -> Any:
        if _traced(args):
            return self._handle(*args)
        return self.launch(*args) if self._launcher is None else self._launcher(*args)


def operator(name: str) -> Op:
    """The operator "rms_norm_fwd.triton"; graphs can hold its name, but not the object."""
    return _OPERATORS[name]


def apply(node: type[torch.autograd.Function], *args: Any) -> Any:
    """node.apply(*args), for a node with `setup_context`, without what only torch.func needs.

    torch binds the arguments of such a node through inspect.signature: 18 us a call.
    """
    if transformed() or torch.compiler.is_compiling():
        return node.apply(*args)
    return _direct(node).apply(*args)


@cache
def _direct(node: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = node.forward(*args)
            node.setup_context(ctx, args, output)
            return output

        backward = staticmethod(node.backward)

    Direct.__name__ = Direct.__qualname__ = node.__name__  # what grad_fn shows
    return Direct


def gradient(name: str, *args: Any) -> Any:
    """Run operator `name` inside a backward, so that a second derivative raises.

    torch's once_differentiable would let it pass where the incoming gradient carries none itself.
    """
    if torch.is_grad_enabled() or transformed():
        return apply(_FirstDerivative, name, *args)
    return _OPERATORS[name](*args)


class _FirstDerivative(torch.autograd.Function):
    @staticmethod
    def forward(name: str, *args: Any) -> Any:
        found = _OPERATORS[name](*args)
        # autograd sees the tensors of a tuple, and none of those in a list
        return tuple(found) if isinstance(found, list) else found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], name: str, *args: Any) -> Any:
        # gradients of each sample, as torch.func.vmap(torch.func.grad(...)) asks for them
        found = []
        for index in range(info.batch_size):
            pairs = zip(args, in_dims[1:], strict=True)
            own = [
                a.select(dim, index).contiguous() if isinstance(dim, int) else a for a, dim in pairs
            ]
            one = _FirstDerivative.apply(name, *own)
            found.append(one if isinstance(one, tuple) else (one,))
        stacked = tuple(torch.stack(parts) for parts in zip(*found, strict=True))
        return (stacked, (0,) * len(stacked)) if isinstance(one, tuple) else (stacked[0], 0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        op, _, backend = ctx.name.partition(".")
        raise NotImplementedError(
            f"{op.removesuffix('_bwd')}: backend {backend!r} provides first derivatives only; use "
            "implementation='eager' to differentiate twice"
        )


def _traced(args: tuple[Any, ...]) -> bool:
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    found = False
    for a in args:
        if type(a) not in _PLAIN and isinstance(a, Tensor):
            _refuse_sharded(a)
            found = True
    return found


def plain(args: tuple[Any, ...]) -> bool:
    """Whether a kernel may read these tensors: nothing traces, and none is of a subclass."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() and not is_noting():
        return False
    return all(type(a) in _PLAIN for a in args)


def _refuse_sharded(t: Tensor) -> None:
    if type(t).__name__ == "DTensor":
        raise TypeError(
            "a fused backend was given a DTensor; allowed are plain tensors. Pass the local shard "
            "(x.to_local()) where the op works on each shard alone, as rows of tokens do, or use "
            "implementation='eager', which follows torch's own sharding rules"
        )


def transformed() -> bool:
    """Whether torch.func or forward-mode AD is active: both must see an autograd node."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def differentiating(*tensors: Tensor | None) -> bool:
    """Whether a call on these inputs needs an autograd node."""
    return transformed() or wants_gradient(*tensors)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call on these inputs."""
    if torch.is_grad_enabled():
        for t in tensors:  # a loop: any() would make a generator at every call
            if t is not None and t.requires_grad:
                return True
    return False


def any_batched(in_dims: Any) -> bool:
    """Whether vmap runs over any of these arguments, of which some may be tuples or lists."""
    if isinstance(in_dims, tuple | list):
        return any(any_batched(dim) for dim in in_dims)
    return in_dims is not None
