"""Attention weights a forward returns: eager's own, or recomputed beside another backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support import tiny_bert
from support.families import FAMILIES, pair, tokens
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.modeling.errors import ConfigError
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.families.llama.modeling_llama import LlamaForCausalLM

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
LEFT = torch.tensor([[1] * 11, [0] * 4 + [1] * 7])


def recomputing(model: Any, attn: str = "triton") -> Any:
    model.set_attn_implementation(attn)
    model.config.attn_capture = "recompute"
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_weights_are_theirs(family: str) -> None:
    theirs, model = pair(family, "eager", num_hidden_layers=2)
    given: dict[str, Any] = {"attention_mask": LEFT, "output_attentions": True}
    expected = theirs(tokens(), **given)
    out = recomputing(model)(tokens(), **given)
    real = LEFT.bool()
    torch.testing.assert_close(out.logits[real], expected.logits[real], **CLOSE)
    assert len(out.attentions) == 2
    for mine, other in zip(out.attentions, expected.attentions, strict=True):
        # rows of padding see nothing here, and everything there
        real_rows = real[:, None, :, None].expand_as(mine)
        torch.testing.assert_close(mine[real_rows], other[real_rows], **CLOSE)


@pytest.mark.parametrize("attn", ["sdpa", "triton"])
def test_an_encoders_too(attn: str) -> None:
    theirs, model = tiny_bert.pair("BertModel")
    expected = theirs(tiny_bert.IDS, output_attentions=True)
    out = recomputing(model, attn)(tiny_bert.IDS, output_attentions=True)
    torch.testing.assert_close(out.last_hidden_state, expected.last_hidden_state, **CLOSE)
    for mine, other in zip(out.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("attn", ["sdpa", "triton"])
def test_capture_changes_no_output(attn: str, cached: bool) -> None:
    _, model = pair("llama", "eager", num_hidden_layers=2, attention_dropout=0.0 if cached else 0.5)
    recomputing(model, attn).train(not cached)
    ids, found = tokens(), []
    for asked in (False, True):
        torch.manual_seed(0)
        past = model(ids[:, :6], use_cache=True).past_key_values if cached else None
        new = ids[:, 6:] if cached else ids
        found.append(model(new, past_key_values=past, output_attentions=asked))
    assert torch.equal(found[0].logits, found[1].logits) and found[0].attentions is None
    # what is shown is without dropout: every row sums to one
    for weights in found[1].attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), **CLOSE)


def test_gradients_reach_recomputed_weights() -> None:
    found: list[list[Tensor]] = []
    for attn in ("eager", "triton"):
        _, model = pair("llama", "eager", num_hidden_layers=2)
        out = recomputing(model, attn)(tokens(), output_attentions=True)
        sum(w.square().sum() for w in out.attentions).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def test_asking_is_refused_with_both_ways_out() -> None:
    both = r'set_attn_implementation\("eager"\) first, or set model.config.attn_capture = "recompu'
    _, model = pair("llama", "eager", num_hidden_layers=1)
    bert = tiny_bert.pair("BertModel")[1]
    for each in (model, bert):
        each.set_attn_implementation("sdpa")
        for given in ({"output_attentions": True}, {}):
            each.config.output_attentions = not given
            with pytest.raises(UnsupportedFeature, match=both):
                each(tokens(), **given)


def test_it_is_how_a_model_runs_and_never_in_a_file(tmp_path: Path) -> None:
    _, model = pair("llama", "eager", num_hidden_layers=1)
    recomputing(model).save_pretrained(tmp_path)
    assert "attn_capture" not in (tmp_path / "config.json").read_text()
    again = LlamaForCausalLM.from_pretrained(
        tmp_path, attn_implementation="sdpa", attn_capture="recompute"
    )
    assert again.config == LlamaConfig.from_pretrained(tmp_path)
    assert again(tokens(), output_attentions=True).attentions[0].shape == (2, 4, 11, 11)
    with pytest.raises(ConfigError, match=r"attn_capture='recomputed'.*must be"):
        LlamaConfig(attn_capture="recomputed")
