"""What keeps a module from being patched, whatever it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from swathe.kernels.core.errors import BackendUnavailable, UnsupportedFeature
from swathe.kernels.core.registry import AUTO, Choice, registered
from swathe.modeling.hf.patching.report import Candidate
from swathe.modeling.hf.patching.swaps import fused_ops, is_fused, why_not_swapped

_PLAIN = (Tensor, nn.Parameter)


def why_left(module: nn.Module, tensors: Iterable[Tensor]) -> str | None:
    """Why a module with these parameters is left alone, None if nothing speaks against it."""
    if is_fused(type(module)):
        return "is patched already"
    if is_parametrized(module):
        return "its weights are parametrized"
    reason = why_not_swapped(module)
    if reason is not None:
        return reason
    for t in tensors:
        if t.is_meta:
            return "its weights are on the meta device: load them first"
        if type(t) not in _PLAIN:
            return f"its weights are {type(t).__name__}s, which the kernels do not read"
        if not t.is_floating_point():
            return f"its weights are {_short(t.dtype)}"
    return None


def already(path: str, module: nn.Module, *ops: str) -> Candidate | None:
    """The candidate for a module that runs one of these ops by an earlier patch."""
    found = next((op for op in ops if op in fused_ops(type(module))), None)
    return None if found is None else Candidate(path, module, found, reason="is patched already")


def sample_of(model: nn.Module) -> Tensor:
    """A tensor of the device and dtype that the model computes in, as far as it has one."""
    tensors = (*model.parameters(), *model.buffers())
    return next((t for t in tensors if t.is_floating_point()), torch.empty(0))


def chosen(resolve: Callable[[str], Choice], op: str, backend: str) -> tuple[str, str | None]:
    """(the backend that is to serve, None), or ("", why none does).

    "auto" has to find a fused one: a module gains nothing from plain PyTorch.
    """
    if backend != AUTO and backend not in registered(op):
        return "", f"{op} has no backend {backend!r}"
    try:
        choice = resolve(backend)
    except (BackendUnavailable, UnsupportedFeature) as error:
        return "", str(error)
    if backend == AUTO and choice.backend == "eager":
        passed = [f"{name} {', '.join(why)}" for name, why in choice.skipped.items()]
        return "", f"no fused backend serves it: {'; '.join(passed or _untried(op))}"
    return choice.backend, None


def _untried(op: str) -> list[str]:
    """Where the fused backends are used that "auto" does not even try on this device."""
    found = [
        f"{name} runs on {' and '.join(sorted(backend.capabilities.devices))}"
        for name, backend in registered(op).items()
        if name != "eager"
    ]
    return found or [f"{op} has none"]


def plain(*tensors: Tensor | None) -> bool:
    """Whether a kernel may read these as they are: no DTensor, no other subclass."""
    return all(t is None or type(t) in _PLAIN for t in tensors)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
