"""Models of transformers whose rotary functions are ours."""

from __future__ import annotations

import copy
import pickle
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

from swathe.modeling.hf.patching import rotary_forms, rotations
from swathe.modeling.hf.patching.options import Options

# calls of the op in one forward of two layers
MODELS = {
    "llama": 2,
    "qwen3": 2,
    "gemma2": 2,
    "gemma3_text": 2,
    "phi3": 2,
    "gptj": 4,
    "glm": 2,
    "cohere": 2,
    "deepseek_v2": 2,
    "deepseek_v3": 2,
    "llama4_text": 2,
    "olmo2": 2,
    "gpt_oss": 2,
    "nanochat": 2,
    "gpt_neox": 2,
}


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_model_computes_what_it_did(
    model_type: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny(model_type, dtype), token_ids()
    own = outcome(model, ids)
    model.zero_grad()
    before = state(model)
    undo, found, _ = apply(model, rotations)
    assert found and not leftovers(found)
    calls = counted(monkeypatch, (rotary_forms, "rotary"))
    ours = outcome(model, ids)
    assert len(calls) == MODELS[model_type]
    if dtype == torch.float32:
        assert_equal(ours, own)
    else:
        assert_as_good(ours, own, gold(tiny(model_type, dtype), ids))
    undo.restore()
    model.zero_grad()
    assert state(model) == before


def test_another_model_of_the_class_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    patched, other, ids = tiny("llama"), tiny("llama"), token_ids()
    apply(patched, rotations)
    calls = counted(monkeypatch, (rotary_forms, "rotary"))
    other(ids)
    assert not calls
    patched(ids)
    assert len(calls) == 2


def test_a_wrong_op_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama"), token_ids()
    own = outcome(model, ids)
    apply(model, rotations)
    real = rotary_forms.rotary

    def negated(q: Tensor, k: Any, cos: Tensor, sin: Tensor, **kwargs: Any) -> Any:
        return real(q, k, cos, -sin, **kwargs)

    monkeypatch.setattr(rotary_forms, "rotary", negated)
    with pytest.raises(AssertionError):
        assert_equal(outcome(model, ids), own)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_copies_and_pickles_stay_patched(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny(model_type), token_ids()
    own = outcome(model, ids)
    apply(model, rotations)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    calls = counted(monkeypatch, (rotary_forms, "rotary"))
    for made in copies:
        calls.clear()
        assert_equal(outcome(made, ids), own)
        assert len(calls) == 2
        assert list(made.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("model_type", ["llama", "gptj", "llama4_text"])
def test_one_graph_with_the_op_in_it(model_type: str) -> None:
    model, other, ids = tiny(model_type), tiny(model_type), token_ids()
    own = model(ids, use_cache=False).logits
    apply(model, rotations)
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.EagerAndRecordGraphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with torch.no_grad():
        ours = compiled(ids, use_cache=False).logits
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
    (graph,) = graphs.graphs
    ops = [n for n in graph.graph.nodes if str(n.target).startswith("swathe.rotary")]
    assert BACKEND == "eager" or len(ops) == MODELS[model_type]
    # and with a backward
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_equal(outcome(compiled, ids), outcome(model, ids))
    # the class that was not patched is compiled beside it
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, own)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, ids = tiny("llama"), token_ids()
    model.train()
    own = outcome(model, ids)
    apply(model, rotations)
    model.enable_input_require_grads()
    checkpoint(model, reentrant)
    assert_equal(outcome(model, ids), own)


def test_decoding_with_a_cache_is_as_before() -> None:
    model, ids = tiny("qwen3"), token_ids()
    given: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    own = model.generate(ids, **given)
    apply(model, rotations)
    assert torch.equal(model.generate(ids, **given), own)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.head_dim = 8

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = self.proj(x)
        q, k = apply_rotary(q, q, cos, sin)  # noqa: F821  (a global that is set below)
        return q + k


def test_a_function_without_a_form_leaves_the_module_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(Attention())

    def shifted(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return q * cos + sin + 1, k * cos + sin + 1

    monkeypatch.setitem(globals(), "apply_rotary", shifted)
    rotations.rotary_calls.cache_clear()
    (left,) = rotations.find(model, Options(backend=BACKEND))
    assert left.path == "0" and "apply_rotary" in str(left.reason)
    rotations.rotary_calls.cache_clear()


def test_a_forward_of_the_instance_leaves_the_module_alone() -> None:
    model = tiny("llama")
    attention = model.model.layers[0].self_attn
    attention.forward = attention.forward
    found = rotations.find(model, Options(backend=BACKEND))
    assert leftovers(found) == [
        ("model.layers.0.self_attn", "its forward was overridden on the instance")
    ]


def test_it_can_be_switched_off() -> None:
    assert rotations.find(tiny("llama"), Options(rope=False)) == []
