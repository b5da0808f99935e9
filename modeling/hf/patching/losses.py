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
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from swathe.kernels.core.losses import LABELS, shifted
from swathe.kernels.cross_entropy.api import cross_entropy, resolve_cross_entropy
from swathe.kernels.linear_cross_entropy.api import (
    linear_cross_entropy,
    resolve_linear_cross_entropy,
)
from swathe.modeling.hf.patching.admission import chosen, plain, why_left
from swathe.modeling.hf.patching.lazy_logits import LazyLogits
from swathe.modeling.hf.patching.options import Options
from swathe.modeling.hf.patching.report import Candidate, Proof
from swathe.modeling.hf.patching.swaps import Undo, fused_class, hooked

LAZY, REAL = "linear_cross_entropy", "cross_entropy"
# the attribute of a patched head that says whether it shall answer lazily
FLAG = "_swathe_lazy"


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
    proof = _proven(model, str(at), LAZY, options.backend)
    if proof.failure is not None:
        return Candidate(where, head, LAZY, backend, proof.failure)

    def apply(undo: Undo) -> None:
        undo.swap_class(head, lazy_class(type(head)))
        undo.set(head, FLAG, False)
        name = "_old_forward" if "_old_forward" in vars(model) else "forward"
        undo.set(model, name, LazyForward(model, vars(model).get(name)))
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
    proof = _proven(model, at, REAL, options.backend)
    if proof.failure is not None:
        return Candidate(path, model, REAL, backend, proof.failure)

    def apply(undo: Undo) -> None:
        undo.set(model, "loss_function", CausalLMLoss(options.backend, lazy=False))

    return Candidate(path, model, REAL, backend, prove=lambda: proof, apply=apply)


def _proven(model: PreTrainedModel, head: str, op: str, backend: str) -> Proof:
    from swathe.modeling.hf.patching.loss_proof import prove_loss

    return prove_loss(model, head, lazy=op == LAZY, backend=backend)


def why_no_lazy_head(head: nn.Module) -> str | None:
    """Why the head has to be called as it is, None if it may be lazy."""
    if type(head).forward is not nn.Linear.forward:
        return f"its head is a {type(head).__name__}, which has to be called; only nn.Linear is not"
    if hooked(head):
        return "its head has hooks, which are to see the logits"
    parameters: list[Any] = [head.weight, head.bias]
    return why_left(head, [p for p in parameters if p is not None])


def lazy_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of a head of `cls` that can answer lazily."""
    return fused_class(cls, _head_forward, op=LAZY)


def _head_forward(self: nn.Module, input: Tensor) -> Any:
    head: Any = self
    if getattr(head, FLAG) and plain(input, head.weight, head.bias):
        return LazyLogits(input, head)
    return nn.Linear.forward(head, input)


class LazyForward:
    """A model's forward, whose head answers lazily in training when labels are given.

    It stands in the instance, where accelerate and Trainer look for `forward` and its signature.
    `own` is what stood there before, None for the class's. An adapter or a hook that came to the
    head after the patch is called as it wants to be, with the head's own logits.
    """

    def __init__(self, model: PreTrainedModel, own: Callable[..., Any] | None) -> None:
        self.model, self.own = model, own
        names = list(inspect.signature(type(model).forward).parameters)
        self.position = names.index("labels") - 1

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own or type(self.model).forward.__get__(self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model
        # accelerate binds what it unwraps to the model, whatever it was
        if args and args[0] is model:
            args = args[1:]
        labels = args[self.position] if len(args) > self.position else kwargs.get("labels")
        head = model.get_output_embeddings()
        if labels is None or not model.training or not _can_be_lazy(head):
            return self._own(args, kwargs)
        setattr(head, FLAG, True)
        try:
            return self._own(args, kwargs)
        finally:
            setattr(head, FLAG, False)

    def _own(self, args: Any, kwargs: Any) -> Any:
        if self.own is None:
            return type(self.model).forward(self.model, *args, **kwargs)
        return self.own(*args, **kwargs)


def _can_be_lazy(head: Any) -> bool:
    return type(head).forward is _head_forward and not hooked(head)


class CausalLMLoss:
    """transformers' ForCausalLMLoss by our kernels, for lazy logits or for real ones.

    Whatever it does not know goes to ForCausalLMLoss.
    """

    def __init__(self, backend: str, *, lazy: bool) -> None:
        self.backend, self.lazy = backend, lazy

    def __call__(
        self,
        logits: Any,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """() in fp32. Shapes: logits (B, T, V); labels (B, T), or `shift_labels` moved already."""
        if isinstance(logits, LazyLogits) and logits.tensor is not None:
            logits = logits.tensor
        targets = shift_labels
        if targets is None and labels is not None and labels.dim() > 0:
            targets = shifted(REAL, labels, ignore_index)
        if targets is None or not self._serves(logits, targets, vocab_size, num_items_in_batch):
            own = logits.real() if isinstance(logits, LazyLogits) else logits
            return self.own(
                logits=own,
                labels=labels,
                vocab_size=vocab_size,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
                shift_labels=shift_labels,
                **kwargs,
            )
        options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "num_items": num_items_in_batch,
            "implementation": self.backend,
        }
        targets = targets.reshape(-1).to(logits.device)
        if not isinstance(logits, LazyLogits):
            return cross_entropy(logits.reshape(-1, vocab_size), targets, **options)
        scale, softcap = logits.scale_and_softcap()  # type: ignore[misc]  # _serves has seen it
        return linear_cross_entropy(
            logits.hidden.reshape(-1, logits.hidden.shape[-1]),
            logits.head.weight,
            targets,
            bias=logits.head.bias,
            logit_scale=scale,
            softcap=softcap,
            **options,
        )

    def _serves(self, logits: Any, targets: Tensor, vocab_size: int, num_items: Any) -> bool:
        if isinstance(logits, LazyLogits):
            if logits.scale_and_softcap() is None:
                return False
        elif self.lazy or not plain(logits):
            return False
        rows = logits.shape[:-1].numel()
        single = not isinstance(num_items, Tensor) or num_items.numel() == 1
        known = targets.dtype in LABELS and targets.numel() == rows
        return known and single and logits.shape[-1] == vocab_size

    def own(self, **arguments: Any) -> Tensor:
        """transformers' loss."""
        return ForCausalLMLoss(**arguments)
