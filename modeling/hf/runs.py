"""One run of a model for `verify`: the same batch, the same generators, dropout off, and in fp64.

Nothing here leaves a trace in a model beyond what references.as_it_was puts back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.dropout import _DropoutNd

from swathe.modeling.hf.patching.prove import Widened
from swathe.modeling.hf.references import fit_for_fp64

_IGNORED = -100


class Batch:
    """The arguments of a run, which tokens of it are real, and the seed.

    Labels that only a hidden token could predict are ignored: such a row has no defined value.
    `perturbed` has other tokens at padding, None where there is none.
    """

    def __init__(self, arguments: Mapping[str, Any], seed: int) -> None:
        self.arguments, self.seed = dict(arguments), seed
        self.notes: list[str] = []
        self.training = True
        self.real = _real_tokens(self.arguments)
        self.perturbed: dict[str, Any] | None = None
        if self.real is None:
            return
        self._ignore_padding()
        if not bool(self.real.all()):
            # a neighbour of the padding token: it has an embedding, and stands for no image
            ids = self.arguments["input_ids"]
            other = torch.where(self.real, ids, (ids - 1).abs())
            self.perturbed = {**self.arguments, "input_ids": other}

    def _ignore_padding(self) -> None:
        labels = self.arguments.get("labels")
        if not isinstance(labels, Tensor) or labels.shape != self.real.shape:  # type: ignore[union-attr]
            return
        assert self.real is not None
        predicting = torch.cat([self.real[:, :1], self.real[:, :-1]], 1) & self.real
        kept = torch.where(predicting, labels, _IGNORED)
        if not torch.equal(kept, labels):
            self.notes.append("labels that stand at padding, or right after it, were ignored")
        self.arguments["labels"] = kept


def _real_tokens(arguments: Mapping[str, Any]) -> Tensor | None:
    mask, ids = arguments.get("attention_mask"), arguments.get("input_ids")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return None if ids is None or ids.shape != mask.shape else mask != 0


@dataclass
class Run:
    """What came out: floating outputs by name, the loss, gradients by parameter."""

    outputs: dict[str, Tensor]
    loss: Tensor | None = None
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)


def evaluated(model: nn.Module, arguments: Mapping[str, Any], seed: int) -> Run:
    """Outputs in evaluation mode, without gradients."""
    model.eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        return Run(_outputs(model(**arguments)))


def differentiated(model: nn.Module, batch: Batch, names: list[str], run: Run) -> None:
    """Add loss and gradients of the parameters `names`, in training mode with dropout off."""
    before = {name: _fingerprint(p) for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    with _training(model, batch):
        torch.manual_seed(batch.seed)
        loss = _loss(model(**batch.arguments))
        found = _gradients(loss, [parameters[name] for name in names])
    run.loss = loss.detach()
    run.gradients = dict(zip(names, found, strict=True))
    run.changed = [n for n, p in model.named_parameters() if _fingerprint(p) != before.get(n)]


def yardstick(model: nn.Module, batch: Batch, names: list[str]) -> tuple[Run, str]:
    """The run in fp64, or in fp32 for narrower models where fp64 does not run; and its name."""
    narrow = all(p.dtype.itemsize < 4 for p in model.parameters() if p.is_floating_point())
    reasons = []
    for dtype in (torch.float64, torch.float32) if narrow else (torch.float64,):
        try:
            return _wide(model, batch, names, dtype), f"the reference in {str(dtype)[6:]}"
        except (RuntimeError, NotImplementedError, TypeError) as error:
            reasons.append(f"{str(dtype)[6:]}: {str(error).splitlines()[0]}")
    raise RuntimeError(
        "verify: the reference does not run in a wider dtype, so that its rounding errors cannot "
        f"be told from faults ({'; '.join(reasons)}). Use a smaller batch or model, or the CPU"
    )


def _wide(model: nn.Module, batch: Batch, names: list[str], dtype: torch.dtype) -> Run:
    trained = set(names)
    state: dict[str, Tensor] = {}
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        wide = t.detach().to(dtype, copy=True) if t.is_floating_point() else t.detach().clone()
        state[name] = wide.requires_grad_(name in trained)
    arguments = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in batch.arguments.items()
    }
    device = next(model.parameters()).device.type
    casts = Widened() if dtype == torch.float64 else nullcontext()
    with casts, _created_in(dtype), fit_for_fp64(model), torch.autocast(device, enabled=False):
        model.eval()
        torch.manual_seed(batch.seed)
        with torch.no_grad():
            run = Run(_outputs(functional_call(model, state, (), arguments)))
        with _training(model, batch):
            torch.manual_seed(batch.seed)
            loss = _loss(functional_call(model, state, (), arguments))
            found = _gradients(loss, [state[name] for name in names])
    run.loss = loss.detach()
    run.gradients = dict(zip(names, found, strict=True))
    return run


@contextmanager
def _created_in(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# attributes that have activations recomputed, of our layers and of transformers'
_CHECKPOINTING = {"checkpointing": None, "gradient_checkpointing": False}


@contextmanager
def _training(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Training mode without dropout, or evaluation if the batch says so.

    Activations are kept: to recompute them in backward would not be a run of its own.
    """
    changed: list[tuple[dict[str, Any], str, Any]] = []
    model.train(batch.training)
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.training = False
        own = vars(module)
        off = {name: 0.0 for name, v in own.items() if "drop" in name and isinstance(v, float)}
        off.update({name: v for name, v in _CHECKPOINTING.items() if name in own})
        changed += [(own, name, own[name]) for name in off]
        own.update(off)
    try:
        yield
    finally:
        for own, name, value in changed:
            own[name] = value


def settle_mode(model: nn.Module, batch: Batch) -> None:
    """Let gradients be those of evaluation if the model draws random numbers all the same."""
    losses = []
    with _training(model, batch), torch.no_grad():
        for seed in (batch.seed, batch.seed + 1):
            torch.manual_seed(seed)
            losses.append(_loss(model(**batch.arguments)).nan_to_num())
    if not torch.equal(*losses):
        batch.training = False
        batch.notes.append(
            "a dropout cannot be turned off: loss and gradients are those of evaluation"
        )


def _gradients(loss: Tensor, tensors: list[Tensor]) -> list[Tensor | None]:
    if not loss.requires_grad:
        return [None] * len(tensors)
    return list(torch.autograd.grad(loss, tensors, allow_unused=True))


def _loss(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None and isinstance(output, tuple):
        loss = output[0]
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(
            "verify: the model gave no loss for this batch; its labels must be named as its "
            "forward names them"
        )
    return loss


def _outputs(output: Any) -> dict[str, Tensor]:
    """Tensors of an output in a floating dtype, by name; without the loss and caches."""
    if isinstance(output, Mapping):
        items = list(output.items())
    elif isinstance(output, tuple):
        items = [(str(i), value) for i, value in enumerate(output)]
    else:
        items = list(vars(output).items())
    named = {name: value for name, value in items if isinstance(value, Tensor)}
    return {
        name: value.detach()
        for name, value in named.items()
        if value.is_floating_point() and value.dim() > 0
    }


def _fingerprint(p: Tensor) -> tuple[Any, ...]:
    if p.is_meta:
        return (p.shape,)
    norm = torch.linalg.vector_norm(p.detach(), dtype=torch.float64)
    sums = (p.detach().sum(dtype=torch.float64), norm)
    return (id(p), p._version, *(s.nan_to_num().item() for s in sums))
