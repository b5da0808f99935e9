"""patch, unpatch and patched: a transformers model on swathe's kernels, in place and back.

    report = swathe.patch(model)      print(report) says what was swapped, and why the rest was not
    swathe.unpatch(model)

Finders (FINDERS) say what a model has. Each of their candidates is proven against the module's own
forward; what holds is swapped through one ledger, kept on the model, that undoes it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Unpack

import torch
from torch import nn
from transformers import PreTrainedModel as HFModel

from swathe.kernels.core.errors import did_you_mean
from swathe.kernels.core.registry import AUTO, registered
from swathe.modeling.hf.patching import layers, losses, mlps, norms, qk_norms, rotations
from swathe.modeling.hf.patching.options import Options, PatchOptions
from swathe.modeling.hf.patching.report import Candidate, Proof, Report, Row
from swathe.modeling.hf.patching.swaps import Undo, strip
from swathe.modeling.model import PreTrainedModel

# a form that contains another (a layer its norms) comes after it; the proof of a loss runs what
# stands between body and head, in fp64 too, and so comes before that is patched
FINDERS: tuple[Callable[[nn.Module, Options], list[Candidate]], ...] = (
    losses.find,
    norms.find,
    mlps.find,
    qk_norms.find,
    rotations.find,
    layers.find,
)

logger = logging.getLogger(__name__)

_KEPT = "_swathe_patch"
# a proof holds for every module with the same key, of this model or another
_proofs: dict[Hashable, Proof] = {}


@dataclass
class _Patch:
    undo: Undo
    report: Report


def patch(model: nn.Module, **given: Unpack[PatchOptions]) -> Report:
    """`swathe.patch` of one model; api.py says what is promised."""
    options = Options.of(**given)
    _validate(model, options)
    held = holders(model)
    if held:
        note = "it was patched already and stays as it is; unpatch it to patch it otherwise"
        return replace(vars(held[0])[_KEPT].report, note=note)
    undo = Undo()
    try:
        rows = [_settle(candidate, undo) for find in FINDERS for candidate in find(model, options)]
    except BaseException:
        undo.restore()
        raise
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    report = Report(tuple(sorted(rows, key=lambda row: order.get(row.path, 0))))
    if undo.changes:
        _keep(_keeper(model, undo), undo, report, given)
    return report


def _keep(holder: nn.Module, undo: Undo, report: Report, given: PatchOptions) -> None:
    undo.set(holder, "_apply", _Moving(holder, given))
    vars(holder)[_KEPT] = _Patch(undo, report)


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: every module has its own class and attributes again, by identity.

    A model that is not patched stays as it is. Raises RuntimeError, before anything changes, where
    something else changed a module's class after the patch, as FSDP2 does.
    """
    held = holders(model)
    for holder in held:
        vars(holder)[_KEPT].undo.restore()
        del vars(holder)[_KEPT]
    if held:
        strip(model)  # PEFT copies modules that it saves


@contextmanager
def patched(model: nn.Module, **options: Unpack[PatchOptions]) -> Iterator[Report]:
    """`patch` for a while: `with swathe.patched(model) as report:`; it is undone on the way out.

    A model that was patched before stays patched after.
    """
    before = holders(model)
    report = patch(model, **options)
    try:
        yield report
    finally:
        if not before:
            unpatch(model)


class _Moving:
    """`_apply` of a patched model, which is how torch moves it: to a dtype, to a device.

    A proof holds for neither another dtype nor another device, so the model is patched anew there:
    what is proven already is not proven twice, and what fails its proof gets its own forward back.
    A part that is moved alone, and `load_state_dict(assign=True)`, go unseen.
    """

    def __init__(self, model: nn.Module, given: PatchOptions) -> None:
        self.model, self.given = model, given

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = self.model
        before = _whereabouts(model)
        moved = type(model)._apply(model, *args, **kwargs)
        if _whereabouts(model) != before:
            self._patch_anew()
        return moved

    def _patch_anew(self) -> None:
        model, name = self.model, type(self.model).__name__
        old: Report = vars(model)[_KEPT].report
        try:
            unpatch(model)
        except RuntimeError as error:
            logger.warning("%s was moved, and what it runs is not proven anew: %s", name, error)
            return
        report = patch(model, **self.given)
        if not holders(model):  # it may come back
            _keep(model, Undo(), report, self.given)
        served = {(row.path, row.op) for row in old.patched}
        lost = [row for row in report.left if (row.path, row.op) in served]
        if lost:
            logger.warning(
                "%s was moved after it was patched; %d of its modules run their own forward again, "
                "such as %s: %s",
                name,
                len(lost),
                lost[0].path or "the model",
                lost[0].reason,
            )
        logger.info("%s was moved, and patched anew:\n%s", name, report)


def _whereabouts(model: nn.Module) -> list[tuple[torch.dtype, torch.device]]:
    return [(p.dtype, p.device) for p in model.parameters()]


def _validate(model: object, options: Options) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"patch was given a {type(model).__name__}; it takes a model of transformers, or any "
            "module around or inside one"
        )
    if isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{type(model).__name__} is a model of swathe, which runs its kernels already; choose "
            "them with kernels=... or set_kernels"
        )
    check_backend(options)


def check_backend(options: Options) -> None:
    """Raise ValueError for a backend that no op has."""
    ops = ("rms_norm", "layer_norm", "gated_mlp_act", losses.LAZY, losses.REAL)
    known = {name for op in ops for name in registered(op)} | {AUTO}
    if options.backend not in known:
        raise ValueError(
            f"patch: backend={options.backend!r}{did_you_mean(options.backend, known)}; allowed: "
            f"{sorted(known)}"
        )


def _keeper(model: nn.Module, undo: Undo) -> nn.Module:
    """Where the ledger is kept: on the model inside wrappers such as PEFT's, which may come off."""
    inner = next((part for part in model.modules() if isinstance(part, HFModel)), model)
    parts = {id(part) for part in inner.modules()}
    return inner if all(id(change.target) in parts for change in undo.changes) else model


def holders(model: nn.Module) -> list[nn.Module]:
    """The modules that keep a ledger: the model, or one that it wraps or holds."""
    return [module for module in model.modules() if _KEPT in vars(module)]


def ledger(holder: nn.Module) -> Undo:
    """What `patch` changed on a model that `holders` found."""
    undo: Undo = vars(holder)[_KEPT].undo
    return undo


def _settle(candidate: Candidate, undo: Undo) -> Row:
    reason, error = candidate.reason, None
    if reason is None:
        assert candidate.prove is not None and candidate.apply is not None
        proof = _proofs.get(candidate.key)
        if proof is None:
            proof = candidate.prove()
            if candidate.key is not None:
                _proofs[candidate.key] = proof
        error = proof.error if isfinite(proof.error) else None
        reason = proof.failure and f"failed its proof: {proof.failure}"
        if reason is None:
            candidate.apply(undo)
    return Row(
        path=candidate.path,
        module=type(candidate.module).__name__,
        op=candidate.op,
        backend=candidate.backend,
        action="patched" if reason is None else "left",
        error=error,
        reason=reason or "",
    )
