"""RMSNorm and LayerNorm modules, found by what their forward computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swathe.kernels.core.registry import Choice
from swathe.kernels.layer_norm.api import layer_norm, resolve_layer_norm
from swathe.kernels.norm.api import resolve_rms_norm, rms_norm
from swathe.modeling.hf.patching.admission import already, chosen, plain, sample_of, why_left
from swathe.modeling.hf.patching.norm_forms import (
    LayerForm,
    RMSForm,
    layer_form,
    looks_like_a_norm,
    rms_form,
)
from swathe.modeling.hf.patching.options import Options
from swathe.modeling.hf.patching.prove import Call, prove
from swathe.modeling.hf.patching.report import Candidate, Proof
from swathe.modeling.hf.patching.swaps import Forward, Undo, fused_class, recipe
from swathe.modeling.hf.patching.symbolic import Trace, Unreadable, trace

Form = RMSForm | LayerForm
_RMS, _LAYER = "rms_norm", "layer_norm"
# rows that normal activations have, and those where eps, or the range of fp16, is felt
_SCALES = (1.0, 1e-3, 30.0, 0.1)
_WITHOUT_WEIGHT = 64  # features where nothing says how many there are
_SHAPES = ((1,), (3,), (2, 5), (7,), (2, 3, 2))


def find(model: nn.Module, options: Options) -> list[Candidate]:
    """Every module of the model that is a norm, or is named like one."""
    found, sample = [], sample_of(model)
    for path, module in model.named_modules():
        candidate = already(path, module, *_wanted(options))
        if candidate is None and _is_small(module):
            candidate = _candidate(path, module, sample, options)
        if candidate is not None:
            found.append(candidate)
    return found


def norm_form(module: nn.Module) -> Form | None:
    """The norm that a module computes, None if it is none that we have; looks at nothing else."""
    try:
        e = trace(module).expression
    except Unreadable:
        return None
    return rms_form(e) or layer_form(e)


def _is_small(module: nn.Module) -> bool:
    """A norm has a weight and a bias at most, and no parts that have any."""
    own = [p for p in module._parameters.values() if p is not None]
    parts = any(
        next(part.parameters(), None) is not None
        for name, part in module.named_children()
        if name != "parametrizations"
    )
    small = len(own) <= 2 and all(p.dim() <= 1 for p in own)
    return small and not parts and not isinstance(module, PreTrainedModel)


def _candidate(path: str, module: nn.Module, sample: Tensor, options: Options) -> Candidate | None:
    named = "norm" in type(module).__name__.lower()
    op = _LAYER if "layernorm" in type(module).__name__.lower() else _RMS
    try:
        read = trace(module)
    except Unreadable as error:
        reason = why_left(module, ()) or f"its forward {error}"
        left = Candidate(path, module, op, reason=reason)
        return left if named and op in _wanted(options) else None
    form = rms_form(read.expression) or layer_form(read.expression)
    if form is None:
        if op not in _wanted(options) or not (named or looks_like_a_norm(read.expression)):
            return None
        reason = why_left(module, ()) or "computes no form of RMSNorm or LayerNorm"
        return Candidate(path, module, op, reason=reason)
    op = _RMS if isinstance(form, RMSForm) else _LAYER
    if op not in _wanted(options):
        return None
    return _of_form(path, module, op, form, read, sample, options)


def _wanted(options: Options) -> list[str]:
    asked = ((_RMS, options.rms_norm), (_LAYER, options.layer_norm))
    return [op for op, wanted in asked if wanted]


def _of_form(
    path: str,
    module: nn.Module,
    op: str,
    form: Form,
    read: Trace,
    sample: Tensor,
    options: Options,
) -> Candidate:
    names = [form.weight, form.bias if isinstance(form, LayerForm) else None]
    own: list[Tensor] = [getattr(module, name) for name in names if name is not None]
    reason = why_left(module, own)
    if reason is not None:
        return Candidate(path, module, op, reason=reason)
    like = own[0] if own else sample
    N = own[0].shape[0] if own else _WITHOUT_WEIGHT
    backend, reason = chosen(partial(_resolve, form, like), op, options.backend)
    if form.torchs and backend == "torch" and options.backend != "torch":
        reason = "calls torch's own kernel, which is the fastest here"
    if reason is not None:
        return Candidate(path, module, op, backend, reason)
    # parts that promote dtypes may promote others than these; torch's own norms do not
    only = like.dtype if form.alike and not form.torchs else None
    forward = fused_forward(type(module), form, only, options.backend)

    def proof() -> Proof:
        return prove(module, forward, _calls(N, like, form))

    def apply(undo: Undo) -> None:
        undo.swap_class(module, fused_class(type(module), forward, op=op))

    key = (type(module), forward, read.expression, like.dtype, like.device, N)
    return Candidate(path, module, op, backend, None, key, proof, apply)


def _resolve(form: Form, like: Tensor, backend: str) -> Choice:
    if isinstance(form, RMSForm):
        return resolve_rms_norm(like, like, backend, offset=form.offset, casting=form.casting)
    return resolve_layer_norm(like, like, backend)


def _calls(N: int, like: Tensor, form: Form) -> Iterator[Call]:
    """Rows of N features in the dtypes that the module may meet: under autocast also in bf16."""
    generator = torch.Generator().manual_seed(0)
    dtypes = [like.dtype]
    if like.dtype == torch.float32 and not form.alike:
        dtypes.append(torch.bfloat16)
    for i in count():
        shape, scale = _SHAPES[i % len(_SHAPES)], _SCALES[i % len(_SCALES)]
        x = torch.randn(*shape, N, generator=generator) * scale
        dtype = dtypes[(i // 2) % len(dtypes)]
        yield Call((x.to(like.device, dtype).requires_grad_(),))


@recipe
def fused_forward(
    cls: type[nn.Module], form: Form, only: torch.dtype | None, backend: str
) -> Forward:
    """The forward for modules of `cls` with this form.

    What the kernel does not cover goes to the class's own forward: further arguments, DTensors,
    inputs of another dtype than `only`, autocast where torch's own norm would cast.
    """
    own: Callable[..., Any] = cls.forward
    call = _rms_call if isinstance(form, RMSForm) else _layer_call
    alike, in_autocast = form.alike, form.in_autocast
    weight_name, bias_name = form.weight, getattr(form, "bias", None)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs:
            return own(self, *args, **kwargs)
        x = args[0]
        weight = None if weight_name is None else getattr(self, weight_name)
        bias = None if bias_name is None else getattr(self, bias_name)
        if not plain(x, weight, bias) or (only is not None and x.dtype != only):
            return own(self, x)
        if alike and weight is not None and weight.dtype != x.dtype:
            return own(self, x)
        if not in_autocast and torch.is_autocast_enabled(x.device.type):
            return own(self, x)
        return call(x, weight, bias, form, backend)

    return forward


def _rms_call(x: Tensor, weight: Tensor | None, bias: None, form: RMSForm, backend: str) -> Tensor:
    if weight is None:
        weight = x.new_ones(x.shape[-1])
    return rms_norm(
        x, weight, form.eps, offset=form.offset, casting=form.casting, implementation=backend
    )


def _layer_call(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, form: LayerForm, backend: str
) -> Tensor:
    return layer_norm(x, weight, bias, form.eps, implementation=backend)
