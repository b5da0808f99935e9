"""Norms of q and k and the rotary function after them as one call: sources and models."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import replace
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

from swathe.modeling.hf.patching import norms, qk_norms, rotary_forms, rotations
from swathe.modeling.hf.patching.delaying import Site, sites
from swathe.modeling.hf.patching.options import Options
from swathe.modeling.hf.patching.rebinding import wrappers
from swathe.modeling.hf.patching.swaps import is_fused

# calls of qk_norm_rotary and of rotary in one forward of two layers
MODELS = {
    "qwen3": (2, 0),
    "gemma3_text": (2, 0),
    "gemma4_text": (4, 0),
    "laguna": (2, 0),
    "lfm2": (2, 0),
    "exaone4": (0, 2),
    "hunyuan_v1_dense": (0, 2),
    "llama": (0, 2),
    "nanochat": (0, 2),
    "olmo2": (0, 2),
}
CALLS = ((qk_norms, "qk_norm_rotary"), (rotary_forms, "rotary"))
TURNED = (("rotate", ("q", "k", "cos", "sin"), 2), ("rotate_one", ("x", "cos", "sin"), 1))
HALF = Site("rotate_one", ("k_norm",))


class Straight(nn.Module):
    def forward(self, q: Any, k: Any, cos: Any, sin: Any) -> Any:
        q = self.q_norm(q * 2).transpose(1, 2)
        k = self.k_norm(k)
        v = k_proj(cos)  # noqa: F821
        q, k = rotate(q, k, cos, sin)  # noqa: F821
        return q, k, v


class One(nn.Module):
    def forward(self, q: Any, k: Any, cos: Any, sin: Any) -> Any:
        if q is None:
            k = self.k_norm(k)
            k = rotate_one(k, sin=sin, cos=cos)  # noqa: F821
        return k


class ReadBetween(nn.Module):
    def forward(self, q: Any, k: Any, cos: Any, sin: Any) -> Any:
        q = self.q_norm(q)
        k = self.k_norm(k)
        seen = q.sum()
        q, k = rotate(q, k, cos, sin)  # noqa: F821
        return q, k, seen


class Reshaped(nn.Module):
    def forward(self, q: Any, k: Any, cos: Any, sin: Any) -> Any:
        q = self.q_norm(q)
        k = self.k_norm(k)
        q = q.view(1, 2, 3)
        q, k = rotate(q, k, cos, sin)  # noqa: F821
        return q, k


class Sometimes(nn.Module):
    def forward(self, q: Any, k: Any, cos: Any, sin: Any) -> Any:
        q = self.q_norm(q)
        k = self.k_norm(k)
        if cos is not None:
            q, k = rotate(q, k, cos, sin)  # noqa: F821
        return q, k


class NormedAfter(nn.Module):
    def forward(self, q: Any, k: Any, cos: Any, sin: Any) -> Any:
        q, k = rotate(q, k, cos, sin)  # noqa: F821
        return self.q_norm(q), self.k_norm(k)


@pytest.mark.parametrize(
    ("cls", "found"),
    [
        (Straight, (Site("rotate", ("q_norm", "k_norm")),)),
        (One, (HALF,)),
        (ReadBetween, ()),
        (Reshaped, ()),
        (Sometimes, ()),
        (NormedAfter, ()),
    ],
)
def test_where_norms_may_wait(cls: Any, found: tuple[Site, ...]) -> None:
    assert sites(cls.forward, TURNED) == found


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_model_computes_what_it_did(
    model_type: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny(model_type, dtype), token_ids()
    own = outcome(model, ids)
    model.zero_grad()
    before = state(model)
    undo, found, _ = apply(model, qk_norms, rotations)
    assert found and not leftovers(found)
    calls = counted(monkeypatch, *CALLS)
    ours = outcome(model, ids)
    assert (calls.count("qk_norm_rotary"), calls.count("rotary")) == MODELS[model_type]
    if dtype == torch.float32:
        assert_equal(ours, own, 1e-4)
    else:
        assert_as_good(ours, own, gold(tiny(model_type, dtype), ids))
    undo.restore()
    model.zero_grad()
    assert state(model) == before


def test_another_model_of_the_class_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    patched, other, ids = tiny("qwen3"), tiny("qwen3"), token_ids()
    apply(patched, qk_norms)
    calls = counted(monkeypatch, *CALLS)
    other(ids)
    assert not calls
    patched(ids)
    assert calls == ["qk_norm_rotary"] * 2


def hook_it(norm: nn.Module) -> None:
    norm.register_forward_hook(lambda _, __, output: output * 1.5)


def see_the_shape(norm: nn.Module) -> None:
    norm.register_forward_pre_hook(lambda _, args: (args[0] + args[0].shape[1],))


def wrap_it(norm: nn.Module) -> None:
    forward = norm.forward
    norm.forward = lambda x: forward(x) * 1.5  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [hook_it, see_the_shape, wrap_it])
def test_what_hangs_on_a_norm_is_not_bypassed(
    change: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain, ids = tiny("qwen3"), tiny("qwen3"), token_ids()
    apply(model, qk_norms)
    for each in (model, plain):
        change(each.model.layers[0].self_attn.q_norm)
    own, calls = outcome(plain, ids), counted(monkeypatch, *CALLS)
    assert_equal(outcome(model, ids), own)
    assert sorted(calls) == ["qk_norm_rotary", "rotary"]
    monkeypatch.setattr(qk_norms, "hooked", lambda _: False)
    with pytest.raises(AssertionError):
        assert_equal(outcome(model, ids), own)


def test_weights_of_another_dtype_go_the_old_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain, ids = tiny("qwen3", torch.bfloat16), tiny("qwen3", torch.bfloat16), token_ids()
    apply(model, qk_norms)
    for each in (model, plain):
        for layer in each.model.layers:
            layer.self_attn.q_norm.float()
            layer.self_attn.k_norm.float()
            layer.self_attn.v_proj.register_forward_hook(lambda _, __, y: y.float())
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, a: (a[0].bfloat16(),))
    own, calls = outcome(plain, ids), counted(monkeypatch, *CALLS)
    ours = outcome(model, ids)
    assert "qk_norm_rotary" not in calls and "rotary" in calls
    assert_equal(ours, own, 0.05)


@pytest.mark.parametrize(
    "bug",
    [{"sign": -1}, {"interleaved": True}, {"table": "first"}],
    ids=lambda bug: next(iter(bug)),
)
def test_the_proof_catches_a_wrong_rotation(bug: dict[str, Any]) -> None:
    attention = tiny("qwen3").model.layers[0].self_attn
    ((name, form),) = rotations.rotary_calls(type(attention)).items()
    assert isinstance(form, rotary_forms.RotaryFunction)
    site = Site(name, ("q_norm", "k_norm"))
    read = qk_norms._norms_at(attention, site, {name: form})
    assert read is not None
    assert qk_norms._proof(attention, site, form, read, BACKEND).failure is None
    wrong = replace(form, turning=replace(form.turning, **bug))
    assert qk_norms._proof(attention, site, wrong, read, BACKEND).failure is not None


@pytest.mark.parametrize("bug", [{"eps": 0.1}, {"offset": 1.0}])
def test_the_proof_catches_a_wrong_norm(bug: dict[str, Any]) -> None:
    attention = tiny("qwen3").model.layers[0].self_attn
    ((name, form),) = rotations.rotary_calls(type(attention)).items()
    assert isinstance(form, rotary_forms.RotaryFunction)
    site = Site(name, ("q_norm", "k_norm"))
    read = qk_norms._norms_at(attention, site, {name: form})
    assert read is not None
    wrong = tuple((cls, replace(norm, **bug)) for cls, norm in read)
    assert qk_norms._proof(attention, site, form, wrong, BACKEND).failure is not None


def test_norms_that_differ_are_no_pair() -> None:
    model = tiny("qwen3")
    model.model.layers[0].self_attn.k_norm.variance_epsilon = 0.5
    (found,) = qk_norms.find(model, Options(backend=BACKEND))
    assert found.path == "model.layers.1.self_attn"


def test_copies_and_pickles_stay_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("qwen3"), token_ids()
    own = outcome(model, ids)
    apply(model, norms, qk_norms, rotations)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    calls = counted(monkeypatch, *CALLS)
    for made in copies:
        calls.clear()
        assert_equal(outcome(made, ids), own, 1e-4)
        assert calls == ["qk_norm_rotary"] * 2
        assert list(made.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("model_type", ["qwen3", "gemma4_text"])
def test_one_graph_with_the_op_in_it(model_type: str) -> None:
    model, ids = tiny(model_type), token_ids()
    own = model(ids, use_cache=False).logits
    apply(model, qk_norms, rotations)
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.EagerAndRecordGraphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with torch.no_grad():
        ours = compiled(ids, use_cache=False).logits
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)
    (graph,) = graphs.graphs
    ops = [n for n in graph.graph.nodes if str(n.target).startswith("swathe.qk_norm_rotary")]
    assert BACKEND == "eager" or len(ops) == MODELS[model_type][0]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_equal(outcome(compiled, ids), outcome(model, ids), 1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, ids = tiny("qwen3"), token_ids()
    model.train()
    own = outcome(model, ids)
    apply(model, qk_norms)
    model.enable_input_require_grads()
    checkpoint(model, reentrant)
    assert_equal(outcome(model, ids), own, 1e-4)


def test_decoding_with_a_cache_is_as_before() -> None:
    model, ids = tiny("gemma3_text"), token_ids()
    given: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    own = model.generate(ids, **given)
    apply(model, qk_norms)
    assert torch.equal(model.generate(ids, **given), own)


def test_its_source_can_be_read() -> None:
    model = tiny("qwen3")
    apply(model, qk_norms)
    attention: Any = model.model.layers[0].self_attn
    assert is_fused(type(attention))
    source = inspect.getsource(wrappers(type(attention).forward)[-1])
    assert "waits_0, self.q_norm, self.k_norm, query_states, key_states, cos, sin)" in source


def test_two_rewritings_of_one_class_have_two_sources() -> None:
    model = tiny("gemma4_text")
    first, second = (layer.self_attn for layer in model.model.layers)
    del second.k_norm  # as where layers share their keys
    apply(model, qk_norms)
    both = [inspect.getsource(wrappers(type(m).forward)[-1]) for m in (first, second)]
    assert [text.count("_swathe_turn_") for text in both] == [2, 1]


@pytest.mark.parametrize("off", ["rope", "rms_norm"])
def test_it_can_be_switched_off(off: str) -> None:
    assert qk_norms.find(tiny("qwen3"), Options(**{off: False})) == []


def test_tables_that_widen_go_the_old_way() -> None:
    attention = tiny("qwen3", torch.bfloat16).model.layers[0].self_attn
    ((name, form),) = rotations.rotary_calls(type(attention)).items()
    assert isinstance(form, rotary_forms.RotaryFunction)
    read = qk_norms._norms_at(attention, Site(name, ("q_norm", "k_norm")), {name: form})
    assert read is not None
    parts = (attention.q_norm, attention.k_norm)
    q, cos = torch.randn(1, 4, 3, 16).bfloat16(), torch.randn(1, 3, 16)
    given: tuple[Tensor, ...] = (q, q, cos, cos)
    assert qk_norms._turned_together(form, read, BACKEND, parts, given, {}) is None
    calls = qk_norms._calls(form, read, BACKEND)
    ours = calls.turn(True, *parts, *given)
    wanted = form.function(attention.q_norm(q), attention.k_norm(q), cos, cos)
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b)
