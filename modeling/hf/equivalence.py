"""swathe.verify: is this model still the model that it was?

The model runs beside its reference, and both beside a yardstick, the reference in fp64:

    error   rms(model's - yardstick) / rms(yardstick)         for each output and gradient
    own     the same of the reference: what its own rounding costs
    ratio   error / own

Outputs are compared in evaluation; loss and gradients in training with every dropout off, because
that is where a patched loss differs. All runs see one batch and one state of the generators.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from swathe.kernels.core.errors import did_you_mean
from swathe.modeling.hf.comparison import Measured, compare_gradients, compare_values
from swathe.modeling.hf.references import as_it_was, referring, same_parameters
from swathe.modeling.hf.runs import Batch, Run, differentiated, evaluated, settle_mode, yardstick
from swathe.modeling.hf.usage import observed
from swathe.modeling.hf.verification import Check, Verification

# as transformers names what a loss needs
_LABELS = ("labels", "label", "_positions")


def verify(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    reference: nn.Module | None = None,
    seed: int = 0,
) -> Verification:
    """Compare a model's outputs, loss and every gradient with those of its reference.

        swathe.patch(model)
        swathe.verify(model, batch).raise_for_errors()

    `batch` is what the model is called with, labels included: input_ids (B, T), attention_mask,
    labels, ... on its device. Without a `reference` it is the model itself, unpatched and with
    attn_implementation "eager" for the time being; otherwise any model with the same parameters.
    The model is left as it was: gradients, buffers, training flags, generators, patches.

    Fails for errors beyond what the reference's own rounding explains, and for: a gradient that
    vanished or appeared (a bypassed adapter is named), NaN or infinity, an output that is missing
    or has another dtype or shape, a parameter that differs or changes, and padding that is looked
    at: tokens that attention_mask hides are replaced, which must not move outputs of real ones.
    Patched modules that ran no kernel of ours on this batch are named; that is no failure.

    Memory: activations of one run (gradient checkpointing is off meanwhile), gradients of the model
    and its reference, and parameters and gradients of the yardstick, which is the reference in
    fp64, or in fp32 where that does not run and the model is narrower.
    Raises ValueError for a batch without labels or with arguments unknown to the model, for a model
    without trainable parameters or with none to compare with, and for a reference with other ones.
    """
    batch = _checked(model, batch)
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    other = model if reference is None else reference
    with torch.random.fork_rng(list(devices)), as_it_was(model), as_it_was(other):
        return _verify(model, other, reference is not None, Batch(batch, seed))


def _verify(model: nn.Module, other: nn.Module, given: bool, batch: Batch) -> Verification:
    checks = same_parameters(model, other) if given else []
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    with referring(model, other if given else None) as said:
        settle_mode(other, batch)
        theirs = _run(other, batch, names)
        gold, measure = yardstick(other, batch, names)
        theirs_moved = _moved(other, batch, theirs)
    with observed() as usage:
        ours = _run(model, batch, names)
    ours_moved = _moved(model, batch, ours)
    notes = list(batch.notes)
    measured = Measured(ours, theirs, gold, batch.real)
    checks += compare_values(measured)
    checks += compare_gradients(measured, model)
    checks += _padding(ours_moved, theirs_moved, measured, notes)
    checks += [
        Check("parameter", name, failure="the forward changed it")
        for name in ours.changed
        if name not in theirs.changed
    ]
    return Verification(tuple(checks), said, measure, tuple(notes), usage.unused(model))


def _run(model: nn.Module, batch: Batch, names: list[str]) -> Run:
    run = evaluated(model, batch.arguments, batch.seed)
    differentiated(model, batch, names, run)
    return run


def _moved(model: nn.Module, batch: Batch, run: Run) -> dict[str, Tensor] | None:
    """Every output's difference where padding tokens are others; None without padding."""
    if batch.perturbed is None:
        return None
    again = evaluated(model, batch.perturbed, batch.seed)
    return {name: again.outputs[name].double() - x.double() for name, x in run.outputs.items()}


def _padding(
    ours: dict[str, Tensor] | None,
    theirs: dict[str, Tensor] | None,
    measured: Measured,
    notes: list[str],
) -> list[Check]:
    if ours is None or theirs is None:
        notes.append(
            "padding was not checked: the batch has no attention_mask (B, T) with zeros, or no "
            "input_ids"
        )
        return []
    checks = []
    for name in ours:
        if name not in theirs or not measured.by_token(name):
            continue
        moved, own = (measured.size(name, by[name]) for by in (ours, theirs))
        # a mask that holds keeps masked tokens out exactly, or to a rounding or two
        limit = max(measured.own_error(name), own)
        failure = None
        if moved > 4 * limit:
            failure = (
                "outputs of real tokens moved when tokens that attention_mask hides were replaced: "
                "the mask is ignored"
            )
        elif own > 4 * measured.own_error(name):
            notes.append(f"{name}: padding moves real tokens in the reference too")
        checks.append(Check("padding", name, moved, own if own else None, failure))
    return checks


def _checked(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"verify was given a {type(model).__name__}; it takes a model")
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"verify: batch is a {type(batch).__name__}; it must be a mapping of the forward's "
            "arguments, such as {'input_ids': ids, 'attention_mask': mask, 'labels': ids}"
        )
    parameters = inspect.signature(model.forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    allowed = [name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD]
    for name in batch:
        if not anything and name not in allowed:
            raise ValueError(
                f"verify: {type(model).__name__}.forward has no argument {name!r}"
                f"{did_you_mean(name, allowed)}; it has {allowed}. Remove it from the batch"
            )
    if not any(name.endswith(_LABELS) for name in batch):
        raise ValueError(
            f"verify: the batch has {sorted(batch)} but no labels, so that there is no loss and "
            "there are no gradients to compare; add labels, for a language model "
            f"batch['input_ids'] with -100 at padding"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"verify: no parameter of {type(model).__name__} requires a gradient, so that there "
            "are none to compare; call model.requires_grad_(True), or unfreeze what you train"
        )
    device = next(model.parameters()).device
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.device.type != device.type:
            raise ValueError(
                f"verify: {name} is on {value.device} and the model on {device}; move the batch"
            )
    return dict(batch)
