"""Residual sums joined with the norms after them: the source that is rewritten, and models."""

from __future__ import annotations

import copy
import inspect
import pickle
import traceback
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

from swathe.modeling.hf.patching import layers, norms, rotations
from swathe.modeling.hf.patching.options import Options
from swathe.modeling.hf.patching.prove import prove
from swathe.modeling.hf.patching.rewriting import Unreadable, in_place, rewritten, sites
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
TANH = "torch.tanh(self.norm(h))"
CALLS = ((layers, "rms_norm"), (layers, "layer_norm"))


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(
            x.dtype
        )


class Layer(nn.Module):
    flag = True

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2, self.norm3 = Norm(), Norm(), Norm()
        self.dropout, self.factor = nn.Dropout(0.5), 0.25

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError


class Stock(Layer):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = x + y
        residual = h
        h = self.norm(h)
        h = h * 2
        h = residual + h
        return h


class Scaled(Layer):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = x + self.dropout(y) * self.factor
        residual = h
        h = h + torch.tanh(self.norm(h))
        return residual + self.norm2(h)


class Inline(Layer):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.norm(self.norm2(x + y) + y)


class Branches(Layer):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.flag:
            h = x + y
            h = self.norm(h)
        else:
            h = x + y
            h = self.norm2(h)
        h = h + y
        if y is not None:
            h = self.norm3(h)
        return h


class Sometimes(Layer):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = x + y
        z = self.norm(h) if self.training else h
        h = z + y
        h = h * 2
        h = self.norm2(h)
        return h


class InPlace(Layer):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = x * 1
        h += y
        h = self.norm(h)
        return h


class Inherits(Stock):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = super().forward(x, y) + y
        h = self.norm2(h)
        return h


class Keywords(Layer):
    def forward(self, x: Tensor, y: Tensor | None = None, *, z: float = 2.0, **more: Any) -> Tensor:
        h = x + (y if y is not None else x) * z
        h = self.norm(h)
        return h + more.get("w", 0)


class Fails(Layer):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = x + y
        h = self.norm(h)
        raise LookupError("what the layer says")


def found_sites(cls: type[nn.Module]) -> list[str]:
    return [site.text for site in sites(cls.forward)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cls", "texts"),
    [
        (Stock, ["self.norm(x + y)"]),
        (Scaled, ["self.norm(x + self.dropout(y) * self.factor)", f"self.norm2(h + {TANH})"]),
        (Inline, ["self.norm(self.norm2(x + y) + y)", "self.norm2(x + y)"]),
        (Branches, ["self.norm(x + y)", "self.norm2(x + y)"]),
        (Sometimes, []),
        (InPlace, []),
        (Inherits, ["self.norm2(super().forward(x, y) + y)"]),
    ],
)
def test_sums_and_norms_are_found(cls: type[nn.Module], texts: list[str]) -> None:
    assert found_sites(cls) == texts


def test_a_sum_in_place_is_named() -> None:
    assert in_place(InPlace.forward) == ("norm",)  # type: ignore[arg-type]
    (left,) = layers.find(nn.Sequential(InPlace()), Options(backend=BACKEND))
    assert left.reason == "the sum that norm takes is made in place"


@pytest.mark.parametrize("cls", [Stock, Scaled, Inline, Branches, Inherits, Keywords])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_rewritten_layer_computes_what_it_did(
    cls: type[Layer], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(cls()).to(dtype)
    inputs = [torch.randn(2, 3, 8, dtype=dtype, requires_grad=True) for _ in range(2)]
    wanted = run(model[0], inputs)
    undo, found, _ = apply(model, layers)
    assert not leftovers(found)
    calls = counted(monkeypatch, *CALLS)
    ours = run(model[0], inputs)
    assert len(calls) == (2 if cls in (Inline, Scaled) else 1)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0.03 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
    undo.restore()
    assert type(model[0]) is cls


def run(layer: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(3)
    y = layer(*inputs)
    return [y, *torch.autograd.grad(y.sum(), [*inputs, *used(layer)], allow_unused=False)]


def used(layer: nn.Module) -> list[Tensor]:
    return [layer.norm.weight] if type(layer).__name__ != "Inherits" else [layer.norm2.weight]  # type: ignore[union-attr]


def test_flags_choose_the_branch() -> None:
    layer = Branches()
    assert [site.norm for site in sites(Branches.forward) if site.reached(layer)] == ["norm"]  # type: ignore[arg-type]
    layer.flag = False
    assert [site.norm for site in sites(Branches.forward) if site.reached(layer)] == ["norm2"]  # type: ignore[arg-type]


def test_the_signature_and_the_defaults_stay() -> None:
    model = nn.Sequential(Keywords())
    x, w = torch.randn(3, 8), torch.randn(3, 8)
    wanted = [model[0](x), model[0](x, w, z=3.0), model[0](x, y=w, w=w)]
    before = inspect.signature(Keywords.forward)
    apply(model, layers)
    layer = model[0]
    assert is_fused(type(layer)) and inspect.signature(type(layer).forward) == before
    for ours, theirs in zip(
        [layer(x), layer(x, w, z=3.0), layer(x, y=w, w=w)], wanted, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_tracebacks_show_the_new_source() -> None:
    model = nn.Sequential(Fails())
    apply(model, layers)
    with pytest.raises(LookupError) as caught:
        model[0](torch.randn(1, 8), torch.randn(1, 8))
    shown = "".join(traceback.format_exception(caught.value))
    assert "raise LookupError('what the layer says')" in shown and "sums joined with norm" in shown
    assert "add_norm" in inspect.getsource(type(model[0]).forward)


def test_what_was_normed_does_not_live_on() -> None:
    new = rewritten(Stock.forward, {"norm": lambda norm, a, b: (a + b, norm(a + b))}, "<new>")  # type: ignore[arg-type]
    assert "del _swathe_normed_0" in inspect.getsource(new)


def test_without_a_source_it_is_left_alone() -> None:
    names: dict[str, Any] = {"Layer": Layer}
    body = "  def forward(self, x, y):\n    h = x + y\n    h = self.norm(h)\n    return h\n"
    exec("class Hidden(Layer):\n" + body, names)
    (left,) = layers.find(nn.Sequential(names["Hidden"]()), Options(backend=BACKEND))
    assert left.reason == "its source is not to be had"


def test_another_source_than_what_runs_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    sites.cache_clear()
    monkeypatch.setattr(inspect, "getsource", lambda _: "def forward(self, x, y):\n    return x\n")
    with pytest.raises(Unreadable, match="not what it was compiled of"):
        sites(Stock.forward)  # type: ignore[arg-type]
    sites.cache_clear()


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


def test_shapes_that_broadcast_go_the_old_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Stock())
    x, y = torch.randn(2, 3, 8), torch.randn(1, 3, 8)
    wanted = model[0](x, y)
    apply(model, layers)
    calls = counted(monkeypatch, *CALLS)
    assert torch.equal(model[0](x, y), wanted)
    assert torch.equal(
        model[0](x.bfloat16(), y.expand(2, 3, 8)), Stock.forward(model[0], x.bfloat16(), y)
    )
    assert not calls


def test_it_can_be_switched_off() -> None:
    assert layers.find(tiny("llama"), Options(residual=False)) == []
