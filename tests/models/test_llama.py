"""Llama beside transformers' own: logits, states, gradients, caches, masks, keys, dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import swathe.modeling.families.llama.modeling_llama as ours
from swathe.modeling.cache import DynamicCache
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.losses import causal_lm_loss

TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 74,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one kv head": {"num_key_value_heads": 1},
    "all kv heads": {"num_key_value_heads": None},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim given": {"head_dim": 32},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "odd width": {"intermediate_size": 37, "pad_token_id": 0},
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def pair(attn: str = "eager", norm: str = "auto", **changes: Any) -> tuple[Any, Any]:
    """(transformers' model, ours) with the same random weights, biases included, in eval mode."""
    torch.manual_seed(0)
    theirs_config = transformers.LlamaConfig(**{**TINY, **changes})
    theirs_config._attn_implementation = "eager"
    theirs = transformers.LlamaForCausalLM(theirs_config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.2)
    config = LlamaConfig(**{**TINY, **changes}, attn_implementation=attn, norm_implementation=norm)
    model = ours.LlamaForCausalLM(config).eval()
    model.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, model


def tokens(batch: int = 2, length: int = 11) -> Tensor:
    return torch.randint(1, 99, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_keys(variant: str, attn: str) -> None:
    theirs, model = pair(attn, **VARIANTS[variant])
    assert list(model.state_dict()) == list(theirs.state_dict())
    assert model.num_parameters() == theirs.num_parameters()
    ids = tokens()
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right", "holes", "none"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_padding(attn: str, side: str) -> None:
    theirs, model = pair(attn)
    ids = tokens(3)
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :4] = mask[1, :1] = 0
    elif side == "right":
        mask[0, 7:] = mask[2, 10:] = 0
    elif side == "holes":
        mask[1, 3] = mask[1, 6] = 0
    real = mask.bool()
    expected = theirs(ids, attention_mask=mask).logits[real]
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[real], expected, **CLOSE)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_prefill_in_chunks_then_one_by_one(attn: str) -> None:
    theirs, model = pair(attn)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    whole = theirs(ids, attention_mask=mask).logits[:, 2:]
    cache, pieces = DynamicCache(), []
    for start, end in ((0, 4), (4, 5), (5, 8), (8, 9), (9, 10), (10, 11)):
        out = model(
            ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True
        )
        assert out.past_key_values is cache and cache.get_seq_length() == end
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1)[:, 2:], whole, **CLOSE)


def test_cached_keys_equal_theirs() -> None:
    theirs, model = pair()
    ids = tokens()
    expected = theirs(ids, use_cache=True).past_key_values
    cache = model(ids, use_cache=True).past_key_values
    cache.crop(-1)
    k, v = cache.update(torch.zeros(2, 2, 0, 16), torch.zeros(2, 2, 0, 16), 1)
    torch.testing.assert_close(k, expected.layers[1].keys[:, :, :-1], **CLOSE)
    torch.testing.assert_close(v, expected.layers[1].values[:, :, :-1], **CLOSE)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_full_masks(attn: str) -> None:
    theirs, model = pair(attn)
    ids = tokens()
    T = ids.shape[1]
    causal = torch.ones(T, T).tril().bool()
    allowed = causal & (torch.rand(2, 1, T, T) > 0.3) | torch.eye(T).bool()
    added = torch.zeros(2, 1, T, T).masked_fill(~allowed, torch.finfo(torch.float32).min)
    expected = theirs(ids, attention_mask=added).logits
    for mask in (allowed, allowed.long(), allowed[:, 0], added, added[:, 0]):
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, **CLOSE)


def test_positions_embeddings_and_kept_logits() -> None:
    theirs, model = pair()
    ids, positions = tokens(), torch.arange(5, 16)[None]
    expected = theirs(ids, position_ids=positions).logits
    torch.testing.assert_close(model(ids, position_ids=positions).logits, expected, **CLOSE)
    vectors = model.get_input_embeddings()(ids)
    torch.testing.assert_close(
        model(inputs_embeds=vectors, position_ids=positions).logits, expected, **CLOSE
    )
    last = model(ids, position_ids=positions, logits_to_keep=2).logits
    torch.testing.assert_close(last, expected[:, -2:], **CLOSE)
    some = model(ids, position_ids=positions, logits_to_keep=torch.tensor([0, 3])).logits
    torch.testing.assert_close(some, expected[:, [0, 3]], **CLOSE)


