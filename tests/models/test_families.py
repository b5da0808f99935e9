"""One contract for every decoder family: the same model as transformers', however it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from support.families import ATTENTION, FAMILIES, pair, tokens
from swathe.kernels.attention.api import Mask, attention
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.modeling.auto import AutoConfig, AutoModel, AutoModelForCausalLM, model_class
from swathe.modeling.cache import DynamicCache, StaticCache
from swathe.modeling.decoder import narrowed
from swathe.modeling.errors import ConfigError
from swathe.modeling.masks import causal_mask

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_backend = pytest.mark.parametrize(
    ("family", "attn"), [(name, attn) for name, known in ATTENTION.items() for attn in known]
)


def padding(side: str) -> Tensor:
    mask = torch.ones(3, 11, dtype=torch.long)
    if side == "left":
        mask[0, :4] = mask[1, :1] = 0
    elif side == "right":
        mask[0, 7:] = mask[2, 10:] = 0
    elif side == "holes":
        mask[1, 3] = mask[1, 6] = 0
    return mask


@every_backend
def test_keys_logits_and_states(family: str, attn: str) -> None:
    theirs, model = pair(family, "auto" if attn == "sdpa" else attn)
    assert list(model.state_dict()) == list(theirs.state_dict())
    assert model.num_parameters() == theirs.num_parameters()
    ids = tokens()
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True)
        out = model(ids, output_hidden_states=True)
    torch.testing.assert_close(out.logits, expected.logits, **CLOSE)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    for mine, other in zip(out.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)


@every_family
def test_bf16_is_theirs_bit_for_bit_on_eager_kernels(family: str) -> None:
    """But for experts: theirs are added up in bf16, ours in fp32 and rounded once."""
    theirs, model = pair(family, "eager")
    ids = tokens()
    exact = theirs(ids).logits
    theirs, model = theirs.bfloat16(), model.bfloat16()
    # transformers rounds its frequencies too when a model is moved; the fp32 ones are put back
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    expected = theirs(ids, output_hidden_states=True)
    out = model(ids, output_hidden_states=True)
    if hasattr(model.config, "num_experts_per_tok"):
        error, their_error = ((x.logits - exact).norm() for x in (out, expected))
        assert error <= 1.1 * their_error
        return
    for mine, other in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(out.logits, expected.logits)


@every_family
def test_attention_weights(family: str) -> None:
    theirs, model = pair(family, "eager")
    expected = theirs(tokens(), output_attentions=True).attentions
    found = model(tokens(), output_attentions=True).attentions
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@every_backend
def test_padding(family: str, attn: str, side: str) -> None:
    theirs, model = pair(family, {"attn": attn})
    ids, mask = tokens(3), padding(side)
    real = mask.bool()
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits[real]
        found = model(ids, attention_mask=mask).logits[real]
    torch.testing.assert_close(found, expected, **CLOSE)


@every_backend
@torch.no_grad()
def test_prefill_in_chunks_then_one_by_one(family: str, attn: str) -> None:
    theirs, model = pair(family, {"attn": attn})
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    whole = theirs(ids, attention_mask=mask).logits[:, 2:]
    cache, pieces = DynamicCache(), []
    for start, end in ((0, 4), (4, 5), (5, 8), (8, 9), (9, 10), (10, 11)):
        given = {"attention_mask": mask[:, :end], "past_key_values": cache}
        pieces.append(model(ids[:, start:end], **given).logits)
    torch.testing.assert_close(torch.cat(pieces, 1)[:, 2:], whole, **CLOSE)


@every_family
@torch.no_grad()
def test_static_cache_of_ragged_prompts(family: str) -> None:
    _, model = pair(family)
    ids, mask = tokens(3), padding("left")
    cache = StaticCache(model.config, 32)
    first = model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1]
    more = model(tokens(3, 1, seed=2), past_key_values=cache).logits[:, -1]
    for row in range(3):
        alone = torch.cat((ids[row][mask[row].bool()], tokens(3, 1, seed=2)[row]))[None]
        expected = model(alone).logits[0]
        torch.testing.assert_close(first[row], expected[-2], **CLOSE)
        torch.testing.assert_close(more[row], expected[-1], **CLOSE)


@every_family
def test_greedy_tokens(family: str) -> None:
    theirs, model = pair(family)
    ids = tokens(2, 7)
    options = {"max_new_tokens": 12, "do_sample": False}
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for cache in ("dynamic", "static"):
        found = model.generate(ids, eos_token_id=[], cache_implementation=cache, **options)
        assert torch.equal(found, expected), cache


@every_family
def test_packed_documents_are_separate(family: str) -> None:
    _, model = pair(family)
    one, two = tokens(1, 9), tokens(1, 7, seed=3)
    positions = torch.cat((torch.arange(9), torch.arange(7)))[None]
    borders = torch.tensor([0, 9, 16], dtype=torch.int32)
    both = torch.cat((one, two), 1)
    with torch.no_grad():
        expected = torch.cat((model(one).logits, model(two).logits), 1)
        by_positions = model(both, position_ids=positions).logits
        by_borders = model(both, cu_seq_lens_q=borders, cu_seq_lens_k=borders).logits
    torch.testing.assert_close(by_positions, expected, **CLOSE)
    torch.testing.assert_close(by_borders, expected, **CLOSE)


@every_backend
def test_loss_and_gradients(family: str, attn: str) -> None:
    theirs, model = pair(family, {"attn": attn})
    ids, mask = tokens(3), padding("right")
    labels = ids.masked_fill(mask == 0, -100)
    expected = theirs.train()(ids, attention_mask=mask, labels=labels).loss
    loss = model.train()(ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss, expected, **CLOSE)
    expected.backward()
    loss.backward()
    other = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, other[name].grad, atol=1e-5, rtol=1e-4)


@every_family
def test_fused_loss_is_the_loss(family: str) -> None:
    _, model = pair(family)
    ids, found = tokens(), []
    model.train()
    for implementation in (None, "triton"):
        model.config.loss_implementation = implementation
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-4)


@every_family
def test_gradient_checkpointing_is_bitwise_equal(family: str) -> None:
    _, model = pair(family)
    ids, found = tokens(), []
    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every_family
def test_compiles_in_one_graph(family: str) -> None:
    _, model = pair(family, num_hidden_layers=2)
    torch.compiler.reset()
    compiled = torch.compile(model.model, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (11, 13):
        ids = tokens(2, length)
        found = compiled(ids, use_cache=False).last_hidden_state
        expected = model.model(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(found, expected, **CLOSE)


@every_family
def test_files_go_both_ways(family: str, tmp_path: Path) -> None:
    theirs, _ = pair(family)
    ids = tokens()
    theirs.save_pretrained(tmp_path / "theirs")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert type(model) is model_class(family, "causal_lm")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not model.training
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, **CLOSE)

    model.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is type(theirs)
    for name, value in again.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    body = AutoModel.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(body(ids)[0], theirs.model(ids)[0], **CLOSE)
    configs = []
    for who in ("theirs", "ours"):
        configs.append(transformers.AutoConfig.from_pretrained(tmp_path / who).to_dict())
        configs[-1].pop("_name_or_path")
    # fields that a transformers older than ours does not know come through all the same
    news = configs[1].keys() - configs[0].keys()
    assert configs[0] == {k: v for k, v in configs[1].items() if k not in news}
    assert news <= {"swiglu_alpha", "swiglu_limit"}
    own = AutoConfig.from_pretrained(tmp_path / "theirs")
    assert (
        own == AutoConfig.from_pretrained(tmp_path / "ours")
        and type(own).from_dict(own.to_dict()) == own
    )


@every_family
def test_a_new_model_is_initialised_and_defaults_are_theirs(family: str) -> None:
    config = model_class(family, "config")()
    theirs = getattr(transformers, FAMILIES[family][0]).config_class()
    ours, other = config.to_dict(), theirs.to_dict()
    differing = {k: (ours[k], other[k]) for k in ours.keys() & other.keys() if ours[k] != other[k]}
    assert differing.keys() <= {"transformers_version"}, differing
    more = set(other) - set(ours) - set(config.attribute_map)
    assert all(name.startswith("_") for name in more), more
    _, model = pair(family)
    fresh = type(model)(model.config)
    for name, parameter in fresh.named_parameters():
        assert parameter.isfinite().all(), name
        if "norm" in name:
            offset = 1.0 if family.startswith("gemma") else 0.0
            assert (parameter + offset == 1.0).all(), name


@every_family
def test_what_forward_does_not_know_is_refused(family: str) -> None:
    _, model = pair(family)
    with pytest.raises(TypeError, match=r"'attn_mask' \(did you mean 'attention_mask'"):
        model(tokens(), attn_mask=torch.ones(2, 11))


def test_a_backend_without_softcap_says_so() -> None:
    with pytest.raises(UnsupportedFeature, match=r"'sdpa' cannot serve .*softcap"):
        pair("gemma2", {"attn": "sdpa"})


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_router_logits_and_the_balancing_loss(family: str) -> None:
    theirs, model = pair(family)
    ids, mask = tokens(3), padding("right")
    labels = ids.masked_fill(mask == 0, -100)
    given = {"attention_mask": mask, "labels": labels, "output_router_logits": True}
    expected, out = theirs.train()(ids, **given), model.train()(ids, **given)
    torch.testing.assert_close(out.aux_loss, expected.aux_loss, **CLOSE)
    torch.testing.assert_close(out.loss, expected.loss, **CLOSE)
    real = mask.bool().flatten()
    for mine, other in zip(out.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(mine[real], other.view_as(mine)[real], **CLOSE)
    assert model(ids).router_logits is None


def test_phi3_drops_what_theirs_drops() -> None:
    theirs, model = pair("phi3", resid_pdrop=0.3)
    logits = []
    for each in (theirs.train(), model.train()):
        torch.manual_seed(3)
        logits.append(each(tokens()).logits)
    torch.testing.assert_close(*logits, **CLOSE)
    assert not torch.allclose(logits[0], theirs.eval()(tokens()).logits, atol=0.1)


def test_gemma3_reads_the_spelling_of_older_files() -> None:
    config_class = model_class("gemma3_text", "config")
    old = {
        "rope_theta": 5e5,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 3,
        "num_hidden_layers": 6,
    }
    config = config_class.from_dict(old)
    theirs = transformers.Gemma3TextConfig(**old)
    assert config.layer_types == theirs.layer_types and config.rope_theta == 5e5
    assert config.rope_parameters == {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    changed = config.replace(rope_theta=1e4)
    assert changed.rope_theta == 1e4
    assert changed.rope_parameters["sliding_attention"]["rope_theta"] == 2e4
    with pytest.raises(ConfigError, match="sliding_window_pattern=0; it must be"):
        config_class(sliding_window_pattern=0)


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("gemma2", {"layer_types": ["sliding_atention"] * 26}, r"did you mean 'sliding_attention'"),
        ("gemma2", {"layer_types": ["full_attention"]}, "has 1 entries for num_hidden_layers=26"),
        ("gemma2", {"sliding_window": None}, "sliding_window=None, but layer_types has"),
        ("gemma", {"use_bidirectional_attention": True}, "True is not supported"),
        ("gemma3_text", {"attn_logit_softcapping": 30.0}, "the only value allowed is None"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0 is out of range"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok=9 with 8 experts"),
        ("phi3", {"resid_pdrop": 2.0}, "resid_pdrop=2.0 is out of range"),
    ],
)
def test_configurations_that_no_model_has(
    family: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        model_class(family, "config")(**values)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "triton"])
def test_rows_of_padding_past_a_window_see_nothing(backend: str) -> None:
    hidden, real = torch.zeros(1, 12, 8), (torch.arange(12) < 5)[None]
    q, k, v = torch.randn(3, 1, 2, 12, 16, generator=torch.Generator().manual_seed(0))
    mask = causal_mask(real, hidden, 0)
    assert not mask.rows_may_be_empty
    o = attention(q, k, v, narrowed(mask, 3), implementation=backend)
    assert (o[:, 7:] == 0).all() and (o[:, :7] != 0).all()
    assert not narrowed(Mask(causal=True, rows_may_be_empty=False), 3).rows_may_be_empty
