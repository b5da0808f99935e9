"""A fused forward beside the module's own, on random input, with both measured against fp64.

    gold    the module's own forward in fp64, its casts to fp32 and below made casts to fp64
    own     the module's own forward in its dtype
    error   rms(ours - gold) / rms(own - gold), for each output and gradient, pooled over calls

Neither the module nor its parameters are touched: all three run on copies whose parameters are
drawn at random, since the ones and zeros of a new model would hide a missing weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.overrides import TorchFunctionMode

from swathe.kernels.core.testing import BOUNDS, FP32_EAGER
from swathe.modeling.hf.patching.report import Proof

# the sampling error of a ratio of two rms over n elements is about 1 / sqrt(n); this many of them
_SIGMAS = 4.0
ENOUGH, FEWEST, MOST = 1024, 4, 40


class Call(NamedTuple):
    """Arguments of one forward. Tensors that require a gradient have theirs compared."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}


def prove(
    module: nn.Module, fused: Callable[..., Any], calls: Iterable[Call], *, seed: int = 0
) -> Proof:
    """Compare `fused(module, ...)` with the forward of the module's class; never raises.

    `calls` may be endless: FEWEST are made, and more, up to MOST, until every output and gradient
    has ENOUGH elements. Calls alternate between training and evaluation.
    """
    pools: _Pools = {}
    devices = {p.device for p in module.parameters() if p.device.type != "cpu"}
    try:
        with torch.random.fork_rng(list(devices)), torch.enable_grad():
            own, gold = _twins(module, seed)
            for number, call in enumerate(islice(calls, MOST)):
                _compare(own, gold, fused, call, pools, training=number % 2 == 0)
                if number + 1 >= FEWEST and all(p.count >= ENOUGH for p in pools.values()):
                    break
    except _Differs as found:
        return Proof(inf, found.where, str(found))
    except Exception as error:  # noqa: BLE001  (another's code, run on another's shapes)
        text = str(error).split("\n")[0]
        return Proof(inf, "", f"the comparison raised {type(error).__name__}: {text}")
    return _settle(pools) if pools else Proof(inf, "", "it computes nothing that can be compared")


def _settle(pools: _Pools) -> Proof:
    worst = max(pools.values(), key=lambda pool: pool.error)
    misses = [miss for pool in pools.values() if (miss := pool.miss())]
    return Proof(worst.error, worst.name, "; ".join(misses) or None)


_Pools = dict[tuple[str, torch.dtype], "_Pool"]


class _Differs(Exception):
    def __init__(self, where: str, text: str) -> None:
        super().__init__(f"{where}: {text}")
        self.where = where


@dataclass
class _Pool:
    """Squared errors of one output or gradient, each call's in units of its mean square."""

    name: str
    dtype: torch.dtype
    count: int = 0
    ours: float = 0.0
    own: float = 0.0
    ideal: float = 0.0

    def add(self, ours: Tensor, own: Tensor, gold: Tensor) -> None:
        scale = gold.square().mean().item() or 1.0
        self.count += gold.numel()
        for name, found in (("ours", ours), ("own", own), ("ideal", gold.to(self.dtype))):
            error = (found.double() - gold).square().sum().item() / scale
            setattr(self, name, getattr(self, name) + error)

    @property
    def error(self) -> float:
        if self.own == 0.0:
            return 1.0 if self.ours == 0.0 else inf
        return float((self.ours / self.own) ** 0.5)

    def miss(self) -> str | None:
        slack = 1.0 + _SIGMAS / self.count**0.5
        once = BOUNDS["rounded once"].ideal * self.ideal**0.5
        allowed = max(FP32_EAGER * self.own**0.5, once) * slack
        if self.ours**0.5 <= allowed:
            return None
        return f"{self.name} has {self.error:.3g} times the error of the module's own"


def _compare(
    own: nn.Module,
    gold: nn.Module,
    fused: Callable[..., Any],
    call: Call,
    pools: _Pools,
    *,
    training: bool,
) -> None:
    forward = type(own).forward
    for twin in (own, gold):
        twin.train(training)
    theirs = _run(own, forward, call, None)
    ups = [_noise(t) for _, t in theirs.outputs]
    theirs.differentiate(ups)
    ours = _run(own, fused, call, None)
    if len(ours.outputs) != len(theirs.outputs):
        raise _Differs("output", "ours has another structure")
    for (name, a), (_, b) in zip(ours.outputs, theirs.outputs, strict=True):
        _same_kind(name, a, b)
    ours.differentiate(ups)
    with Widened():
        wide = _run(gold, forward, call, torch.float64)
        wide.differentiate([up.double() for up in ups])
    for (name, a), (_, b), (_, c) in zip(ours.all(), theirs.all(), wide.all(), strict=True):
        if (a is None) != (b is None):
            raise _Differs(name, f"{'ours' if a is None else 'the module'} gives none")
        if a is None or b is None or c is None:
            continue
        if not a.is_floating_point():
            if not torch.equal(a, b):
                raise _Differs(name, "ours has other values")
            continue
        if (b.isfinite() & ~a.isfinite()).any():
            raise _Differs(name, "ours is not finite where the module's is")
        pools.setdefault((name, a.dtype), _Pool(name, a.dtype)).add(a, b, c)