def test_hidden_states_and_attentions() -> None:
    theirs, model = pair()
    ids = tokens()
    asked = {"output_hidden_states": True, "output_attentions": True}
    expected, out = theirs(ids, **asked), model(ids, **asked)
    assert len(out.hidden_states) == TINY["num_hidden_layers"] + 1
    for mine, other in zip(out.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)
    for mine, other in zip(out.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)
    as_tuple = model(ids, **asked, return_dict=False)
    assert torch.equal(as_tuple[0], out.logits) and len(as_tuple) == len(out)
    assert torch.equal(model(ids).logits, out.logits)


@pytest.mark.parametrize("norm", ["eager", "auto"])
def test_bf16_states_and_tokens(norm: str) -> None:
    theirs, model = pair("eager", norm)
    theirs, model = theirs.bfloat16(), model.bfloat16()
    # transformers rounds its frequencies too when a model is moved; the fp32 ones are put back
    theirs.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.clone()
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    ids = tokens()
    expected = theirs(ids, output_hidden_states=True)
    out = model(ids, output_hidden_states=True)
    if norm == "eager":
        for mine, other in zip(out.hidden_states, expected.hidden_states, strict=True):
            assert torch.equal(mine, other)
        assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.logits.argmax(-1), expected.logits.argmax(-1))


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_autocast(attn: str) -> None:
    theirs, model = pair(attn)
    ids = tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, logits = theirs(ids).logits, model(ids).logits
    assert logits.dtype == expected.dtype == torch.bfloat16
    exact = theirs(ids).logits
    assert (logits - exact).norm() <= 1.5 * (expected - exact).norm()


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", ["grouped", "tied", "biases"])
def test_loss_and_gradients(variant: str, attn: str) -> None:
    theirs, model = pair(attn, **VARIANTS[variant])
    ids = tokens()
    labels = ids.clone()
    labels[0, :5] = -100
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels[1, 8:] = -100
    expected = theirs.train()(ids, attention_mask=mask, labels=labels).loss
    loss = model.train()(ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss, expected, **CLOSE)
    expected.backward()
    loss.backward()
    other = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, other[name].grad, atol=1e-5, rtol=1e-4)


def test_loss_of_accumulated_batches_and_of_nothing() -> None:
    theirs, model = pair()
    ids = tokens()
    expected = theirs(ids, labels=ids, num_items_in_batch=torch.tensor(50)).loss
    loss = model(ids, labels=ids, num_items_in_batch=torch.tensor(50)).loss
    torch.testing.assert_close(loss, expected, **CLOSE)
    shifted = torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(
        model(ids, shift_labels=shifted).loss, model(ids, labels=ids).loss, **CLOSE
    )
    one = torch.full_like(ids, -100)
    one[0, 3] = 5
    torch.testing.assert_close(model(ids, labels=one).loss, theirs(ids, labels=one).loss, **CLOSE)
    nothing = causal_lm_loss(model(ids).logits, torch.full_like(ids, -100))
    assert nothing.item() == 0.0
    with pytest.raises(ValueError, match=r"labels are \(2, 10\) and logits \(2, 11, 99\)"):
        model(ids, labels=ids[:, :10])


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_gradient_checkpointing_is_bitwise_equal(attn: str, every: int) -> None:
    _, model = pair(attn)
    model.train()
    ids, found = tokens(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
        assert model.is_gradient_checkpointing is checkpointing
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with pytest.raises(ValueError, match="does not go with gradient checkpointing"):
        model(ids, use_cache=True)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_compiles_in_one_graph(attn: str) -> None:
    _, model = pair(attn, num_hidden_layers=1)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    torch.compiler.reset()
    compiled = torch.compile(model.model, backend="aot_eager", fullgraph=True)
    for options in ({}, {"attention_mask": mask}):
        out = compiled(ids, use_cache=False, **options)
        expected = model.model(ids, use_cache=False, **options)
        real = mask.bool()
        torch.testing.assert_close(
            out.last_hidden_state[real], expected.last_hidden_state[real], **CLOSE
        )


@pytest.mark.parametrize("variant", ["grouped", "tied", "biases", "llama3 rope"])
def test_files_go_both_ways(variant: str, tmp_path: Path) -> None:
    theirs, _ = pair(**VARIANTS[variant])
    ids = tokens()
    theirs.save_pretrained(tmp_path / "theirs")
    model, info = ours.LlamaForCausalLM.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not model.training
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, **CLOSE)

    model.save_pretrained(tmp_path / "ours")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits, **CLOSE)
    for name, value in again.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    stored = [(tmp_path / who / "config.json").read_text() for who in ("theirs", "ours")]
    assert stored[0] == stored[1]
