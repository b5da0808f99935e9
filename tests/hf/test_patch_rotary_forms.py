"""Rotary functions of transformers: which form each is read as, and what stands in for it."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from support.hf_patching import (
    BACKEND,
    counted,
)

pytest.importorskip("transformers")

import transformers

from swathe.modeling.hf.patching import rotary_forms, rotations
from swathe.modeling.hf.patching.rotary_forms import RotaryFunction, Turning, read

# the two that are tested are 5.10 and 5.24
NEWER = Version(transformers.__version__) >= Version("5.11")
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
        HALVES, interleaved=True, regrouped=True, table="first" if NEWER else "whole"
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


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mistral_large4.apply_rotary_pos_emb_interleave", "tuple"),
        ("qwen4_exp.apply_rotary_pos_emb", "tensor"),
        ("llama.apply_rotary_pos_emb", None),
    ],
)
def test_a_second_tensor_may_be_missing_where_the_function_allows_it(
    name: str, kind: str | None
) -> None:
    if not NEWER and kind is not None:
        pytest.skip(f"transformers {transformers.__version__} has no such function")
    q, cos, sin = torch.randn(2, 3, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    read_as = form(name)
    assert read_as.alone == kind
    if kind is None:
        return
    ours = rotations.stand_in(read_as, BACKEND)(q, None, cos, sin)
    theirs = read_as.function(q, None, cos, sin)
    assert type(ours) is type(theirs)
    if kind == "tuple":
        assert ours[1] is None
        ours, theirs = ours[0], theirs[0]
    torch.testing.assert_close(ours, theirs)


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
