"""A kernel launcher as a registered torch operator, used only where a graph is being built.

Eager mode calls the launcher directly: going through the dispatcher costs 7 to 30 us a call.
Under torch.compile, export, fake tensors or any dispatch mode the same launcher is one operator
`swathe::<name>.<backend>`, so a trace says which backend ran. Registered with define + impl +
register_fake, the cheapest of torch's ways and the only one that also compiles where Triton
interprets.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_PLAIN = (Tensor, Parameter)


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

    def launch(self, *args: Any) -> Any:
        """Run the kernel on real tensors."""
        if self._launcher is None:
            self._launcher = getattr(import_module(self._module), self._function)
        return self._launcher(*args)

    def __call__(self, *args: Any) -> Any:
        return self._handle(*args) if _traced(args) else self.launch(*args)


def _traced(args: tuple[Any, ...]) -> bool:
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return any(isinstance(a, Tensor) and type(a) not in _PLAIN for a in args)


def transformed() -> bool:
    """Whether torch.func or forward-mode AD is active: both must see an autograd node."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
