"""What the head, the forward and the loss function of a language model become.

head        an nn.Linear that answers with LazyLogits while it is told to
forward     tells it so, in training when labels are given
loss        takes hidden states and the head's weight from them
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from swathe.kernels.core.losses import LABELS, shifted
from swathe.kernels.cross_entropy.api import cross_entropy
from swathe.kernels.linear_cross_entropy.api import linear_cross_entropy
from swathe.modeling.hf.patching.admission import plain
from swathe.modeling.hf.patching.lazy_logits import LazyLogits
from swathe.modeling.hf.patching.swaps import fused_class, hooked

LAZY, REAL = "linear_cross_entropy", "cross_entropy"
# the attribute of a patched head that says whether it shall answer lazily
FLAG = "_swathe_lazy"


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

    def replica(self) -> nn.Module:
        """What nn.DataParallel runs: without this forward, which is bound to the one model."""
        made: nn.Module = nn.Module._replicate_for_data_parallel(self.model)
        if self.own is None:
            vars(made).pop("forward")
        return made

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
            given: Any = num_items_in_batch
            return ForCausalLMLoss(
                logits=own,
                labels=labels,
                vocab_size=vocab_size,
                num_items_in_batch=given,
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
            return cross_entropy(logits.reshape(-1, vocab_size), targets, **options).float()
        scale, softcap = logits.scale_and_softcap()  # type: ignore[misc]  # _serves has seen it
        return linear_cross_entropy(
            logits.hidden.reshape(-1, logits.hidden.shape[-1]),
            logits.head.weight,
            targets,
            bias=logits.head.bias,
            logit_scale=scale,
            softcap=softcap,
            **options,
        ).float()

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
