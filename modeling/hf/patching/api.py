"""swathe.patch and swathe.unpatch: one model, or every one of some types as it is made."""

from __future__ import annotations

from functools import partial
from typing import Literal, Unpack, overload

from torch import nn

from swathe.modeling.hf.patching import patch as one
from swathe.modeling.hf.patching.creation import Creation, patch_created, stop_created
from swathe.modeling.hf.patching.options import Options, PatchOptions
from swathe.modeling.hf.patching.report import Report


@overload
def patch(model: nn.Module, **options: Unpack[PatchOptions]) -> Report: ...
@overload
def patch(model: str | tuple[str, ...], **options: Unpack[PatchOptions]) -> Creation: ...
@overload
def patch(*, all: Literal[True], **options: Unpack[PatchOptions]) -> Creation: ...
def patch(
    model: nn.Module | str | tuple[str, ...] | None = None,
    *,
    all: bool = False,
    **options: Unpack[PatchOptions],
) -> Report | Creation:
    """Put a transformers model on swathe's kernels, in place; returns what was done, and why.

        print(swathe.patch(model))
        swathe.patch("llama")     models of this model_type (or a tuple of them), as they are made
        swathe.patch(all=True)    every transformers model, as it is made

    Works on one model, at any time: before or after training began, under PEFT and accelerate's
    hooks. Classes, torch's functions and every other model stay as they are, and so do parameters,
    state_dict keys and what `save_pretrained` writes. A module is swapped only if its forward is
    read as a form that we have, and the kernel is measured to be as exact as the module in its
    dtype; every other one is left alone, with the reason in the report.

    `rms_norm`, `layer_norm`, `rope`, `swiglu`, `residual` (sums joined with the norm that follows)
    and `fused_linear_cross_entropy` (True) or `cross_entropy` (False) say which forms are looked
    for. `backend` is "auto", or the name of a backend that must serve (modules that it cannot serve
    are left alone). A model that is patched already stays as it is: unpatch it first to patch it
    otherwise. One that is moved (`to`, `half`, `cuda`) is proven and patched anew where it goes,
    with a warning if something lost its kernel. Patch before FSDP2 or tensor parallelism shards a
    model.

    Models that are made later are watched for by a Creation, which holds their reports, ends with
    `unpatch`, its `stop()` or a `with`, and leaves models that exist alone.

    Raises TypeError for anything but a module and for a model of swathe's own, ValueError for a
    model_type that transformers lacks or a backend that no op has; nothing has changed then.
    """
    if isinstance(model, nn.Module) and not all:
        return one.patch(model, **options)
    _check(model, all, "patch")
    one.check_backend(Options.of(**options))
    return patch_created(model, partial(one.patch, **options))  # type: ignore[arg-type]


def unpatch(model: nn.Module | str | tuple[str, ...] | None = None, *, all: bool = False) -> None:
    """Undo `patch`: every module has its own class and attributes again, by identity.

    A model that is not patched stays as it is. With what `patch` was given (a model_type, a tuple
    of them, all=True), models made from here on are left alone, and those made before stay patched
    until they are given themselves.
    Raises RuntimeError, before anything changes, where something else changed a module's class
    after the patch, as FSDP2 does; ValueError where no such models were watched for.
    """
    if isinstance(model, nn.Module) and not all:
        return one.unpatch(model)
    _check(model, all, "unpatch")
    stop_created(model)  # type: ignore[arg-type]
    return None


def _check(model: object, all: bool, call: str) -> None:
    """Raise TypeError unless these are types of models alone, or all=True alone."""
    named = isinstance(model, str) or (
        isinstance(model, tuple) and bool(model) and {type(name) for name in model} == {str}
    )
    if not (named and not all) and not (model is None and all):
        given = f"a {type(model).__name__}" + (" and all=True" if all else "")
        raise TypeError(
            f"{call} was given {given}; it takes a model of transformers (or any module around or "
            "inside one), a model_type such as 'llama', or all=True"
        )