def _same_kind(name: str, a: Tensor, b: Tensor) -> None:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        ours, theirs = (f"{t.dtype} {tuple(t.shape)}" for t in (a, b))
        raise _Differs(name, f"ours is {ours}, the module's {theirs}")


@dataclass
class _Run:
    outputs: list[tuple[str, Tensor]]
    inputs: list[tuple[str, Tensor]]
    gradients: list[Tensor | None]

    def differentiate(self, ups: list[Tensor]) -> None:
        pairs = [(t, up) for (_, t), up in zip(self.outputs, ups, strict=True) if t.requires_grad]
        self.gradients = [None] * len(self.inputs)
        if pairs and self.inputs:
            outputs, seeds = zip(*pairs, strict=True)
            leaves = [t for _, t in self.inputs]
            self.gradients = list(torch.autograd.grad(outputs, leaves, seeds, allow_unused=True))

    def all(self) -> list[tuple[str, Tensor | None]]:
        names = [f"gradient of {name}" for name, _ in self.inputs]
        outputs = [(name, t.detach()) for name, t in self.outputs]
        return [*outputs, *zip(names, self.gradients, strict=True)]


def _run(
    module: nn.Module, forward: Callable[..., Any], call: Call, dtype: torch.dtype | None
) -> _Run:
    inputs: list[tuple[str, Tensor]] = []

    def own(t: Tensor, name: str) -> Tensor:
        made = t.detach()
        if dtype is not None and t.is_floating_point():
            made = made.to(dtype)
        if t.requires_grad:
            made = made.clone().requires_grad_()
            inputs.append((name, made))
        return made

    args = [_mapped(a, own, f"input {i}") for i, a in enumerate(call.args)]
    kwargs = {k: _mapped(a, own, k) for k, a in call.kwargs.items()}
    torch.manual_seed(0)
    output = forward(module, *args, **kwargs)
    inputs += module.named_parameters()
    return _Run(list(_leaves(output, "output")), inputs, [])


def _mapped(value: Any, change: Callable[[Tensor, str], Tensor], name: str) -> Any:
    if isinstance(value, Tensor):
        return change(value, name)
    if isinstance(value, tuple | list):
        return type(value)(_mapped(v, change, f"{name}.{i}") for i, v in enumerate(value))
    return value


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple | list):
        for i, v in enumerate(value):
            yield from _leaves(v, f"{name} {i}")
    elif value is not None:
        raise _Differs(name, f"is a {type(value).__name__}, which is not compared")


def _noise(t: Tensor) -> Tensor:
    return torch.randn(t.shape).to(t.device, t.dtype)


class Widened(TorchFunctionMode):
    """Every cast to a floating type is one to fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        args = tuple(_widest(a) for a in args)
        return func(*args, **{k: _widest(v) for k, v in (kwargs or {}).items()})


def _widest(value: Any) -> Any:
    wide = isinstance(value, torch.dtype) and value.is_floating_point
    return torch.float64 if wide else value


def _twins(module: nn.Module, seed: int) -> tuple[nn.Module, nn.Module]:
    """Two copies with the same random parameters, the second in fp64."""
    generator = Generator().manual_seed(seed)

    def drawn(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            return t.detach().clone()
        values = torch.randn(t.shape, generator=generator)
        values = 1 + values / 2 if t.dim() < 2 else values / t.shape[-1] ** 0.5
        return nn.Parameter(values.to(t.device, t.dtype))

    def wide(t: Tensor) -> Tensor:
        made = t.detach().double() if t.is_floating_point() else t.detach().clone()
        return nn.Parameter(made) if isinstance(t, nn.Parameter) else made

    own = private(module, drawn)
    return own, private(own, wide)


def private(
    module: nn.Module, change: Callable[[Tensor], Tensor], parts: Mapping[str, nn.Module] = {}
) -> nn.Module:
    """A copy with tensors of its own and without hooks; `parts` replace submodules by name.

    `copy.deepcopy` would copy whatever a hook is bound to.
    """
    made = object.__new__(type(module))
    bare = vars(nn.Module())
    kept = {
        name: change(value) if isinstance(value, Tensor) else value
        for name, value in vars(module).items()
        if name not in ("forward", "_old_forward", "_hf_hook")
    }
    vars(made).update({**kept, **bare})
    made.training = module.training
    for name, part in module._modules.items():
        new = parts.get(name, part)
        made._modules[name] = None if new is None else private(new, change)
    for name, p in module._parameters.items():
        made._parameters[name] = None if p is None else nn.Parameter(change(p))
    for name, b in module._buffers.items():
        made._buffers[name] = None if b is None else change(b)
    return made
