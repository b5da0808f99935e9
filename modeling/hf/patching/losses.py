"""The loss of causal language models, without their logits where that is possible.

linear_cross_entropy  a head that is an nn.Linear answers with LazyLogits in training, when labels
                      are given, and the loss is computed from them: they never exist as a whole.
                      `outputs.logits` stays what it was for whoever reads it, computed then.
cross_entropy         the loss function alone, on the logits of the model's own head, also in
                      evaluation. For heads that have to be called: hooks, adapters, quantisation.

The first is looked for first; where it cannot be had, the report says why and the second is taken.
Neither touches evaluation without labels or `generate`. Labels that are all ignored give a loss of
0, where transformers gives NaN.

A model is one of these if its forward calls `self.loss_function` and that is transformers'
ForCausalLMLoss. What becomes of the logits in between is not read but run: loss_proof.py.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from swathe.kernels.cross_entropy.api import resolve_cross_entropy
from swathe.kernels.linear_cross_entropy.api import resolve_linear_cross_entropy
from swathe.modeling.hf.patching.admission import chosen, why_left
from swathe.modeling.hf.patching.causal_loss import (
    FLAG,
    LAZY,
    REAL,
    CausalLMLoss,
    LazyForward,
    lazy_class,
)
from swathe.modeling.hf.patching.loss_proof import prove_loss
from swathe.modeling.hf.patching.options import Options
from swathe.modeling.hf.patching.report import Candidate
from swathe.modeling.hf.patching.swaps import Undo, hooked


def find(model: nn.Module, options: Options) -> list[Candidate]:
    """The loss of every model in `model` that computes one from logits and labels."""
    found: list[Candidate] = []
    if not (options.cross_entropy or options.fused_linear_cross_entropy):
        return found
    for path, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and _takes_labels(part):
            found += _candidates(path, part, options)
    return found


def _takes_labels(model: PreTrainedModel) -> bool:
    return "labels" in inspect.signature(type(model).forward).parameters


def _candidates(path: str, model: PreTrainedModel, options: Options) -> list[Candidate]:
    wanted = LAZY if options.fused_linear_cross_entropy else REAL
    reason = _why_not_this_loss(model)
    if reason is not None:
        return [Candidate(path, model, wanted, reason=reason)]
    found = []
    if wanted == LAZY:
        found.append(_lazy(path, model, options))
        if found[0].reason is None or isinstance(vars(model).get("_loss_function"), CausalLMLoss):
            return found
    found.append(_real(path, model, options))
    return found


def _why_not_this_loss(model: PreTrainedModel) -> str | None:
    try:
        source = inspect.getsource(inspect.unwrap(type(model).forward))
    except (OSError, TypeError):
        return "the source of its forward is not there"
    if "self.loss_function(" not in source:
        return "its forward does not call self.loss_function"
    loss: Any = model.loss_function
    if isinstance(loss, CausalLMLoss):
        return "is patched already"
    if loss is not ForCausalLMLoss:
        name = getattr(loss, "__name__", type(loss).__name__)
        return f"its loss is {name}, not transformers' ForCausalLMLoss"
    if model.get_output_embeddings() is None:
        return "it has no output embeddings"
    return None


def _lazy(path: str, model: PreTrainedModel, options: Options) -> Candidate:
    head: Any = model.get_output_embeddings()
    at = next((name for name, part in model.named_modules() if part is head), None)
    where = f"{path}.{at}" if path and at else at or path
    reason = "its head is not a part of the model" if at is None else why_no_lazy_head(head)
    if reason is not None:
        return Candidate(where, head, LAZY, reason=reason)
    resolve = partial(resolve_linear_cross_entropy, head.weight, head.weight)
    backend, reason = chosen(
        lambda name: resolve(name, bias=head.bias is not None), LAZY, options.backend
    )
    if reason is not None:
        return Candidate(where, head, LAZY, reason=reason)
    proof = prove_loss(model, str(at), lazy=True, backend=options.backend)
    if proof.failure is not None:
        return Candidate(where, head, LAZY, backend, proof.failure)

    def apply(undo: Undo) -> None:
        undo.swap_class(head, lazy_class(type(head)))
        undo.set(head, FLAG, False)
        name = "_old_forward" if "_old_forward" in vars(model) else "forward"
        forward = LazyForward(model, vars(model).get(name))
        undo.set(model, name, forward)
        undo.set(model, "_replicate_for_data_parallel", forward.replica)
        undo.set(model, "loss_function", CausalLMLoss(options.backend, lazy=True))

    return Candidate(where, head, LAZY, backend, prove=lambda: proof, apply=apply)


def _real(path: str, model: PreTrainedModel, options: Options) -> Candidate:
    head: Any = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    like = weight if isinstance(weight, Tensor) and weight.is_floating_point() else None
    like = torch.empty(1, 1, dtype=model.dtype, device=model.device) if like is None else like
    backend, reason = chosen(partial(resolve_cross_entropy, like), REAL, options.backend)
    if reason is not None:
        return Candidate(path, model, REAL, reason=reason)
    at = next((name for name, part in model.named_modules() if part is head), "")
    proof = prove_loss(model, at, lazy=False, backend=options.backend)
    if proof.failure is not None:
        return Candidate(path, model, REAL, backend, proof.failure)

    def apply(undo: Undo) -> None:
        undo.set(model, "loss_function", CausalLMLoss(options.backend, lazy=False))

    return Candidate(path, model, REAL, backend, prove=lambda: proof, apply=apply)


def why_no_lazy_head(head: nn.Module) -> str | None:
    """Why the head has to be called as it is, None if it may be lazy."""
    if type(head).forward is not nn.Linear.forward:
        return f"its head is a {type(head).__name__}, which has to be called; only nn.Linear is not"
    if hooked(head):
        return "its head has hooks, which are to see the logits"
    parameters: list[Any] = [head.weight, head.bias]
    return why_left(head, [p for p in parameters if p is not None])
