"""One set of weights, two models: from_hf and to_hf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import swathe
from support.families import FAMILIES, TINY, pair, tokens
from swathe.hf import from_hf, to_hf
from swathe.modeling.errors import ConfigError

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def same_objects(a: Any, b: Any) -> bool:
    return all(p is q for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_both_ways_without_a_copy(family: str) -> None:
    theirs, _ = pair(family)
    ours = from_hf(theirs)
    back = to_hf(ours, **EAGER)
    assert same_objects(theirs, ours) and same_objects(ours, back)
    assert type(ours).__name__ == type(theirs).__name__ == type(back).__name__
    assert isinstance(ours, swathe.PreTrainedModel) and type(back) is type(theirs)
    with torch.no_grad():
        expected = theirs(tokens()).logits
        torch.testing.assert_close(ours(tokens()).logits, expected, **CLOSE)
        assert torch.equal(back(tokens()).logits, expected)
    assert not any(b.is_meta for b in ours.buffers())


@pytest.mark.parametrize(
    "name", ["BertForMaskedLM", "BertForSequenceClassification", "BertModel", "LlamaModel"]
)
def test_other_heads(name: str) -> None:
    chosen = getattr(transformers, name)
    theirs = chosen(chosen.config_class(**TINY)).eval()
    ours = from_hf(theirs, attn_implementation="eager")
    assert type(ours).__name__ == name and same_objects(theirs, ours)
    with torch.no_grad():
        found, expected = ours(tokens()), theirs(tokens())
    torch.testing.assert_close(found[0], expected[0], **CLOSE)


def test_training_one_trains_the_other() -> None:
    theirs, _ = pair("llama")
    ours = from_hf(theirs.train(), loss_implementation="auto")
    assert ours.training
    ids = tokens()
    before = theirs(ids, labels=ids).loss.item()
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    ours(ids, labels=ids).loss.backward()
    optimizer.step()
    after = theirs(ids, labels=ids).loss
    assert after.item() < before - 1e-3
    torch.testing.assert_close(ours(ids, labels=ids).loss, after, **CLOSE)


def test_generation_settings_come_along() -> None:
    theirs, _ = pair("llama")
    theirs.generation_config = transformers.GenerationConfig(eos_token_id=[5, 6], temperature=0.5)
    ours = from_hf(theirs)
    assert ours.generation_config.eos_token_id == [5, 6]
    assert ours.generation_config.extra["temperature"] == 0.5
    ids = tokens(1)
    found = ours.generate(ids, max_new_tokens=8)
    expected = theirs.generate(ids, max_new_tokens=8, do_sample=False, temperature=None)
    assert torch.equal(found, expected)


def test_ties_are_those_of_the_weights_not_of_the_configuration() -> None:
    tied, _ = pair("llama", tie_word_embeddings=True)
    ours = from_hf(tied)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight is tied.lm_head.weight
    assert to_hf(ours).lm_head.weight is tied.lm_head.weight
    tied.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    apart = from_hf(tied)
    assert apart.lm_head.weight is tied.lm_head.weight
    assert apart.model.embed_tokens.weight is not apart.lm_head.weight
    assert not apart.config.tie_word_embeddings
    again = to_hf(apart)
    assert again.lm_head.weight is tied.lm_head.weight and not again.config.tie_word_embeddings


def test_a_shared_model_saves_like_any_other(tmp_path: Path) -> None:
    theirs, _ = pair("qwen3")
    from_hf(theirs).save_pretrained(tmp_path)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(read(tokens()).logits, theirs(tokens()).logits, **CLOSE)


def test_dtypes_stay() -> None:
    theirs, _ = pair("llama")
    ours = from_hf(theirs.bfloat16())
    assert ours.dtype == torch.bfloat16 and to_hf(ours).dtype == torch.bfloat16


def test_what_cannot_be_shared_is_refused() -> None:
    theirs, ours = pair("llama")
    with pytest.raises(TypeError, match=r"got a Linear.*merge_and_unload"):
        from_hf(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"takes a swathe\.PreTrained"):
        to_hf(theirs)
    small = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 9}
    with pytest.raises(ConfigError, match=r"no GPT2LMHeadModel .*swathe\.patch"):
        from_hf(transformers.GPT2LMHeadModel(transformers.GPT2Config(**small)))
    theirs.model.layers[0].mlp.gate_proj.adapter = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"differ in 2 tensors.*adapter.*must be merged"):
        from_hf(theirs)
    hook = ours.model.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"model\.norm has hooks"):
        to_hf(ours)
    hook.remove()
    to_hf(ours)


def test_a_model_of_ones_own_has_no_counterpart() -> None:
    config = swathe.modeling.auto.AutoConfig.for_model("llama", **TINY)
    own = type("OwnForCausalLM", (swathe.LlamaForCausalLM,), {})
    with pytest.raises(ConfigError, match=r"has no OwnForCausalLM.*exist here alone"):
        to_hf(own(config))
