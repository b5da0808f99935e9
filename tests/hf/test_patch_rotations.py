"""Rotary functions of transformers: which form each is read as, and models with ours instead."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from importlib import import_module
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
from swathe.modeling.hf.patching.rotary_forms import RotaryFunction, Turning, read

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
HALVES = Turning(tail=False, table="whole", interleaved=False, regrouped=False, sign=1)
FORMS = {
    "llama.apply_rotary_pos_emb": HALVES,
    "olmo2.apply_rotary_pos_emb": HALVES,
    "phi3.apply_rotary_pos_emb": HALVES,
    "gemma3n.apply_rotary_pos_emb": HALVES,
    "qwen2_vl.apply_rotary_pos_emb_vision": HALVES,
    "nanochat.apply_rotary_pos_emb": replace(HALVES, sign=-1),
    "gpt_oss.apply_rotary_pos_emb": replace(HALVES, table="compact"),
    "cohere.apply_rotary_pos_emb": replace(HALVES, interleaved=True),
    "gptj.apply_rotary_pos_emb": replace(HALVES, interleaved=True, table="compact"),
    "glm.apply_rotary_pos_emb": replace(HALVES, interleaved=True, table="first"),
    "ernie4_5.apply_rotary_pos_emb": replace(HALVES, interleaved=True, table="first"),
    "llama4.apply_rotary_emb": replace(HALVES, interleaved=True, table="compact"),
    "deepseek_v2.apply_rotary_emb": replace(HALVES, interleaved=True, table="compact"),
    "deepseek_v3.apply_rotary_pos_emb_interleave": replace(
        HALVES, interleaved=True, regrouped=True, table="first"
    ),
    "deepseek_v4.apply_rotary_pos_emb": replace(
        HALVES, tail=True, interleaved=True, table="compact"
    ),
}
PARTIAL = {"phi3", "glm", "deepseek_v4"}
PROMOTES = {"llama", "phi3", "gemma3n", "nanochat", "gpt_oss", "gptj", "glm", "deepseek_v3"}


def function(name: str) -> Any:
    family, name = name.split(".")
    return getattr(import_module(f"transformers.models.{family}.modeling_{family}"), name)


def form(name: str) -> RotaryFunction:
    found = read(function(name))
    assert isinstance(found, RotaryFunction), found
    return found


@pytest.mark.parametrize("name", FORMS)
def test_each_function_is_read_as_what_it_computes(name: str) -> None:
    found, family = form(name), name.split(".")[0]
    assert found.turning == FORMS[name]
    assert found.partial == (family in PARTIAL)
    assert found.promotes == (family in PROMOTES)


def test_the_axis_of_heads_is_found_for_each_way_to_say_it() -> None:
    layouts = form("llama.apply_rotary_pos_emb").layouts
    assert layouts[4, 3, 1] == 1 and layouts[4, 3, 2] == 2 and layouts[4, 2, 0] == 1
    assert (4, 3, 0) not in layouts
    assert form("qwen2_vl.apply_rotary_pos_emb_vision").layouts[3, 2, None] == 1
    assert form("llama4.apply_rotary_emb").layouts == {(4, 3, None): 2}
    assert form("deepseek_v2.apply_rotary_emb").layouts[4, 3, None] == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("clvp.apply_rotary_pos_emb", "turns 3 tensors"),
        ("dinov3_vit.apply_rotary_pos_emb", "tables of fewer tokens"),
        ("edgetam_video.apply_rotary_pos_emb_2d_cross_attn", "needs cos_k"),
        ("gemma4.apply_multidimensional_rope", "needs position_ids"),
    ],
)
def test_other_functions_are_left_alone_with_a_reason(name: str, reason: str) -> None:
    found = read(function(name))
    assert isinstance(found, str) and reason in found


def planted(name: str) -> Any:
    """Functions that look like a form and differ somewhere."""

    def halves(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1)

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        c, s = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        if name == "swapped":
            c, s = s, c
        if name == "doubled":
            s = 2 * s
        if name == "squared":
            return q * c * c + halves(q) * s, k * c * c + halves(k) * s
        if name == "shifted":
            return q * c + halves(q) * s + 1, k * c + halves(k) * s + 1
        if name == "mixed":
            return q * c + halves(k) * s if q.shape == k.shape else q, k * c + halves(k) * s
        if name == "keys stay":
            return q * c + halves(q) * s, k
        if name == "rolled":
            return q * c + q.roll(1, -1) * s, k * c + k.roll(1, -1) * s
        return q * c + halves(q) * s, k * c + halves(k) * s

    return turned


@pytest.mark.parametrize(
    "name", ["swapped", "doubled", "squared", "shifted", "mixed", "keys stay", "rolled"]
)
def test_a_function_that_differs_somewhere_is_no_form(name: str) -> None:
    assert isinstance(read(planted("right")), RotaryFunction)
    assert isinstance(read(planted(name)), str)


@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("llama.apply_rotary_pos_emb", {"interleaved": True}),
        ("cohere.apply_rotary_pos_emb", {"interleaved": False}),
        ("nanochat.apply_rotary_pos_emb", {"sign": 1}),
        ("llama.apply_rotary_pos_emb", {"sign": -1}),
        ("deepseek_v3.apply_rotary_pos_emb_interleave", {"regrouped": False}),
        ("deepseek_v4.apply_rotary_pos_emb", {"tail": False}),
        ("phi3.apply_rotary_pos_emb", {"tail": True}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_proof_catches_a_wrong_form(name: str, bug: dict[str, Any], dtype: torch.dtype) -> None:
    right = form(name)
    wrong = replace(right, turning=replace(right.turning, **bug))
    where = (16, dtype, torch.device("cpu"), BACKEND)
    assert rotations._proof(right, *where).failure is None
    assert rotations._proof(wrong, *where).failure is not None


def test_the_proof_catches_a_wrong_axis_of_heads() -> None:
    right = form("llama.apply_rotary_pos_emb")
    wrong = replace(right, layouts={(4, 3, 1): 2})
    where = (16, torch.float32, torch.device("cpu"), BACKEND)
    assert rotations._proof(wrong, *where).failure is not None


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


@pytest.mark.parametrize(
    "change", ["other tokens", "one argument more", "tables with gradients", "k of another dtype"]
)
def test_what_the_proof_does_not_reach_goes_to_the_function(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = "sam2_video" if change == "one argument more" else "llama"
    name = "apply_rotary_pos_emb" + ("_2d" if family == "sam2_video" else "")
    read_as = form(f"{family}.{name}")
    ours, theirs = rotations.stand_in(read_as, BACKEND), read_as.function
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    cos, sin = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    extra: dict[str, Any] = {}
    if change == "other tokens":
        k, cos, sin = torch.randn(2, 4, 1, 8), cos[:, :1], sin[:, :1]
    if change == "one argument more":
        q, k, cos, sin, extra = q, k, cos[0], sin[0], {"repeat_freqs_k": True}
    if change == "tables with gradients":
        cos.requires_grad_()
    if change == "k of another dtype":
        k = k.double()
    calls = counted(monkeypatch, (rotary_forms, "rotary"))
    for a, b in zip(ours(q, k, cos, sin, **extra), theirs(q, k, cos, sin, **extra), strict=True):
        assert torch.equal(a, b)
    assert not calls


@pytest.mark.parametrize(
    ("q", "cos", "kwargs"),
    [
        ((2, 3, 5, 8), (2, 5, 8), {}),
        ((2, 3, 5, 8), (1, 5, 8), {"unsqueeze_dim": 1}),
        ((2, 5, 3, 8), (2, 5, 8), {"unsqueeze_dim": 2}),
        ((2, 5, 3, 8), (2, 5, 8), {"unsqueeze_dim": -2}),
        ((3, 5, 8), (5, 8), {"unsqueeze_dim": 0}),
        ((5, 3, 8), (5, 8), {"unsqueeze_dim": 1}),
    ],
)
def test_every_layout_is_served(
    q: tuple[int, ...],
    cos: tuple[int, ...],
    kwargs: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read_as = form("llama.apply_rotary_pos_emb")
    ours, theirs = rotations.stand_in(read_as, BACKEND), read_as.function
    x, y, c, s = torch.randn(q), torch.randn(q), torch.randn(cos), torch.randn(cos)
    calls = counted(monkeypatch, (rotary_forms, "rotary"))
    for a, b in zip(ours(x, y, c, s, **kwargs), theirs(x, y, c, s, **kwargs), strict=True):
        torch.testing.assert_close(a, b)
    named = ours(q=x, k=y, cos=c, sin=s, **kwargs)
    torch.testing.assert_close(named[0], theirs(x, y, c, s, **kwargs)[0])
    assert len(calls) == 2


def test_a_second_tensor_may_be_missing_where_the_function_allows_it() -> None:
    q, cos, sin = torch.randn(2, 3, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    for name, kind in (("mistral_large4", "tuple"), ("qwen4_exp", "tensor")):
        short = "_interleave" if name == "mistral_large4" else ""
        read_as = form(f"{name}.apply_rotary_pos_emb{short}")
        assert read_as.alone == kind
        ours = rotations.stand_in(read_as, BACKEND)(q, None, cos, sin)
        theirs = read_as.function(q, None, cos, sin)
        assert type(ours) is type(theirs)
        if kind == "tuple":
            assert ours[1] is None
            ours, theirs = ours[0], theirs[0]
        torch.testing.assert_close(ours, theirs)
    assert form("llama.apply_rotary_pos_emb").alone is None


def test_a_wider_table_widens_the_result_as_before() -> None:
    q, k = (torch.randn(2, 3, 5, 8).bfloat16() for _ in range(2))
    cos, sin = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    for name, dtype in (("llama", torch.float32), ("olmo2", torch.bfloat16)):
        read_as = form(f"{name}.apply_rotary_pos_emb")
        ours = rotations.stand_in(read_as, BACKEND)(q, k, cos, sin)
        theirs = read_as.function(q, k, cos, sin)
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype == dtype
            torch.testing.assert_close(a, b)


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
    monkeypatch.setitem(globals(), "apply_rotary", planted("shifted"))
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
