"""accelerate's hooks on a model, and hooks on submodules like those that offload to the CPU."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

import swathe.hf
from support.hf_around import BACKENDS, MODELS, fully, ops_of, step, training
from support.hf_patching import assert_equal
from support.tiny_causal import batch
from swathe.modeling.hf import references

needs_accelerate = pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate")


def mapped(model: Any) -> Any:
    from accelerate import dispatch_model

    return dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def offloaded(model: Any) -> Any:
    """Weights are on meta, and brought for each module's forward."""
    from accelerate import cpu_offload

    return cpu_offload(model, "cpu")


def aligned(model: Any) -> Any:
    """A hook on every submodule that moves what goes in and what comes out."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for part in model.modules():
        add_hook_to_module(part, AlignDevicesHook("cpu", io_same_device=True))
    return model


@needs_accelerate
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", ["patch", "hooks"])
@pytest.mark.parametrize("hang", [mapped, aligned])
def test_steps_under_hooks(hang: Any, first: str, backend: str) -> None:
    from accelerate.hooks import remove_hook_from_submodules

    own, model = step(training("qwen3")), training("qwen3")
    if first == "patch":
        fully(model, backend)
        hang(model)
    else:
        hang(model)
        report = swathe.hf.patch(model, backend=backend)
        assert ops_of(report) >= {"rms_norm", "gated_mlp_act"}, report
    assert_equal(step(model), own)
    remove_hook_from_submodules(model)
    assert_equal(step(model), own)
    swathe.hf.unpatch(model)
    assert_equal(step(model), own)
    plain = training("qwen3")
    for path, part in plain.named_modules():
        found = model.get_submodule(path)
        assert type(found) is type(part)
        # accelerate leaves a bound method where it has been
        left = vars(found).get("forward")
        assert left is None or (left.__func__, left.__self__) == (type(part).forward, found), path


@needs_accelerate
@pytest.mark.parametrize("hang", [mapped, aligned])
def test_unpatched_under_hooks(hang: Any) -> None:
    """hooks, patch, unpatch: every attribute is what it was, and the hooks are called."""
    model = hang(training("llama"))
    before = {path: (type(part), dict(vars(part))) for path, part in model.named_modules()}
    swathe.hf.patch(model)
    swathe.hf.unpatch(model)
    assert {p: (type(part), vars(part)) for p, part in model.named_modules()} == before
    assert_equal(step(model), step(training("llama")))


@needs_accelerate
@pytest.mark.parametrize("first", ["patch", "hooks"])
@pytest.mark.parametrize("model_type", MODELS)
def test_weights_that_are_brought_for_each_forward(model_type: str, first: str) -> None:
    expected = training(model_type).eval()(batch()["input_ids"]).logits
    model = training(model_type).eval()
    if first == "patch":
        fully(model)
        offloaded(model)
    else:
        offloaded(model)
        report = swathe.hf.patch(model)
        assert any("meta" in row.reason for row in report.left), report
    with torch.no_grad():
        ours = model(batch()["input_ids"]).logits
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", ["patch", "hooks"])
def test_weights_that_hooks_put_there(first: str, backend: str) -> None:
    """Forward hooks of torch's own that load a module's weights, and take them away after."""
    expected = training("llama").eval()(batch()["input_ids"]).logits
    model = training("llama").eval()
    if first == "patch":
        fully(model, backend)
    for part in model.modules():
        if list(part.parameters(recurse=False)):
            hang_loader(part)
    if first == "hooks":
        assert swathe.hf.patch(model, backend=backend).patched
    for part in model.modules():
        for p in part.parameters(recurse=False):
            p.data = torch.full_like(p, torch.nan)
    with torch.no_grad():
        ours = model(batch()["input_ids"]).logits
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def hang_loader(part: nn.Module) -> None:
    kept = {name: p.data.clone() for name, p in part.named_parameters(recurse=False)}

    def load(module: nn.Module, args: Any) -> None:
        for name, p in module.named_parameters(recurse=False):
            p.data = kept[name]

    def drop(module: nn.Module, args: Any, output: Any) -> None:
        for p in module.parameters(recurse=False):
            p.data = torch.full_like(p, torch.nan)

    part.register_forward_pre_hook(load)
    part.register_forward_hook(drop)


def wrapped(module: nn.Module) -> None:
    """As transformers' tensor parallelism does it: `forward` is put into the instance."""
    before = module.forward

    def outer(*args: Any, **kwargs: Any) -> Any:
        calls.append(type(module).__name__)
        return outer(*args) if args == ("never",) else before(*args, **kwargs)

    calls: list[str] = []
    module.calls = calls  # type: ignore[assignment]
    module.forward = outer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_forwards_that_are_wrapped_after_the_patch_lose_ours_with_it(
    model_type: str, backend: str
) -> None:
    own, model = step(training(model_type)), training(model_type)
    fully(model, backend)
    kinds = ("", "lm_head", "model.norm", "model.layers.0.self_attn", "model.layers.1.mlp")
    parts = [part for path, part in model.named_modules() if path in kinds]
    for part in parts:
        wrapped(part)
    assert_equal(step(model), own)
    inside = {part: vars(part)["forward"] for part in parts}
    with references.referring(model, None):
        assert all(torch.equal(found, own[name]) for name, found in step(model).items())
    assert inside == {part: vars(part)["forward"] for part in parts}
    swathe.hf.unpatch(model)
    again = step(model)
    assert all(torch.equal(found, own[name]) for name, found in again.items())
    assert all(len(part.calls) == 3 for part in parts)
