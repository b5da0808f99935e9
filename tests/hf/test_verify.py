"""swathe.verify catches what it says it catches: one planted fault for each."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import ModelOutput

import swathe
from support.tiny_causal import TINY, batch, tiny, with_lora
from swathe.hf import from_hf, patch, unpatch, verify
from swathe.modeling.hf.verification import Verification, VerificationError


def padded() -> dict[str, Tensor]:
    inputs = batch(2, 10)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :3] = 0
    mask[1, -2:] = 0
    ids = inputs["input_ids"].masked_fill(mask == 0, 0)
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": mask}


def twins(name: str = "llama", **more: Any) -> tuple[Any, Any]:
    """Two models with the same parameters."""
    model = tiny(name, **more)
    return model, copy.deepcopy(model)


def failed(found: Verification) -> dict[str, str]:
    return {f"{c.kind} {c.name}": c.failure for c in found.failures if c.failure}


def altered(module: nn.Module, change: Callable[[Any], Any]) -> None:
    """Let a module's output be another one."""
    own = module.forward
    module.forward = lambda *args, **kwargs: change(own(*args, **kwargs))  # type: ignore[method-assign]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "gpt2"])
def test_a_patched_model_passes(name: str, dtype: torch.dtype) -> None:
    model = tiny(name, dtype)
    report = patch(model, backend="cpp" if name != "gpt2" else "auto")
    assert report.patched
    found = verify(model, padded())
    assert found and found.ok, str(found)
    found.raise_for_errors()
    assert f"the same {type(model).__name__} unpatched" in str(found)
    assert "the reference in float64" in str(found)
    assert "labels that stand at padding, or right after it, were ignored" in found.notes
    kinds = [check.kind for check in found.checks]
    assert {"output", "loss", "gradient", "padding"} <= set(kinds)
    names = [check.name for check in found.checks if check.kind == "gradient"]
    assert names == [name for name, _ in model.named_parameters()]


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("llama", tie_word_embeddings=True)
    patch(model, backend="cpp")
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    model(**batch()).loss.backward()
    modules = list(model.modules())
    state = [(type(m), dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in modules]
    values = [t.clone() for t in [*model.parameters(), *model.buffers()]]
    grads = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    random = torch.get_rng_state()
    found = verify(model, padded())
    assert found.ok and "model.norm.weight" not in str(found)
    assert torch.equal(random, torch.get_rng_state())
    for module, (cls, attributes, parameters, buffers) in zip(modules, state, strict=True):
        assert type(module) is cls and vars(module) == attributes
        for held, before in ((module._parameters, parameters), (module._buffers, buffers)):
            assert held.keys() == before.keys()
            assert all(held[name] is before[name] for name in before)
    for t, value in zip([*model.parameters(), *model.buffers()], values, strict=True):
        assert torch.equal(t, value)
    for p, (grad, value) in zip(model.parameters(), grads, strict=True):
        assert p.grad is grad and (value is None or torch.equal(p.grad, value))
    assert list(model.modules()) == modules
    assert swathe.verify is verify
    assert patch(model).note.startswith("it was patched already")
    unpatch(model)
    assert type(model.model.norm) is transformers.models.llama.modeling_llama.LlamaRMSNorm


def test_a_table_worst_first_and_json() -> None:
    model, reference = twins()
    altered(model.model.layers[1].mlp, lambda y: y * 1.01)
    found = verify(model, padded(), reference=reference)
    assert not found
    lines = str(found).splitlines()
    assert lines[0].split() == ["check", "name", "error", "reference's", "ratio", "failure"]
    order = [check.failure is None for check in found.worst_first()]
    assert order == sorted(order) and not order[0]
    assert f"{len(found.failures)} of {len(found.checks)} checks failed" in str(found)
    made = json.loads(found.to_json())
    assert made["ok"] is False and made["schema"] == 1
    assert made["checks"][0]["name"] == "logits" and made["checks"][0]["ratio"] > 4
    with pytest.raises(VerificationError, match=r"gradient model\.embed_tokens\.weight"):
        found.raise_for_errors()


def test_a_small_error_is_one() -> None:
    """One part in 10^5 is far above fp32's rounding, and far below bf16's."""
    for dtype, ok in ((torch.float32, False), (torch.bfloat16, True)):
        model, reference = twins(dtype=dtype)
        altered(model.model.norm, lambda y: y * (1 + 1e-5))
        assert verify(model, padded(), reference=reference).ok is ok


def test_a_gradient_that_vanished() -> None:
    for gone in (lambda y: y.detach(), lambda y: y.detach() + 0 * y):
        model, reference = twins()
        altered(model.model.layers[0].self_attn.v_proj, gone)
        found = failed(verify(model, padded(), reference=reference))
        name = "model.layers.0.self_attn.v_proj"
        assert found[f"gradient {name}.weight"] == (
            f"vanished: its module '{name}' is bypassed, or what it computes no longer reaches the "
            "loss"
        )
        assert not any(key.startswith(("output", "loss")) for key in found)


def test_a_gradient_that_appeared() -> None:
    model, reference = twins()
    altered(reference.model.layers[0].mlp.up_proj, lambda y: y.detach())
    found = failed(verify(model, padded(), reference=reference))
    assert found["gradient model.layers.0.mlp.up_proj.weight"] == (
        "appeared, the reference has none"
    )


def test_an_adapter_that_was_bypassed() -> None:
    """As patchers do that compute the loss from lm_head.weight: right in evaluation."""
    model, reference = (with_lora(m) for m in twins())

    def bypassing(x: Tensor) -> Tensor:
        head = model.lm_head
        return head.base_layer(x) if model.training else type(head).forward(head, x)

    model.lm_head.forward = bypassing
    found = failed(verify(model, padded(), reference=reference))
    text = found["gradient lm_head.lora_B.weight"]
    assert text.startswith("vanished: the adapter 'lm_head.lora_B' is bypassed")
    assert "loss loss" in found and "output logits" not in found
    del model.lm_head.forward
    patch(model, backend="cpp")
    assert verify(model, padded()).ok


def blinded(model: Any) -> Any:
    """Positions still follow the mask, but hidden tokens are attended to."""
    own = type(model.model).forward

    def blind(input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        return own(model.model, input_ids, None, **{**kwargs, "position_ids": positions})

    model.model.forward = blind
    return model


def test_a_mask_that_was_ignored() -> None:
    model, reference = twins()
    found = failed(verify(blinded(model), padded(), reference=reference))
    assert "the mask is ignored" in found["padding logits"]
    # both ignore it: nobody's fault, but worth saying
    seen = verify(model, padded(), reference=blinded(reference))
    assert seen.ok and "logits: padding moves real tokens in the reference too" in seen.notes


def test_attention_of_ours_is_compared_with_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def wrong(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        return own(module, q, k, v, None, **kwargs, is_causal=True)

    for attention, ok in ((own, True), (wrong, False)):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "swathe", attention)
        model = tiny("llama")
        masks = AttentionMaskInterface._global_mapping
        monkeypatch.setitem(masks, "swathe", masks["sdpa"])
        model.config._attn_implementation_internal = "swathe"
        found = verify(model, padded())
        assert found.ok is ok, str(found)
        assert found.reference == "the same LlamaForCausalLM with attn_implementation 'eager'"
        assert model.config._attn_implementation == "swathe"
    assert "the mask is ignored" in failed(found)["padding logits"]


def test_a_reference_that_does_not_run_in_fp64() -> None:
    def narrow(module: Any, args: Any) -> None:
        if args[0].dtype == torch.float64:
            raise RuntimeError("not in double")

    model, reference = twins(dtype=torch.bfloat16)
    reference.lm_head.register_forward_pre_hook(narrow)
    found = verify(model, padded(), reference=reference)
    assert found.ok and found.yardstick == "the reference in float32"
    altered(model.model.layers[0].mlp, lambda y: 1.2 * y)
    assert not verify(model, padded(), reference=reference).ok
    model, reference = twins()
    reference.lm_head.register_forward_pre_hook(narrow)
    with pytest.raises(RuntimeError, match=r"in a wider dtype.*float64: not in double"):
        verify(model, padded(), reference=reference)


def test_what_stands_at_padding_does_not_matter() -> None:
    model, reference = twins()
    real = padded()["attention_mask"].bool()[..., None]
    altered(model.model.norm, lambda y: torch.where(real, y, 0.0))
    found = verify(model, padded(), reference=reference)
    assert found.ok, str(found)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float) -> None:
    model, reference = twins()

    def poison(y: Tensor) -> Tensor:
        return torch.where(torch.arange(y.shape[-1]) == 5, value, y)

    altered(model.lm_head, poison)
    found = failed(verify(model, batch(), reference=reference))
    text = "has NaN or infinity where the reference has none"
    assert found["output logits"] == found["loss loss"] == text


def test_outputs_of_another_kind() -> None:
    model, reference = twins(dtype=torch.bfloat16)
    altered(model.lm_head, lambda y: y.float())
    found = failed(verify(model, batch(), reference=reference))
    assert found["output logits"] == ("is float32 (2, 9, 64), the reference's bfloat16 (2, 9, 64)")
    model, reference = twins()
    own = model.forward
    model.forward = lambda **kwargs: ModelOutput(loss=own(**kwargs).loss)
    found = failed(verify(model, batch(), reference=reference))
    assert found == {"output logits": "is missing, the reference has it"}


def test_a_parameter_that_changes_or_differs() -> None:
    model, reference = twins()
    weight = model.model.layers[0].mlp.up_proj.weight

    def writing(y: Tensor) -> Tensor:
        weight.data.mul_(1.0 + 1e-7)
        return y

    altered(model.model.layers[0].mlp.up_proj, writing)
    found = failed(verify(model, batch(), reference=reference))
    assert found["parameter model.layers.0.mlp.up_proj.weight"] == "the forward changed it"
    model, reference = twins()
    with torch.no_grad():
        reference.model.norm.weight[3] += 1e-3
    found = failed(verify(model, batch(), reference=reference))
    assert found["parameter model.norm.weight"] == "has other values than in the reference"


def test_dropout_is_off_where_it_can_be() -> None:
    model = tiny("llama")
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    patch(model, backend="cpp")
    found = verify(model, padded())
    assert found.ok, str(found)
    assert not any("dropout" in note for note in found.notes)
    assert model.model.layers[0].self_attn.attention_dropout == 0.5

    noisy, reference = twins()
    for m in (noisy, reference):
        drop = nn.functional.dropout
        altered(m.model.norm, lambda y, m=m, drop=drop: drop(y, 0.5, m.model.norm.training))
    found = verify(noisy, padded(), reference=reference)
    assert found.ok, str(found)
    assert "a dropout cannot be turned off: loss and gradients are those of evaluation" in (
        found.notes
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_off_meanwhile(reentrant: bool) -> None:
    model = tiny("llama")
    patch(model, backend="cpp")
    model.config.use_cache = False
    name = "activation_checkpointing_enable"  # in 5.10 by its older name
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    assert verify(model, padded()).ok
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_our_own_models() -> None:
    theirs = tiny("llama")
    ours: Any = from_hf(theirs)
    found = verify(ours, padded(), reference=theirs)
    assert found.ok, str(found)
    found = verify(ours, padded())
    assert found.ok, str(found)
    assert "with eager kernels" in found.reference
    altered(ours.model.layers[0].mlp, lambda y: 1.01 * y)
    assert not verify(ours, padded(), reference=theirs).ok


def test_encoders() -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.BertConfig(**sizes, num_attention_heads=4, vocab_size=64)
    torch.manual_seed(0)
    model: Any = transformers.BertForMaskedLM(config)
    reference = copy.deepcopy(model)
    found = verify(model, padded(), reference=reference)
    assert found.ok and [c for c in found.checks if c.kind == "padding"], str(found)
    own = model.bert.encoder.layer[0].attention.self.value
    altered(own, lambda y: y * 1.001)
    assert "output logits" in failed(verify(model, padded(), reference=reference))


def test_what_cannot_be_verified() -> None:
    model = tiny("llama")
    inputs = batch()
    without = {"input_ids": inputs["input_ids"]}
    cases: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
        ("model", inputs, {}, TypeError, "given a str; it takes a model"),
        (model, [1], {}, TypeError, "batch is a list; it must be a mapping"),
        (model, without, {}, ValueError, "but no labels"),
        (model, inputs, {}, ValueError, "neither patched nor runs attention of swathe"),
        (model, inputs, {"reference": tiny("phi3")}, ValueError, "in one of the models only"),
        (
            model,
            inputs,
            {"reference": tiny("llama", intermediate_size=40)},
            ValueError,
            r"is \(48, 32\).*in the reference \(40, 32\)",
        ),
    ]
    for given, arguments, options, error, text in cases:
        with pytest.raises(error, match=text):
            verify(given, arguments, **options)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**{**TINY, "num_hidden_layers": 1}))
    bert.forward = lambda input_ids, labels: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"no argument 'label_ids' \(did you mean 'labels'"):
        verify(bert, {"input_ids": inputs["input_ids"], "label_ids": 0})
    with pytest.raises(ValueError, match="gave no loss for this batch"):
        verify(bert, inputs, reference=copy.deepcopy(bert))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="requires a gradient"):
        verify(model, inputs)
