"""DummyBert beside transformers' BERT: encoder, decoder over an encoder, gradients, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import swathe
from support.dummy_bert import (
    BACKENDS,
    CROSSED,
    KINDS,
    LOOSE,
    RIGHT,
    SEEN,
    STATES,
    S,
    assert_same,
    dummy,
    pair,
    renamed,
)
from support.tiny_bert import CLOSE, IDS, TINY, TYPES, B, T
from swathe.kernels.core.errors import UnsupportedFeature
from swathe.modeling.errors import ConfigError
from swathe.modeling.examples import dummy_bert
from swathe.modeling.examples.dummy_bert import DummyBertConfig, DummyBertModel

HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
LABELS: dict[str, dict[str, torch.Tensor]] = {
    "ForMaskedLM": {"labels": torch.where(TYPES > 0, IDS, -100)},
    "ForSequenceClassification": {"labels": torch.tensor([1, 0, 1])},
    "ForTokenClassification": {"labels": TYPES.clamp(max=1)},
    "ForQuestionAnswering": {
        "start_positions": torch.tensor([2, 0, 5]),
        "end_positions": torch.tensor([4, 50, 5]),
    },
}
ENCODER = {"encoder_hidden_states": STATES, "encoder_attention_mask": SEEN}


# beside BERT


@pytest.mark.parametrize("attn", BACKENDS)
@pytest.mark.parametrize("head", HEADS)
def test_encoder_equals_bert(head: str, attn: str) -> None:
    theirs, model = pair(head, attn)
    names = renamed(theirs.state_dict(), "bert.", "dummy_bert.")
    assert list(model.state_dict()) == list(names)
    asked: dict[str, Any] = {"attention_mask": RIGHT, "token_type_ids": TYPES}
    asked |= {"output_hidden_states": True, "output_attentions": attn == "eager"}
    assert_same(model(IDS, **asked), theirs(IDS, **asked), **LOOSE)


@pytest.mark.parametrize("attn", BACKENDS)
@pytest.mark.parametrize("head", HEADS[1:])
def test_losses_and_every_gradient_equal_berts(head: str, attn: str) -> None:
    theirs, model = pair(head, attn)
    inputs = {"attention_mask": RIGHT, "token_type_ids": TYPES, **LABELS[head]}
    expected, found = theirs.train()(IDS, **inputs).loss, model.train()(IDS, **inputs).loss
    torch.testing.assert_close(found, expected, **CLOSE)
    assert_same_gradients(theirs, model, expected, found)


def assert_same_gradients(theirs: Any, model: Any, expected: Any, found: Any) -> None:
    expected.backward()
    found.backward()
    other = renamed(dict(theirs.named_parameters()), "bert.", "dummy_bert.")
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(
            parameter.grad, other[name].grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n} {m}"
        )


@pytest.mark.parametrize("head", HEADS[1:])
def test_heads_of_a_decoder_equal_berts(head: str) -> None:
    theirs, model = pair(head, is_decoder=True)
    inputs = {"attention_mask": RIGHT, **LABELS[head]}
    assert_same(model(IDS, **inputs), theirs(IDS, **inputs), **LOOSE)


@pytest.mark.parametrize("attn", BACKENDS)
@pytest.mark.parametrize("padded", [False, True])
def test_decoder_over_an_encoder_equals_berts(padded: bool, attn: str) -> None:
    theirs, model = pair("Model", attn, **CROSSED)
    assert list(model.state_dict()) == list(theirs.state_dict())
    asked: dict[str, Any] = {"output_attentions": attn == "eager", "use_cache": False}
    asked |= {**ENCODER, "attention_mask": RIGHT} if padded else {"encoder_hidden_states": STATES}
    found = model(IDS, output_hidden_states=True, **asked)
    assert_same(found, theirs(IDS, output_hidden_states=True, **asked), **LOOSE)
    if attn == "eager":
        assert len(found.cross_attentions) == 2
        assert found.cross_attentions[0].shape == (B, 4, T, S)
    # neither is passed over in silence
    alone, blind = model(IDS, use_cache=False)[0], model(IDS, **{**asked, **ENCODER})[0]
    assert not torch.allclose(alone, found[0]) and (padded or not torch.allclose(blind, found[0]))
    assert_same(model(IDS, use_cache=False), theirs(IDS, use_cache=False), **LOOSE)


@pytest.mark.parametrize("attn", BACKENDS)
def test_every_gradient_of_a_decoder_equals_berts(attn: str) -> None:
    theirs, model = pair("Model", attn, **CROSSED)
    losses, given = [], []
    for one in (theirs, model):
        states = STATES.clone().requires_grad_()
        inputs = {**ENCODER, "encoder_hidden_states": states, "attention_mask": RIGHT}
        output = one.train()(IDS, use_cache=False, **inputs)
        losses.append(output.last_hidden_state.square().mean() + output.pooler_output.mean())
        given.append(states)
    assert_same_gradients(theirs, model, *losses)
    torch.testing.assert_close(given[1].grad, given[0].grad, **CLOSE)
    assert given[1].grad[0].any() and not given[1].grad[1, 3:].any()


def test_masked_language_model_over_an_encoder_equals_berts() -> None:
    theirs, model = pair("ForMaskedLM", **CROSSED)
    inputs = {"attention_mask": RIGHT, **ENCODER, **LABELS["ForMaskedLM"]}
    expected = theirs(IDS, **inputs)
    found = model(IDS, **inputs)
    torch.testing.assert_close(found.logits, expected.logits, **LOOSE)
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)


@pytest.mark.parametrize("form", ["bool", "three", "four", "added", "rows"])
def test_forms_of_the_encoders_mask(form: str) -> None:
    model = dummy(**CROSSED)
    rows = SEEN[:, None, None].expand(B, 1, T, S).bool()
    forms: dict[str, torch.Tensor] = {
        "bool": SEEN.bool(),
        "three": SEEN[:, None],
        "four": SEEN[:, None, None].bool(),
        "added": torch.zeros(B, 1, 1, S).masked_fill(~SEEN[:, None, None].bool(), float("-inf")),
        "rows": rows,
    }
    expected = model(IDS, **ENCODER)[0]
    found = model(IDS, encoder_hidden_states=STATES, encoder_attention_mask=forms[form])[0]
    torch.testing.assert_close(found, expected, **CLOSE)
    if form == "rows":
        # a row may have a mask of its own: the last one sees nothing but the first state
        rows = rows.clone()
        rows[:, :, -1] = torch.arange(S) == 2
        found = model(IDS, encoder_hidden_states=STATES, encoder_attention_mask=rows)[0]
        torch.testing.assert_close(found[:, :-1], expected[:, :-1], **CLOSE)
        assert not torch.allclose(found[:, -1], expected[:, -1], atol=1e-3)


def test_dropout_falls_where_berts_does() -> None:
    rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
    found = []
    for module in pair("Model", **rates, **CROSSED):
        torch.manual_seed(5)
        found.append(module.train()(IDS, use_cache=False, **ENCODER)[0])
    torch.testing.assert_close(found[1], found[0], **CLOSE)
    assert not torch.allclose(found[1], module.eval()(IDS, **ENCODER)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_recomputation_change_nothing(kind: str) -> None:
    options = {**CROSSED, "position_embedding_type": kind}
    plain, chunked = dummy(**options), dummy(**options, chunk_size_feed_forward=3)
    found = plain(IDS, **ENCODER)[0]
    torch.testing.assert_close(chunked(IDS, **ENCODER)[0], found, atol=1e-6, rtol=1e-6)
    gradients = []
    for model in (plain, dummy(**options)):
        if model is not plain:
            model.gradient_checkpointing_enable()
        model.train()(IDS, **ENCODER)[0].square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with pytest.raises(ValueError, match="use_cache=True does not go with gradient checkpointing"):
        model(IDS, use_cache=True)


# files


@pytest.mark.parametrize("head", HEADS)
def test_files_go_both_ways(head: str, tmp_path: Path) -> None:
    theirs, model = pair(head)
    model.save_pretrained(tmp_path / "ours")
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert not any(name.endswith("decoder.weight") for name in stored)
    theirs.config.save_pretrained(tmp_path / "theirs")
    back = renamed(stored, "dummy_bert.", "bert.")
    save_file(back, tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
    again = getattr(transformers, f"Bert{head}").from_pretrained(tmp_path / "theirs")
    assert_same(model(IDS), again(IDS))

    save_file(renamed(back, "bert.", "dummy_bert."), tmp_path / "ours" / "model.safetensors")
    loaded, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(loaded(IDS), theirs(IDS))


def test_ties_of_the_masked_language_model() -> None:
    model = dummy("ForMaskedLM")
    head, words = model.cls.predictions, model.dummy_bert.embeddings.word_embeddings
    assert head.decoder.weight is words.weight and head.decoder.bias is head.bias
    model.resize_token_embeddings(120)
    assert head.decoder.weight is words.weight and head.bias.shape == (120,)
    assert model(IDS).logits.shape == (B, T, 120)
    untied = dummy("ForMaskedLM", tie_word_embeddings=False)
    words = untied.get_input_embeddings()
    assert untied.cls.predictions.decoder.weight is not words.weight


RECIPES: dict[str, dict[str, Any]] = {
    "half precision": {"torch_dtype": torch.bfloat16, "device_map": "auto"},
    "modules by name": {"device_map": {"": "cpu"}},
    "attention backend": {"attn_implementation": "sdpa"},
    "memory": {"offload_state_dict": True},
    "no pooler": {"add_pooling_layer": False},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_of_loading(
    recipe: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swathe.modeling.auto._registered", {})
    dummy_bert.register()
    model = dummy(position_embedding_type=kind)
    model.save_pretrained(tmp_path)
    loaded = swathe.AutoModel.from_pretrained(tmp_path, **RECIPES[recipe])
    assert type(loaded) is DummyBertModel and not loaded.training
    assert loaded.config.position_embedding_type == kind
    assert loaded.dtype == RECIPES[recipe].get("torch_dtype", torch.float32)
    assert (loaded.pooler is None) == (recipe == "no pooler")
    if recipe == "attention backend":
        assert {r.backend for r in loaded.kernel_report().rows if r.op == "attention"} == {"sdpa"}
    found, expected = loaded(IDS.to(loaded.device))[0].float().cpu(), model(IDS)[0]
    allowed = 0.05 if loaded.dtype == torch.bfloat16 else 1e-5
    assert (found - expected).norm() <= allowed * expected.norm()


def test_auto_classes_find_every_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swathe.modeling.auto._registered", {})
    config = DummyBertConfig(**TINY)
    with pytest.raises(ConfigError, match="'dummy_bert' is not known"):
        swathe.AutoModel.from_config(config)
    dummy_bert.register()
    for head in HEADS:
        auto = getattr(swathe, f"AutoModel{head.removeprefix('Model')}")
        assert type(auto.from_config(config)) is getattr(dummy_bert, f"DummyBert{head}")
    with pytest.raises(ValueError, match="'dummy_bert' exists"):
        dummy_bert.register()


# what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding_type": "relative"}, "position_embedding_type"),
        ({"position_embeding_type": "absolute"}, "did you mean 'position_embedding_type'"),
        ({"add_cross_attention": True}, "add_cross_attention=True needs is_decoder=True"),
        ({"num_attention_heads": 5}, "hidden_size=32 is not a multiple of num_attention_heads=5"),
    ],
)
def test_config_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DummyBertConfig(**{**TINY, **changes})


def test_config_goes_round(tmp_path: Path) -> None:
    for kind in KINDS:
        config = DummyBertConfig(**TINY, **CROSSED, position_embedding_type=kind)
        config.save_pretrained(tmp_path)
        assert DummyBertConfig.from_pretrained(tmp_path) == config
        assert f'"position_embedding_type": "{kind}"' in (tmp_path / "config.json").read_text()


def test_arguments_that_do_not_fit() -> None:
    reads, plain, encoder = dummy(**CROSSED), dummy(is_decoder=True), dummy()
    wide = torch.ones(B, S, 33)
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (encoder, {"head_mask": torch.ones(2, 4)}, "zero its columns of attention.output.dense"),
        (encoder, {"use_cache": True}, "no use_cache: an encoder sees all .*is_decoder=True"),
        (encoder, ENCODER, "need cross-attention.*is_decoder=True, add_cross_attention=True"),
        (plain, ENCODER, "need cross-attention.*is_decoder=True, add_cross_attention=True"),
        (reads, {"encoder_attention_mask": SEEN}, "without encoder_hidden_states; pass both"),
        (reads, {"encoder_hidden_states": wide}, r"has shape \(3, 7, 33\); 3 sequences need \(3"),
        (reads, {"encoder_hidden_states": STATES[:2]}, r"has shape \(2, 7, 32\); 3 sequences"),
        (reads, {**ENCODER, "encoder_attention_mask": RIGHT}, r"mask has shape \(3, 11\), but 3"),
        (reads, {**ENCODER, "encoder_attention_mask": SEEN * 2}, "values other than 0 and 1"),
        (reads, {"input_ids": torch.ones(1, 25).long()}, "have 25 tokens; the model has positions"),
    ]
    for model, arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            model(**{"input_ids": IDS, **arguments})
    with pytest.raises(UnsupportedFeature, match="no encoder_hidden_states: the body of a decoder"):
        dummy("ForTokenClassification", **CROSSED)(IDS, **ENCODER)


def test_what_stands_in_for_head_mask() -> None:
    """The refusal's advice: without its columns of the output's weight a head adds nothing."""
    model = dummy()
    first = model.encoder.layer[0].attention
    with torch.no_grad():
        first.output.dense.weight[:, 8:16] = 0.0
    expected = model(IDS)[0]
    with torch.no_grad():
        first.self.value.weight[8:16].normal_()  # the second head's values
    assert torch.equal(model(IDS)[0], expected)
