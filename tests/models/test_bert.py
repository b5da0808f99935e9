"""BERT beside transformers' own: logits, states, losses, gradients, masks, keys, dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import swathe
from support.tiny_bert import CLOSE, HEADS, IDS, TINY, TYPES, B, T, pair, same
from swathe.kernels.attention.api import Mask
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.modeling.cache import DynamicCache
from swathe.modeling.masks import bidirectional_mask

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "gelu_new": {"hidden_act": "gelu_new"},
    "chunks": {"chunk_size_feed_forward": 1},
    "no padding id": {"pad_token_id": None},
    "coarse eps": {"layer_norm_eps": 1e-3},
}
PADDING = {
    "none": torch.ones(B, T),
    "right": torch.tensor([[1] * 11, [1] * 4 + [0] * 7, [1] * 10 + [0]]),
    "left": torch.tensor([[0] * 3 + [1] * 8, [1] * 11, [0] * 10 + [1]]),
    "holes": torch.tensor([[1] * 11, [1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1], [0, 1, 0, 1] + [1] * 7]),
}


def labels_for(head: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    if head == "BertForMaskedLM":
        labels = torch.where(torch.rand(B, T, generator=generator) < 0.5, IDS, -100)
        return {"labels": labels}
    if head == "BertForSequenceClassification":
        return {"labels": torch.tensor([1, 0, 1])}
    if head == "BertForTokenClassification":
        labels = torch.randint(0, 2, (B, T), generator=generator)
        labels[1, 4:] = -100
        return {"labels": labels}
    return {"start_positions": torch.tensor([2, 0, 5]), "end_positions": torch.tensor([4, 50, 5])}


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("head", HEADS)
def test_outputs_and_keys(head: str, variant: str, attn: str) -> None:
    theirs, model = pair(head, attn, **VARIANTS[variant])
    assert list(model.state_dict()) == list(theirs.state_dict())
    assert model.num_parameters() == theirs.num_parameters()
    inputs = {"attention_mask": PADDING["right"], "token_type_ids": TYPES}
    same(model(IDS, **inputs), theirs(IDS, **inputs))
    same(model(IDS), theirs(IDS))


@pytest.mark.parametrize("side", PADDING)
@pytest.mark.parametrize("attn", ["eager", "sdpa", "triton"])
def test_padding(attn: str, side: str) -> None:
    theirs, model = pair("BertModel", attn)
    mask = PADDING[side]
    expected = theirs(IDS, attention_mask=mask).last_hidden_state
    for form in (mask, mask.bool(), mask[:, None].long(), mask[:, None, None].bool()):
        found = model(IDS, attention_mask=form).last_hidden_state
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_full_masks(attn: str) -> None:
    theirs, model = pair("BertModel", attn)
    allowed = (torch.rand(B, 1, T, T) > 0.4) | torch.eye(T).bool()
    added = torch.zeros(B, 1, T, T).masked_fill(~allowed, torch.finfo(torch.float32).min)
    expected = theirs(IDS, attention_mask=added).last_hidden_state
    for mask in (allowed, allowed.long(), allowed[:, 0], added, added[:, 0], Mask(allowed=allowed)):
        found = model(IDS, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(found, expected, **CLOSE)
    soft = torch.randn(B, 1, 1, T)
    expected = theirs(IDS, attention_mask=soft).last_hidden_state
    torch.testing.assert_close(model(IDS, attention_mask=soft).last_hidden_state, expected, **CLOSE)
    for shape in ((B, 1, 1, T), (B, 1, T, T), (B, T, T)):
        with pytest.raises(ValueError, match=r"holds only 0 and 1, which.*pass mask.bool\(\)"):
            model(IDS, attention_mask=(torch.rand(shape) > 0.5).float())


@pytest.mark.parametrize("attn", ["eager", "sdpa", "triton"])
def test_a_sequence_of_padding_alone_disturbs_nobody(attn: str) -> None:
    _, model = pair("BertModel", attn)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1] = 0
    vectors = model.get_input_embeddings()(IDS).detach().requires_grad_()
    hidden = model(inputs_embeds=vectors, attention_mask=mask).last_hidden_state
    alone = model(IDS[[0, 2]]).last_hidden_state
    torch.testing.assert_close(hidden[[0, 2]], alone, atol=2e-5, rtol=2e-5)
    hidden.square().sum().backward()
    assert hidden.isfinite().all() and vectors.grad is not None and vectors.grad.isfinite().all()
    # nothing is attended to, so that only the biases and the residual stream remain
    _, eager = pair("BertModel")
    expected = eager(IDS, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(hidden, expected, atol=2e-5, rtol=2e-5)
    first = model.encoder.layer[0].attention.self
    assert not first(vectors, bidirectional_mask(mask, vectors))[0][1].any()


def test_positions_types_and_embeddings() -> None:
    theirs, model = pair("BertModel")
    positions = torch.arange(T).flip(0)[None]
    given = {"position_ids": positions, "token_type_ids": TYPES}
    expected = theirs(IDS, **given)
    same(model(IDS, **given), expected)
    same(model(IDS, position_ids=positions.expand(B, T), token_type_ids=TYPES), expected)
    same(model(inputs_embeds=model.get_input_embeddings()(IDS), **given), expected)
    one = TYPES[:1]
    assert torch.equal(
        model(IDS, token_type_ids=one)[0], model(IDS, token_type_ids=one.expand(B, T))[0]
    )


def test_states_weights_and_tuples() -> None:
    theirs, model = pair("BertForMaskedLM")
    asked = {"output_hidden_states": True, "output_attentions": True}
    out = model(IDS, attention_mask=PADDING["right"], **asked)
    same(out, theirs(IDS, attention_mask=PADDING["right"], **asked))
    assert len(out.hidden_states) == TINY["num_hidden_layers"] + 1
    as_tuple = model(IDS, attention_mask=PADDING["right"], **asked, return_dict=False)
    assert torch.equal(as_tuple[0], out.logits) and len(as_tuple) == len(out)
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedFeature, match=r'set_attn_implementation\("eager"\) first'):
        model(IDS, output_attentions=True)


@pytest.mark.parametrize("attn", ["eager", "sdpa", "triton"])
@pytest.mark.parametrize("head", HEADS[1:])
def test_losses_and_every_gradient(head: str, attn: str) -> None:
    theirs, model = pair(head, attn)
    if attn == "triton":
        model.set_kernels(norm="triton")
    inputs = {"attention_mask": PADDING["right"], "token_type_ids": TYPES, **labels_for(head)}
    expected, out = theirs.train()(IDS, **inputs), model.train()(IDS, **inputs)
    torch.testing.assert_close(out.loss, expected.loss, **CLOSE)
    expected.loss.backward()
    out.loss.backward()
    other = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(
            parameter.grad, other[name].grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n} {m}"
        )


@pytest.mark.parametrize("count", [1, 4])
def test_problem_types_alternate(count: int) -> None:
    theirs, model = pair("BertForSequenceClassification", num_labels=count)
    given = [torch.rand(B)] if count == 1 else [torch.tensor([0, 3, 1]), torch.rand(B, 4)]
    for labels in (*given, *given):
        theirs.config.problem_type = None  # which they would keep from the batch before
        torch.testing.assert_close(
            model(IDS, labels=labels).loss, theirs(IDS, labels=labels).loss, **CLOSE
        )
        assert model.config.problem_type is None
    numbers = torch.rand(B, count)
    theirs.config.problem_type = model.config.problem_type = "regression"
    torch.testing.assert_close(
        model(IDS, labels=numbers).loss, theirs(IDS, labels=numbers).loss, **CLOSE
    )


def test_fused_masked_lm_loss() -> None:
    _, model = pair("BertForMaskedLM")
    inputs = {"attention_mask": PADDING["right"], **labels_for("BertForMaskedLM")}
    expected = model.train()(IDS, **inputs).loss
    grads = torch.autograd.grad(expected, list(model.parameters()))
    model.config.loss_implementation = "eager"
    out = model(IDS, **inputs)
    assert out.logits is None and model.eval()(IDS, **inputs).logits is not None
    torch.testing.assert_close(out.loss, expected, **CLOSE)
    fused = torch.autograd.grad(out.loss, list(model.parameters()))
    for one, other in zip(fused, grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    count = (inputs["labels"] != -100).sum()
    halved = model(IDS, **inputs, num_items_in_batch=2 * count).loss
    torch.testing.assert_close(halved, expected / 2, **CLOSE)


@pytest.mark.parametrize("head", HEADS)
def test_bf16_is_a_few_roundings_away(head: str) -> None:
    theirs, model = pair(head)
    exact = theirs.double()(IDS, attention_mask=PADDING["right"])[0]
    theirs, model = theirs.to(torch.bfloat16), model.to(torch.bfloat16)
    expected = theirs(IDS, attention_mask=PADDING["right"])[0]
    found = model(IDS, attention_mask=PADDING["right"])[0]
    assert found.dtype == torch.bfloat16
    error, allowed = ((t.double() - exact).norm() / exact.norm() for t in (found, expected))
    assert error <= max(1.25 * allowed, 2**-8), (error, allowed)
    assert (found.double() - expected.double()).norm() / exact.norm() <= 1.25 * allowed


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_autocast(attn: str) -> None:
    theirs, model = pair("BertForMaskedLM", attn)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, logits = theirs(IDS).logits, model(IDS).logits
    assert logits.dtype == expected.dtype == torch.bfloat16
    exact = theirs(IDS).logits
    assert (logits - exact).norm() <= 1.5 * (expected - exact).norm()


@pytest.mark.parametrize("classifier", [None, 0.5])
@pytest.mark.parametrize("head", HEADS)
def test_dropout_falls_where_theirs_does(head: str, classifier: float | None) -> None:
    rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
    theirs, model = pair(head, **rates, classifier_dropout=classifier)
    found = []
    for module in (theirs, model):
        torch.manual_seed(5)
        found.append(module.train()(IDS, attention_mask=PADDING["right"])[0])
    torch.testing.assert_close(found[1], found[0], **CLOSE)
    assert not torch.allclose(found[1], model.eval()(IDS, attention_mask=PADDING["right"])[0])


@pytest.mark.parametrize("attn", ["sdpa", "triton"])
def test_attention_drops_weights_on_every_backend(attn: str) -> None:
    _, model = pair("BertModel", attn, attention_probs_dropout_prob=0.5)
    one, other = (model.train()(IDS).last_hidden_state for _ in range(2))
    assert not torch.equal(one, other)
    assert torch.equal(model.eval()(IDS).last_hidden_state, model(IDS).last_hidden_state)


@pytest.mark.parametrize("every", [1, 2])
def test_gradient_checkpointing_with_dropout_is_bitwise_equal(every: int) -> None:
    _, model = pair("BertForMaskedLM", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2)
    model.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(every_n_layers=every)
        assert model.is_gradient_checkpointing is checkpointing
        model.zero_grad()
        torch.manual_seed(5)
        model(IDS, labels=IDS).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    assert torch.equal(model.eval()(IDS).logits, model(IDS).logits)


def test_a_chunked_mlp_changes_nothing() -> None:
    _, model = pair("BertModel")
    _, chunked = pair("BertModel", chunk_size_feed_forward=4)
    torch.testing.assert_close(chunked(IDS)[0], model(IDS)[0], **CLOSE)


def test_switching_backends() -> None:
    _, model = pair("BertModel", "eager")
    expected = model(IDS)[0]
    for attn, norm in (("sdpa", "eager"), ("triton", "triton"), ("eager", "auto")):
        model.set_attn_implementation(attn)
        model.set_kernels(norm=norm)
        report = {(row.op, row.backend) for row in model.kernel_report().rows}
        assert ("attention", attn) in report and (norm == "auto" or ("layer_norm", norm) in report)
        torch.testing.assert_close(model(IDS)[0], expected, atol=2e-5, rtol=2e-5)
    with pytest.raises(ValueError, match="did you mean 'sdpa'"):
        model.set_attn_implementation("sdpaa")


def test_a_warm_up_stays_within_the_positions() -> None:
    _, model = pair("BertForMaskedLM")
    assert swathe.warmup(model, tokens=(1, 16, 128, 1024)).runs == 3
    model.config.loss_implementation = "eager"
    assert swathe.warmup(model, tokens=(4,), training=True).runs == 1
    _, classifier = pair("BertForSequenceClassification")
    classifier.config.loss_implementation = "eager"
    assert swathe.warmup(classifier, tokens=(4,), training=True).runs == 1


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_compiles_in_one_graph(attn: str) -> None:
    _, model = pair("BertModel", attn, num_hidden_layers=1)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for options in ({}, {"attention_mask": PADDING["right"], "token_type_ids": TYPES}):
        torch.testing.assert_close(compiled(IDS, **options)[0], model(IDS, **options)[0], **CLOSE)


def test_arguments_that_do_not_fit() -> None:
    _, model = pair("BertModel")
    long = torch.ones(1, 25, dtype=torch.long)
    refused: list[tuple[dict[str, Any], str]] = [
        ({}, "You must specify exactly one of input_ids or inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": torch.ones(B, T, 32)}, "exactly one of input_ids"),
        ({"input_ids": long}, "have 25 tokens; the model has positions for max_position_emb"),
        ({"input_ids": IDS, "position_ids": torch.arange(20, 31)}, "position_ids go from 20 to 30"),
        ({"input_ids": IDS, "token_type_ids": TYPES + 1}, "token_type_ids go from 1 to 3; .*=3"),
        ({"input_ids": IDS, "token_type_ids": TYPES[:2]}, r"token_type_ids has shape \(2, 11\)"),
        ({"input_ids": IDS, "attention_mask": PADDING["none"].T}, r"has shape \(11, 3\), but 3"),
        ({"input_ids": IDS, "head_mask": torch.ones(2, 4)}, "zero its columns of attention.output"),
        ({"input_ids": IDS, "encoder_hidden_states": torch.ones(B, 5, 32)}, "need cross-attention"),
        ({"input_ids": IDS, "use_cache": True}, "no use_cache: an encoder sees all tokens at once"),
        ({"input_ids": IDS, "past_key_values": DynamicCache()}, "no past_key_values: an encoder"),
    ]
    for arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            model(**arguments)
    with pytest.raises(TypeError, match=r"no argument 'attn_mask' .did you mean 'attention_mask'"):
        model(IDS, attn_mask=PADDING["none"])
    _, classifier = pair("BertForSequenceClassification")
    with pytest.raises(UnsupportedFeature, match="no past_key_values: heads read whole texts"):
        classifier(IDS, past_key_values=DynamicCache())


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_a_decoder_reads_an_encoder(attn: str) -> None:
    """Caches and masks of both are in test_dummy_bert.py, which computes by the same code."""
    theirs, model = pair("BertModel", attn, is_decoder=True, add_cross_attention=True)
    states, seen = torch.randn(B, 5, 32), torch.tensor([[1] * 5, [1] * 2 + [0] * 3, [0] + [1] * 4])
    inputs = {"attention_mask": PADDING["right"], "use_cache": False}
    inputs |= {"encoder_hidden_states": states, "encoder_attention_mask": seen}
    same(model(IDS, **inputs), theirs(IDS, **inputs))
    found = model(IDS[:, :4], encoder_hidden_states=states, encoder_attention_mask=seen)
    more = model(IDS[:, 4:], encoder_attention_mask=seen, past_key_values=found.past_key_values)
    whole = model(IDS, encoder_hidden_states=states, encoder_attention_mask=seen)
    torch.testing.assert_close(more[0], whole[0][:, 4:], **CLOSE)
