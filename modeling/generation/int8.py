"""Decoding with weights in int8: `generate(..., weights="int8")`, on a CPU.

Every projection, the head over the vocabulary among them, computes with its weight rounded to 255
steps a row (kernels/linear/eager.py) in the prefill and in every step alike: one model, another
than the full one. Embeddings, norms, routers and experts stay as they are, and so do activations.
At a token or some the time goes into reading weights, of which there is then a half of 16-bit ones.

Cost    once, about 0.4 s for 135 million weights on one thread (measured, beside other work): what
        was made is kept for later calls, and made anew only for weights that have changed. A change
        that torch counts (in place, or another parameter, module or memory) is always noticed; one
        behind its back (`.data`, numpy) where it meets one of up to SAMPLED numbers that are
        compared, as merging an adapter does. After others call `forget_int8`.
Memory  a byte a weight and 4 a row, beside the model's own weights, which training and saving go on
        using: 0.5 of a 16-bit model. It goes with its modules, or with `forget_int8`.

What wraps a projection and calls it (an adapter, hooks, a forward put on the instance) gets the
int8 result to go on with; plain nn.Linear modules, such as an adapter's own, are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from swathe.kernels.linear.api import INT8, resolve_linear
from swathe.kernels.linear.eager import quantised
from swathe.modeling.layers.linear import Int8, Linear, reading

SAMPLED = 256
_WEIGHTS = (None, INT8)
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Int8Model:
    """A model whose projections compute with `int8` while it is called."""

    def __init__(self, model: Any, int8: Mapping[nn.Module, Int8]) -> None:
        self.model, self.int8, self.new_cache = model, int8, model.new_cache

    def __call__(self, **arguments: Any) -> Any:
        """The model's outputs."""
        with reading(self.int8):
            return self.model(**arguments)


def with_weights(model: Any, weights: str | None) -> Any:
    """What `generate` is to call: the model, or with "int8" an Int8Model.

    Raises ValueError for other names, and for a model that cannot be read in int8.
    """
    if weights not in _WEIGHTS:
        raise ValueError(f"weights={weights!r}; allowed: {_WEIGHTS}")
    if weights is None:
        return model
    reason = _hindrance(model)
    if reason is not None:
        raise ValueError(f"weights={INT8!r}: {reason}; or leave weights out")
    # what is made in inference mode could not be used everywhere outside of it
    with torch.inference_mode(False), torch.no_grad():
        return Int8Model(model, {m: _int8(m) for m in model.modules() if type(m) is Linear})


def forget_int8(model: nn.Module) -> None:
    """Free the int8 weights of a model."""
    for module in model.modules():
        _kept.pop(module, None)


def _hindrance(model: nn.Module) -> str | None:
    """Why the projections of this model cannot be read in int8, and what would help."""
    kinds = {p.device.type for p in model.parameters()}
    if kinds != {"cpu"}:
        return f"the model is on {', '.join(sorted(kinds))}, and int8 is for CPUs; move it to one"
    if model.training:
        return "the model is in training mode; call model.eval()"
    if torch.is_autocast_enabled("cpu"):
        return "torch.autocast computes in another dtype; cast the model with .to instead"
    projections = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    if not projections:
        return "the model has no projections that are swathe's Linear; load it with swathe"
    for name, module in projections.items():
        if type(module) is not Linear:
            return (
                f"{name} is a {type(module).__name__}, whose weight may be computed; fold "
                "parametrizations into the weight"
            )
        if is_traceable_wrapper_subclass(module.weight):
            return f"the weight of {name} is a {type(module.weight).__name__}; unwrap it"
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None:
            return (
                f"{name or 'the model'} was compiled, with the full weights in its code; load "
                "the model anew"
            )
    return None


class _Kept(NamedTuple):
    """What was made of a parameter, and what the parameter was at that time."""

    int8: Int8
    parameter: ReferenceType[Tensor]
    facts: tuple[Any, ...]
    sample: Tensor


_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def _int8(module: Linear) -> Int8:
    weight = module.weight
    choice = resolve_linear(weight, module.choice.asked, weights=INT8)
    facts, sample = _facts(weight), _sample(weight)
    kept = _kept.get(module)
    if (
        kept is None
        or kept.parameter() is not weight
        or kept.facts != facts
        or not torch.equal(kept.sample, sample)
    ):
        numbers, scales = quantised(weight.detach())
        kept = _Kept(Int8(numbers, scales, choice), ref(weight), facts, sample.clone())
        _kept[module] = kept
    return kept.int8._replace(choice=choice)


def _facts(weight: Tensor) -> tuple[Any, ...]:
    # a tensor made in inference mode counts nothing
    version = None if weight.is_inference() else weight._version
    return version, weight.data_ptr(), weight.dtype, weight.shape, weight.stride()


def _sample(weight: Tensor) -> Tensor:
    """The bits of up to SAMPLED numbers, of different columns."""
    step = -(-weight.numel() // SAMPLED) | 1
    return weight.detach().flatten()[::step].view(_BITS[weight.element_size()])
