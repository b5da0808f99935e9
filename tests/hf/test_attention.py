"""transformers' models on swathe's attention: as close to the exact result as on their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from support.families import tokens
from support.hf_attention import (
    CROSSED,
    DECODERS,
    MODELS,
    NEWER,
    attention_of,
    distance,
    example,
    made,
    padding,
)
from swathe.modeling.hf import masks
from swathe.modeling.hf.generation import CACHE

STATIC = sorted(DECODERS)
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
PACKED = ("llama", "mistral", "gemma2", "gpt_oss", "llama4_text", "olmo2")


@pytest.mark.parametrize("side", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name: str, side: str) -> None:
    assert distance(name, example(name, side)) is None


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("llama", "left"),
        ("gemma2", "none"),
        ("gpt_oss", "right"),
        ("bart", "right"),
        ("t5", "none"),
    ],
)
def test_logits_and_gradients_of_triton(name: str, side: str) -> None:
    """Compiled on a GPU, interpreted elsewhere."""
    assert distance(name, example(name, side), "triton") is None


@pytest.mark.parametrize("asked", ["swathe", "triton"])
@pytest.mark.parametrize(("name", "side"), [("mistral", "left"), ("bert", "right")])
def test_padding_that_is_not_looked_at(
    name: str, side: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is on a GPU, where the flags of keys are handed on."""
    monkeypatch.setattr(masks, "looked_at", lambda held: False)
    assert distance(name, example(name, side), asked) is None


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bert"])
def test_half_precision(name: str) -> None:
    at = example(name, "right")
    model = made(name)
    exact = model(**at.inputs).logits[at.real]
    try:
        model.bfloat16()
        theirs = model(**at.inputs).logits[at.real]
        with attention_of(model, "swathe"):
            found = model(**at.inputs).logits[at.real]
    finally:
        made.cache_clear()  # its weights were rounded
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() <= 1.25 * (theirs - exact).norm()


@pytest.mark.parametrize("kind", [None, "static"])
@pytest.mark.parametrize("name", [*STATIC, "bart", "whisper"])
def test_generate(name: str, kind: str | None) -> None:
    if (name, kind, NEWER) == ("llama4_text", "static", False):
        pytest.skip("transformers 5.10 fails itself")
    model = made(name)
    inputs: dict[str, Any] = {"input_ids": tokens(3), "attention_mask": padding("left")}
    if name in CROSSED:
        inputs = dict(example(name, "right").inputs)
        inputs.pop("decoder_input_ids")
        inputs.pop("decoder_attention_mask", None)
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    options |= {"cache_implementation": kind}
    expected = model.generate(**inputs, **options)
    with attention_of(model, "swathe"):
        assert torch.equal(model.generate(**inputs, **options), expected)


@pytest.mark.parametrize("way", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_ways_of_decoding(name: str, way: dict[str, Any]) -> None:
    model, ids = made(name), tokens(1, 9)
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, **way}
    given = {"attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **given, **options)
    with attention_of(model, "swathe"):
        assert torch.equal(model.generate(ids, **given, **options), expected)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "llama4_text"])
@torch.no_grad()
def test_prefill_in_chunks_then_one_by_one(name: str) -> None:
    model, ids, mask = made(name), tokens(3), padding("left")
    whole = model(ids, attention_mask=mask).logits[:, 4:]
    cache, pieces = transformers.DynamicCache(config=model.config), []
    with attention_of(model, "swathe"):
        for start, end in ((0, 4), (4, 5), (5, 8), (8, 9), (9, 11)):
            given = {"attention_mask": mask[:, :end], CACHE: cache}
            pieces.append(model(ids[:, start:end], **given).logits)
    torch.testing.assert_close(torch.cat(pieces, 1)[:, 4:], whole, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
@torch.no_grad()
def test_a_static_cache_is_not_read_past_what_it_holds(name: str) -> None:
    model, ids = made(name), tokens(3)
    expected = model(ids).logits[:, 7:]
    cache = transformers.StaticCache(config=model.config, max_cache_len=24)
    with attention_of(model, "swathe"):
        model(ids[:, :7], **{CACHE: cache})
        for layer in cache.layers:
            if layer.keys.shape[2] == 24:
                layer.keys[:, :, 7:] = layer.values[:, :, 7:] = 1e4
        pieces = [model(ids[:, i : i + 1], **{CACHE: cache}).logits for i in range(7, 11)]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, **CLOSE)


def packed() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two documents, in one row, where their tokens sit, and their borders."""
    one, two = tokens(1, 9), tokens(1, 7, seed=3)
    positions = torch.cat((torch.arange(9), torch.arange(7)))[None]
    return one, two, positions, torch.tensor([0, 9, 16], dtype=torch.int32)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("way", ["positions", "borders", "both"])
@torch.no_grad()
def test_packed_documents_are_separate(name: str, way: str) -> None:
    if name == "llama4_text" and (way == "borders" or not NEWER):
        pytest.skip("chunks are counted from position 0, which positions alone say")
    if (name, way) == ("gpt_oss", "positions"):
        pytest.skip("the model does not show transformers its positions")
    model = made(name)
    one, two, positions, borders = packed()
    given: dict[str, Any] = {} if way == "borders" else {"position_ids": positions}
    if way != "positions":
        given |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
        given |= {"max_length_q": 9, "max_length_k": 9}
    with attention_of(model, "swathe"):
        expected = torch.cat((model(one).logits, model(two).logits), 1)
        found = model(torch.cat((one, two), 1), use_cache=False, **given).logits
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@torch.no_grad()
def test_masks_of_the_callers_own(name: str) -> None:
    model, ids = made(name), tokens(3)
    seen = torch.rand(3, 1, 11, 11, generator=torch.Generator().manual_seed(5)) < 0.5
    seen |= torch.eye(11, dtype=torch.bool)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = model(ids, attention_mask=added).logits
    with attention_of(model, "swathe"):
        for mask in (seen, added):
            torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, **CLOSE)


def test_a_decoder_that_sees_both_ways() -> None:
    model, ids = made("llama"), tokens(3)
    model.config.is_causal = False
    try:
        expected = model(ids).logits
        with attention_of(model, "swathe"):
            torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    finally:
        del model.config.is_causal
    assert not torch.allclose(model(ids).logits, expected, atol=1e-2)
