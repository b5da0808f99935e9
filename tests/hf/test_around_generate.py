"""generate on a patched model gives the tokens that it gave before, whatever the cache."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import swathe.hf
from support.hf_around import MODELS, fully
from support.hf_patching import tiny, token_ids

NEW = 8
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "none": {"use_cache": False},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "offloaded": {"cache_implementation": "offloaded"},
}
# windows of 4 in each of gemma2's sliding layers: shorter than the prompt, and than what follows
SHORT: dict[str, dict[str, Any]] = {"gemma2": {"sliding_window": 4}}


def generated(model: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The tokens, and the scores that they were chosen by."""
    ids, mask = token_ids(), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    torch.manual_seed(0)
    given = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **options}
    out = model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, output_scores=True, **given
    )
    return out.sequences, torch.stack(out.scores)


def assert_same(model: Any, plain: Any, **options: Any) -> None:
    ours, scores = generated(model, **options)
    theirs, expected = generated(plain, **options)
    assert torch.equal(ours, theirs)
    assert ours.shape[1] == 12 + options.get("max_new_tokens", NEW)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("model_type", MODELS)
def test_every_cache(model_type: str, cache: str) -> None:
    if cache == "offloaded" and not torch.accelerator.is_available():
        pytest.skip("transformers' offloaded caches need an accelerator to come from")
    model, plain = (tiny(model_type, **SHORT.get(model_type, {})) for _ in range(2))
    fully(model)
    assert_same(model, plain, **CACHES[cache])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("optimum") is None, reason="needs optimum-quanto")
def test_a_quantized_cache() -> None:
    model, plain = tiny("qwen3"), tiny("qwen3")
    fully(model)
    cache = {"backend": "quanto", "nbits": 4, "residual_length": 4}
    # a rounding apart may be a step of the quantisation apart
    ours, theirs = (
        generated(one, cache_implementation="quantized", cache_config=cache)[1][:4]
        for one in (model, plain)
    )
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "top_k": 5},
        {"prefill_chunk_size": 5},
        {"logits_to_keep": 1},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_search(options: dict[str, Any]) -> None:
    model, plain = tiny("qwen3"), tiny("qwen3")
    fully(model)
    assert_same(model, plain, **options)


@pytest.mark.parametrize("patched", ["target", "assistant", "both"])
def test_assisted_decoding(patched: str) -> None:
    """The assistant agrees about half of the time, so that drafts are cut and caches cropped."""
    ids = token_ids()[:1]
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    target, assistant = tiny("llama"), tiny("llama", num_hidden_layers=1)
    alone = target.generate(ids, **options)
    for name, model in (("target", target), ("assistant", assistant)):
        if patched in (name, "both"):
            fully(model)
    assert torch.equal(target.generate(ids, assistant_model=assistant, **options), alone)
    assert torch.equal(target.generate(ids, prompt_lookup_num_tokens=3, **options), alone)


@pytest.mark.parametrize("order", ["attention first", "patch first"])
@pytest.mark.parametrize("model_type", MODELS)
def test_with_attention_of_ours_too(model_type: str, order: str) -> None:
    model, plain = (tiny(model_type, **SHORT.get(model_type, {})) for _ in range(2))
    if order == "attention first":
        model.set_attn_implementation("swathe")
    fully(model)
    if order == "patch first":
        model.set_attn_implementation("swathe")
    for cache in ("dynamic", "static"):
        assert_same(model, plain, **CACHES[cache])
    assert_same(model, plain, num_beams=3)
    swathe.hf.unpatch(model)
    assert model.config._attn_implementation == "swathe"
    assert_same(model, plain)


def test_a_model_in_training_mode_generates_too() -> None:
    model, plain = tiny("llama").train(), tiny("llama")
    fully(model, "eager")
    assert_same(model, plain)
