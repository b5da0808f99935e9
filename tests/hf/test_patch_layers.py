"""Models with residual sums and the norms after them in one call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from support.hf_patching import (
    BACKEND,
    apply,
    assert_as_good,
    assert_equal,
    checkpoint,
    counted,
    gold,
    leftovers,
    outcome,
    state,
    tiny,
    token_ids,
)

pytest.importorskip("transformers")

from swathe.modeling.hf.patching import layers, norms, qk_norms, rotations
from swathe.modeling.hf.patching.options import Options
from swathe.modeling.hf.patching.prove import prove
from swathe.modeling.hf.patching.swaps import is_fused

# joined calls in one forward of two layers; types with none have no norm right after a sum
MODELS = {
    "llama": 2,
    "qwen3": 2,
    "gemma2": 2,
    "gemma3_text": 2,
    "phi3": 2,
    "glm": 2,
    "glm4": 2,
    "granite": 2,
    "deepseek_v3": 2,
    "gpt_oss": 2,
    "nanochat": 2,
    "gpt_neox": 2,
    "olmo2": 0,
    "cohere": 0,
    "gptj": 0,
}
CALLS = ((layers, "rms_norm"), (layers, "layer_norm"))


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_model_computes_what_it_did(
    model_type: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny(model_type, dtype), token_ids()
    own = outcome(model, ids)
    model.zero_grad()
    before = state(model)
    undo, found, _ = apply(model, layers)
    assert len(found) == MODELS[model_type] and not leftovers(found)
    calls = counted(monkeypatch, *CALLS)
    ours = outcome(model, ids)
    assert len(calls) == MODELS[model_type]
    if dtype == torch.float32:
        assert_equal(ours, own, 1e-4)
    else:
        assert_as_good(ours, own, gold(tiny(model_type, dtype), ids))
    undo.restore()
    model.zero_grad()
    assert state(model) == before


def test_another_model_of_the_class_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    patched, other, ids = tiny("llama"), tiny("llama"), token_ids()
    apply(patched, layers)
    calls = counted(monkeypatch, *CALLS)
    other(ids)
    assert not calls
    patched(ids)
    assert len(calls) == 2


def residual_lost(a: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return a, layers_call(a, b, *rest)[1]


def norm_of_the_residual(a: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return a + b, layers_call(a, b * 0, *rest)[1]


def sum_detached(a: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    total, normed = layers_call(a, b, *rest)
    return total.detach(), normed


layers_call: Callable[..., tuple[Tensor, Tensor]] = layers._rms_call


@pytest.mark.parametrize("bug", [residual_lost, norm_of_the_residual, sum_detached])
def test_the_proof_catches_a_wrong_call(
    bug: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = tiny("llama").model.norm
    form = layers.norm_form(norm)
    assert form is not None
    monkeypatch.setattr(layers, "_rms_call", bug)
    proof = prove(layers._SumAndNorm(norm), layers._fused(form, BACKEND), layers._calls(norm, form))
    assert proof.failure is not None


class _Watched(nn.Module):
    """An adapter around a norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(x)
        return found * 1.5


def hook_it(norm: nn.Module) -> None:
    norm.register_forward_hook(lambda _, __, output: output * 1.5)


def prehook_it(norm: nn.Module) -> None:
    norm.register_forward_pre_hook(lambda _, args: (args[0] + 1.5,))


def override_it(norm: nn.Module) -> None:
    forward = norm.forward
    norm.forward = lambda x: forward(x) * 1.5  # type: ignore[method-assign]


CHANGES_OF_A_NORM = [hook_it, prehook_it, override_it, "adapter"]


@pytest.mark.parametrize("change", CHANGES_OF_A_NORM)
def test_what_hangs_on_a_norm_is_not_bypassed(change: Any) -> None:
    model, plain, ids = tiny("llama"), tiny("llama"), token_ids()
    apply(model, layers)
    change_both(change, model, plain)
    assert_equal(outcome(model, ids), outcome(plain, ids))


