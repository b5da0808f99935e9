"""Bugs planted in the masks and the attention of transformers' models: all are caught."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from support.families import tokens
from support.hf_attention import NEWER, attention_of, distance, example, made, padding
from support.mutants import Mutant, planted
from swathe.modeling.hf import attention, masks

Check = Callable[[], str | None]


def off(name: str, side: str = "none") -> Check:
    """Logits and gradients, without a cache."""
    return lambda: distance(name, example(name, side))


def decoding(name: str) -> Check:
    """Tokens one after the other, of padded prompts."""

    def check() -> str | None:
        model = made(name)
        options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
        given: dict[str, Any] = {"input_ids": tokens(3), "attention_mask": padding("left")}
        expected = model.generate(**given, **options)
        with attention_of(model, "swathe"):
            same = torch.equal(model.generate(**given, **options), expected)
        return None if same else "other tokens"

    return check


def packing(name: str, *ways: str) -> Check:
    """Two documents in a row."""

    @torch.no_grad()
    def check() -> str | None:
        model, one, two = made(name), tokens(1, 9), tokens(1, 7, seed=3)
        borders = torch.tensor([0, 9, 16], dtype=torch.int32)
        known: dict[str, Any] = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
        known["position_ids"] = torch.cat((torch.arange(9), torch.arange(7)))[None]
        given = {name: value for name, value in known.items() if name in ways}
        expected = torch.cat((model(one).logits, model(two).logits), 1)
        with attention_of(model, "swathe"):
            found = model(torch.cat((one, two), 1), use_cache=False, **given).logits
        return None if (found - expected).abs().max() < 1e-4 else "documents that are not separate"

    return check


def without_masks() -> str | None:
    """Causal, then not, as the towers of images come after a text."""
    q, k, v = torch.randn(3, 1, 2, 5, 16)
    call, module = AttentionInterface()["swathe"], torch.nn.Module()
    for causal in (True, False):
        found, _ = call(module, q, k, v, None, is_causal=causal)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        if not torch.allclose(found, expected.transpose(1, 2), atol=1e-5):
            return f"another result where causal={causal}"
    return None


BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k")
_W = '["sliding_window"]'
MASKS: dict[str, tuple[Mutant, Check]] = {
    "mask ignored": (
        Mutant(
            "torch.stack((first.expand(B, T), last.expand(B, T)))",
            "torch.tensor([0, S]).view(2, 1, 1).expand(2, B, T)",
        ),
        off("llama"),
    ),
    "padding ignored": (
        Mutant("first, last = torch.maximum(first, begin), torch.minimum(last, end)", "pass"),
        off("llama", "left"),
    ),
    "padding of an encoder ignored": (
        Mutant("first, last = torch.maximum(first, begin), torch.minimum(last, end)", "pass"),
        off("bert", "right"),
    ),
    "padding of an encoder's states ignored": (
        Mutant("first, last = torch.maximum(first, begin), torch.minimum(last, end)", "pass"),
        off("bart", "right"),
    ),
    "holes ignored": (Mutant("[:, :S] != 0", "[:, :S] >= 0"), off("llama", "holes")),
    "causal by one too many": (
        Mutant("return None, rows + 1", "return None, rows + 2"),
        off("gpt2"),
    ),
    "window one too wide": (Mutant(f"{_W} + 1, None", f"{_W}, None"), off("mistral")),
    "window one too narrow": (Mutant(f"{_W} + 1, None", f"{_W} + 2, None"), off("gpt_oss")),
    "window to the right too narrow": (
        Mutant("rows + window + 1", "rows + window"),
        off("modernbert"),
    ),
    "chunks from the padding on": (
        Mutant("rows + dropped - padding", "rows + dropped"),
        off("llama4_text", "left"),
    ),
    "chunk without its end": (Mutant("begin, begin + size", "None, None"), off("llama4_text")),
    "offset of a cache forgotten": (
        Mutant("(q_offset - kv_offset)", "(0 - kv_offset)"),
        decoding("llama"),
    ),
    "dropped keys forgotten": (Mutant("(q_offset - kv_offset)", "q_offset"), decoding("mistral")),
    "documents merged": (
        Mutant("searchsorted(numbers, numbers,", "searchsorted(numbers * 0, numbers * 0,"),
        packing("llama", "position_ids"),
    ),
    "documents' places taken for the row's": (
        Mutant("b + (rows - places)", "b"),
        packing("mistral", "position_ids"),
    ),
}
ATTENTION: dict[str, tuple[Mutant, Check]] = {
    "softcap dropped": (Mutant('"softcap": softcap', '"softcap": None'), off("gemma2")),
    "sinks dropped": (Mutant('"sinks": s_aux', '"sinks": None'), off("gpt_oss")),
    "scale dropped": (Mutant('"scale": scaling', '"scale": None'), off("gemma2")),
    "always causal": (
        Mutant('causal = bool(getattr(module, "is_causal", True)', "causal = bool(True"),
        off("whisper"),
    ),
    "position bias dropped": (Mutant("replace(mask, bias=bias)", "replace(mask)"), off("t5")),
    "borders ignored": (Mutant("if borders[0] is None", "if True"), packing("llama", *BORDERS)),
    "borders in place of the mask": (
        Mutant("torch.maximum(mask.start, own.start)", "own.start"),
        packing("mistral", "position_ids", *BORDERS),
    ),
    "one mask for all layers": (Mutant("return same and", "return"), off("gemma3_text")),
    "masks kept for other facts": (Mutant("self.facts == facts", "True"), without_masks),
}


_NEEDS_NEWER = {"documents' places taken for the row's", "position bias dropped"}
every_bug = [
    pytest.param(bug, marks=pytest.mark.skipif(bug in _NEEDS_NEWER and not NEWER, reason="5.10"))
    for bug in (*MASKS, *ATTENTION)
]


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is imported under the modules' names now serves transformers."""
    import swathe.modeling.hf.attention as serving
    import swathe.modeling.hf.masks as making

    forward, mask = serving.FORWARDS["swathe"], making.interval_mask
    monkeypatch.setitem(AttentionInterface._global_mapping, "swathe", forward)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "swathe", mask)


@pytest.mark.parametrize("bug", every_bug)
def test_bugs_are_caught(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, users = (masks, (attention,)) if bug in MASKS else (attention, ())
    mutant, check = {**MASKS, **ATTENTION}[bug]
    with planted(source, mutant, tmp_path, users=users):
        register(monkeypatch)
        assert check() is not None


@pytest.mark.parametrize(
    "check", {id(check): check for _, check in (*MASKS.values(), *ATTENTION.values())}.values()
)
def test_without_a_bug_nothing_is_found(check: Check) -> None:
    assert check() is None
