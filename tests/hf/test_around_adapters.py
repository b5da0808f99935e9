"""LoRA on a patched model, by PEFT and by hand: every adapter gets the gradient that it got."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swathe.hf
from support.hf_around import BACKENDS, OPS, fully, ops_of, step, training
from support.hf_patching import assert_equal
from support.tiny_causal import LoRA, batch

TARGETS = ["q_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")
# PEFT asks transformers by a name of before
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def by_hand(model: Any) -> Any:
    """Adapters where PEFT would put them, with noise in the half that starts at zero."""
    torch.manual_seed(3)
    for path, part in list(model.named_modules()):
        if path.rpartition(".")[2] in TARGETS:
            holder, _, name = path.rpartition(".")
            setattr(model.get_submodule(holder), name, LoRA(part))
    return model


def by_peft(model: Any) -> Any:
    import peft

    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return adapted


ADAPTED = [
    pytest.param(by_hand, id="by hand"),
    pytest.param(by_peft, id="peft", marks=needs_peft),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", ["patch", "adapters"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("adapt", ADAPTED)
def test_every_adapter_gets_its_gradient(
    adapt: Any, model_type: str, first: str, backend: str
) -> None:
    own = step(adapt(training(model_type)))
    adapters = [name for name in own if "lora_" in name]
    assert len(adapters) == 2 * (2 * 4 + 1) and all(own[name].any() for name in adapters)
    model = training(model_type)
    if first == "patch":
        fully(model, backend)
        model = adapt(model)
    else:
        model = adapt(model)
        report = swathe.hf.patch(model, backend=backend)
        # the head has to be called: the loss alone is taken
        assert ops_of(report) == {*OPS, "cross_entropy"}, report
    assert_equal(step(model), own)
    swathe.hf.unpatch(model)
    assert_equal(step(model), own)


@needs_peft
@pytest.mark.parametrize("first", ["patch", "adapters"])
def test_verify_sees_a_model_with_adapters(first: str) -> None:
    model = training("llama")
    if first == "patch":
        fully(model)
        model = by_peft(model)
    else:
        model = by_peft(model)
        swathe.hf.patch(model)
    found = swathe.hf.verify(model, batch())
    assert found.ok, found
    gradients = {check.name for check in found.checks if check.kind == "gradient"}
    assert gradients == {name for name, p in model.named_parameters() if p.requires_grad}


@needs_peft
@pytest.mark.parametrize("first", ["patch", "adapters"])
def test_merged_adapters(first: str) -> None:
    expected = by_peft(training("llama")).merge_and_unload()
    model = training("llama")
    if first == "patch":
        fully(model)
    model = by_peft(model)
    if first == "adapters":
        swathe.hf.patch(model)
    merged = model.merge_and_unload()
    assert not any("lora" in name for name in merged.state_dict())
    states = (m.state_dict() for m in (merged, expected))
    torch.testing.assert_close(*states, rtol=0, atol=0)
    for one in (merged, expected):
        one.requires_grad_(True)
    assert_equal(step(merged), step(expected))
    swathe.hf.unpatch(merged)
    assert_equal(step(merged), step(expected))
    assert all(
        type(a) is type(b) for a, b in zip(merged.modules(), expected.modules(), strict=True)
    )


@needs_peft
def test_adapters_saved_and_loaded(tmp_path: Any) -> None:
    import peft

    model = training("llama")
    fully(model)
    adapted = by_peft(model)
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    expected = adapted.eval()(batch()["input_ids"]).logits
    loaded: Any = peft.PeftModel.from_pretrained(training("llama"), str(tmp_path)).eval()
    torch.testing.assert_close(loaded(batch()["input_ids"]).logits, expected, rtol=1e-5, atol=1e-5)
    again = training("llama")
    fully(again)
    loaded = peft.PeftModel.from_pretrained(again, str(tmp_path)).eval()
    torch.testing.assert_close(loaded(batch()["input_ids"]).logits, expected, rtol=1e-5, atol=1e-5)


@needs_peft
def test_disabled_adapters_leave_the_base() -> None:
    expected = training("llama").eval()(**batch())
    model = training("llama")
    fully(model, "eager")
    adapted: Any = by_peft(model).eval()
    with adapted.disable_adapter():
        off = adapted(**batch())
    torch.testing.assert_close(off.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(adapted(**batch()).logits, expected.logits)


class Int8Linear(nn.Module):
    """A Linear with its weight in int8 and a scale a row, as quantisers put it in its place."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        return x @ (weight.to(x.dtype) * self.scale).t()


def quantised(model: Any, leave_head: bool = False) -> Any:
    for path, part in list(model.named_modules()):
        if type(part) is nn.Linear and not (leave_head and path == "lm_head"):
            holder, _, name = path.rpartition(".")
            setattr(model.get_submodule(holder), name, Int8Linear(part))
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leave_head", [True, False], ids=["head kept", "head too"])
def test_quantised_linears_are_left_alone(leave_head: bool, backend: str) -> None:
    own = step(quantised(training("qwen3"), leave_head))
    model = quantised(training("qwen3"), leave_head)
    kept = {path: part for path, part in model.named_modules() if isinstance(part, Int8Linear)}
    held = {path: dict(vars(part)) for path, part in kept.items()}
    report = swathe.hf.patch(model, backend=backend)
    lazy = leave_head and backend == "eager"
    loss = "linear_cross_entropy" if lazy else "cross_entropy"
    assert ops_of(report) == {*OPS, loss}, report
    for path, part in kept.items():
        assert model.get_submodule(path) is part and type(part) is Int8Linear
        assert vars(part) == held[path]
    assert_equal(step(model), own)


def test_a_head_quantised_after_the_patch_is_called() -> None:
    own = step(quantised(training("llama")))
    model = training("llama")
    fully(model, "eager")
    assert_equal(step(quantised_after(model)), own)


def quantised_after(model: Any) -> Any:
    """Quantisers go by isinstance, and do not mind a subclass."""
    for path, part in list(model.named_modules()):
        if isinstance(part, nn.Linear):
            holder, _, name = path.rpartition(".")
            setattr(model.get_submodule(holder), name, Int8Linear(part))
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning")
def test_dynamic_quantisation() -> None:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no quantised kernels")
    quantise = torch.ao.quantization.quantize_dynamic
    plain = quantise(training("llama").eval(), {nn.Linear}, dtype=torch.qint8)
    model = copy.deepcopy(plain)
    report = swathe.hf.patch(model)
    assert ops_of(report) >= OPS - {"gated_mlp_act"}, report
    with torch.no_grad():
        ours, theirs = (m(batch()["input_ids"]).logits for m in (model, plain))
    # what is quantised are activations: a rounding may be a step of 1 in 127
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())