@pytest.mark.parametrize("change", [hook_it, override_it])
def test_a_bypassed_hook_would_show(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain, ids = tiny("llama"), tiny("llama"), token_ids()
    apply(model, layers)
    change_both(change, model, plain)
    monkeypatch.setattr(layers, "hooked", lambda _: False)
    with pytest.raises(AssertionError):
        assert_equal(outcome(model, ids), outcome(plain, ids))


def change_both(change: Any, *models: Any) -> None:
    for model in models:
        layer = model.model.layers[0]
        if change == "adapter":
            layer.post_attention_layernorm = _Watched(layer.post_attention_layernorm)
        else:
            change(layer.post_attention_layernorm)


def test_hidden_states_are_captured_as_before() -> None:
    model, ids = tiny("gemma2"), token_ids()
    own = model(ids, output_hidden_states=True).hidden_states
    apply(model, layers)
    ours = model(ids, output_hidden_states=True).hidden_states
    assert len(ours) == len(own) == 3
    for a, b in zip(ours, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_copies_and_pickles_stay_patched(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny(model_type), token_ids()
    apply(model, layers, rotations)
    ours = outcome(model, ids)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    calls = counted(monkeypatch, *CALLS)
    for made in copies:
        calls.clear()
        assert_equal(outcome(made, ids), ours)
        assert len(calls) == 2
        assert list(made.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("finders", [(layers,), (norms, rotations, layers)], ids=["alone", "all"])
def test_one_graph_with_the_op_in_it(model_type: str, finders: tuple[Any, ...]) -> None:
    model, other, ids = tiny(model_type), tiny(model_type), token_ids()
    own = model(ids, use_cache=False).logits
    apply(model, *finders)
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.EagerAndRecordGraphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with torch.no_grad():
        ours = compiled(ids, use_cache=False).logits
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)
    (graph,) = graphs.graphs
    ops = [n for n in graph.graph.nodes if str(n.target).startswith("swathe.add_")]
    assert BACKEND == "eager" or len(ops) == MODELS[model_type]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_equal(outcome(compiled, ids), outcome(model, ids))
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, own)


def test_a_hook_is_seen_in_a_graph() -> None:
    # one that comes after the compilation is not, with stock models either: torch's default
    model, ids = tiny("llama"), token_ids()
    apply(model, layers)
    before = model(ids, use_cache=False).logits
    change_both(hook_it, model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    after = compiled(ids, use_cache=False).logits
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama"), token_ids()
    model.train()
    own = outcome(model, ids)
    apply(model, layers)
    model.enable_input_require_grads()
    checkpoint(model, reentrant)
    calls = counted(monkeypatch, *CALLS)
    assert_equal(outcome(model, ids), own)
    assert len(calls) == 4  # each layer twice


def test_norms_that_are_patched_themselves_are_joined_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for order in ((norms, layers), (layers, norms)):
        with monkeypatch.context() as patch:
            model, ids = tiny("llama"), token_ids()
            own = outcome(model, ids)
            undo, _, _ = apply(model, *order)
            calls = counted(patch, *CALLS)
            assert_equal(outcome(model, ids), own)
            assert len(calls) == 2
            undo.restore()
            assert not any(is_fused(type(module)) for module in model.modules())


def test_triton_serves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"  # there it is interpreted
    model, ids = tiny("qwen3", num_hidden_layers=1).to(device), token_ids(5).to(device)
    own = outcome(model, ids)
    _, found, _ = apply(model, qk_norms, layers, backend="triton")
    assert {(c.op, c.backend) for c in found} == {
        ("qk_norm_rotary", "triton"),
        ("residual_norm", "triton"),
    }
    calls = counted(monkeypatch, *CALLS)
    assert_equal(outcome(model, ids), own, 1e-4)
    assert calls == ["rms_norm"]


def test_it_can_be_switched_off() -> None:
    assert layers.find(tiny("llama"), Options(residual=False)) == []
