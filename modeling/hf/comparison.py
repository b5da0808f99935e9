"""Three runs side by side: a model's, its reference's, and the yardstick's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swathe.kernels.core.testing import UNIT
from swathe.modeling.hf.runs import Run
from swathe.modeling.hf.verification import Check

# Two ways to round one computation differ by chance, and the error of n elements is known to
# 1 / sqrt(n), as in patching/prove.py. Over 185 tiny models with every kernel patched, in fp32,
# three ratios were above 4, all of parameters with 1 to 4 elements: 4.1, 5.2 and 14.5.
LIMIT, _SIGMAS = 4.0, 4.0
_NOT_FINITE = "has NaN or infinity where the reference has none"


@dataclass
class Measured:
    """The runs, and which tokens are real (B, T), None for all."""

    ours: Run
    theirs: Run
    gold: Run
    real: Tensor | None

    def by_token(self, name: str) -> bool:
        """Whether the output has a row for each token."""
        x = self.gold.outputs.get(name)
        return x is not None and self.real is not None and x.shape[:2] == self.real.shape

    def rows(self, name: str, x: Tensor) -> Tensor:
        """The part of an output that belongs to real tokens."""
        return x[self.real] if self.real is not None and self.by_token(name) else x

    def size(self, name: str, x: Tensor) -> float:
        """rms of `x` on real tokens, in units of that of the yardstick's output `name`."""
        return _rms(self.rows(name, x)) / (_rms(self.rows(name, self.gold.outputs[name])) or 1.0)

    def own_error(self, name: str) -> float:
        """What the reference's own rounding costs on an output; at least one rounding."""
        theirs, gold = self.theirs.outputs[name], self.gold.outputs[name]
        return max(self.size(name, theirs.double() - gold), _unit(theirs))


def compare_values(measured: Measured) -> list[Check]:
    """Every output in evaluation, and the loss."""
    ours, theirs = measured.ours.outputs, measured.theirs.outputs
    checks = [_output(name, measured) for name in theirs]
    checks += [
        Check("output", name, failure="the reference has none")
        for name in ours
        if name not in theirs
    ]
    return [*checks, _loss(measured)]


def _output(name: str, measured: Measured) -> Check:
    x, reference = measured.ours.outputs.get(name), measured.theirs.outputs[name]
    if x is None:
        return Check("output", name, failure="is missing, the reference has it")
    if (x.dtype, x.shape) != (reference.dtype, reference.shape):
        return Check("output", name, failure=f"is {_kind(x)}, the reference's {_kind(reference)}")
    if name not in measured.gold.outputs:
        return Check("output", name)
    x, reference, gold = (
        measured.rows(name, t) for t in (x, reference, measured.gold.outputs[name])
    )
    return _measured("output", name, x, reference, gold, _unit(x))


def _loss(measured: Measured) -> Check:
    ours, theirs, gold = (run.loss for run in (measured.ours, measured.theirs, measured.gold))
    assert ours is not None and theirs is not None and gold is not None
    if ours.dtype != theirs.dtype:
        return Check("loss", "loss", failure=f"is {_kind(ours)}, the reference's {_kind(theirs)}")
    # one number may be right by luck: it is held to its last two bits (logsumexp, difference and
    # mean round in turn), or to what the logits' own errors may do to it
    floor = 4 * _unit(theirs)
    logits = measured.gold.outputs.get("logits")
    if logits is not None and gold.abs() > 0:
        size = _rms(measured.rows("logits", logits))
        floor = max(floor, measured.own_error("logits") * size / gold.abs().item())
    return _measured("loss", "loss", ours, theirs, gold, floor)


def compare_gradients(measured: Measured, model: nn.Module) -> list[Check]:
    """The gradient of every parameter that requires one."""
    golds = [g for g in measured.gold.gradients.values() if g is not None]
    count = sum(g.numel() for g in golds)
    # rounding of the largest gradients shows up in those that are zero but for rounding
    typical = (sum(g.square().sum().item() for g in golds) / count) ** 0.5 if count else 0.0
    return [_gradient(name, measured, typical) for name in measured.theirs.gradients]


def _gradient(name: str, measured: Measured, typical: float) -> Check:
    ours, theirs, gold = (
        run.gradients.get(name) for run in (measured.ours, measured.theirs, measured.gold)
    )
    like = theirs if theirs is not None else ours
    if like is None:
        return Check("gradient", name)
    noise = _unit(like) * typical
    has, should = (g is not None and bool((g != 0).any()) for g in (ours, theirs))
    if should and not has and not _is_noise(theirs, gold):
        owner = name.rpartition(".")[0] or "the model"
        return Check("gradient", name, failure=f"vanished: {_bypassed(owner)}")
    if has and not should and ours is not None and not _rms(ours) <= noise:
        return Check("gradient", name, failure="appeared, the reference has none")
    if ours is None or theirs is None or gold is None:
        return Check("gradient", name)
    floor = _unit(like)
    if _is_noise(theirs, gold):
        floor = max(floor, noise / (_rms(gold) or noise or 1.0))
    return _measured("gradient", name, ours, theirs, gold, floor)


def _is_noise(theirs: Tensor | None, gold: Tensor | None) -> bool:
    """Whether rounding is most of the gradient: in exact arithmetic it may well be zero."""
    if theirs is None or gold is None:
        return False
    return _rms(theirs - gold) > 0.5 * _rms(gold)


def _bypassed(owner: str) -> str:
    adapter = any(word in owner for word in ("lora_", "adapter", "modules_to_save"))
    kind = "the adapter" if adapter else "its module"
    return f"{kind} {owner!r} is bypassed, or what it computes no longer reaches the loss"


def _measured(
    kind: str, name: str, ours: Tensor, theirs: Tensor, gold: Tensor, floor: float
) -> Check:
    finite = theirs.isfinite() & gold.isfinite()
    if bool((finite & ~ours.isfinite()).any()):
        return Check(kind, name, failure=_NOT_FINITE)
    ours, theirs, gold = (torch.where(finite, t.double(), 0.0) for t in (ours, theirs, gold))
    size = _rms(gold) or 1.0
    error, own = _rms(ours - gold) / size, max(_rms(theirs - gold) / size, floor)
    failure = None
    allowed = LIMIT * (1 + _SIGMAS / max(gold.numel(), 1) ** 0.5)
    if error > allowed * own:
        failure = f"is {error / own:.3g} times as far off as the reference, allowed {allowed:.3g}"
    return Check(kind, name, error, own, failure)


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def _unit(x: Tensor) -> float:
    return UNIT.get(x.dtype, 2.0**-53)


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
