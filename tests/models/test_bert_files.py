"""BERT's files and configurations beside transformers' own: saving, old names, ties, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import swathe
import swathe.modeling.families.bert.modeling_bert as ours
from support.tiny_bert import CLOSE, HEADS, IDS, TINY, pair, reference, same
from swathe.modeling.checkpoint.errors import CheckpointError
from swathe.modeling.errors import ConfigError
from swathe.modeling.families.bert.configuration_bert import BertConfig


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_files_go_both_ways(head: str, tied: bool, tmp_path: Path) -> None:
    theirs = reference(head, tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path / "theirs")
    model, info = getattr(ours, head).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not model.training
    same(model(IDS), theirs(IDS))
    model.save_pretrained(tmp_path / "ours")
    again = getattr(transformers, head).from_pretrained(tmp_path / "ours")
    same(model(IDS), again(IDS))
    for name, value in again.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    stored = [(tmp_path / who / "config.json").read_text() for who in ("theirs", "ours")]
    assert stored[0] == stored[1]


def test_old_names_and_prefixes_load(tmp_path: Path) -> None:
    theirs = reference("BertForPreTraining")
    theirs.config.save_pretrained(tmp_path)
    stored = {}
    for name, value in theirs.state_dict().items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        stored[name.replace("LayerNorm.bias", "LayerNorm.beta")] = value.clone()
    stored["bert.embeddings.position_ids"] = torch.arange(24)[None]
    config = json.loads((tmp_path / "config.json").read_text())
    config["position_embedding_type"] = "absolute"
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(stored, tmp_path / "model.safetensors")

    model = ours.BertForMaskedLM.from_pretrained(tmp_path)
    expected = theirs(IDS)
    torch.testing.assert_close(model(IDS).logits, expected.prediction_logits, **CLOSE)
    body = ours.BertModel.from_pretrained(tmp_path)
    same(body(IDS), theirs.bert.eval()(IDS))

    stored["bert.embeddings.LayerNorm.weight"] = torch.ones(32)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"both mean the parameter 'bert.embeddings.LayerN"):
        ours.BertForMaskedLM.from_pretrained(tmp_path)

    body.save_pretrained(tmp_path / "body")
    model, info = ours.BertForTokenClassification.from_pretrained(
        tmp_path / "body", output_loading_info=True
    )
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert info["unexpected_keys"] == {"pooler.dense.weight", "pooler.dense.bias"}
    assert torch.equal(model.bert(IDS)[0], body(IDS)[0])


def test_a_checkpoint_without_a_pooler(tmp_path: Path) -> None:
    _, model = pair("BertForMaskedLM")
    model.save_pretrained(tmp_path)
    found, info = ours.BertForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    new = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert info["missing_keys"] == new | {"classifier.weight", "classifier.bias"}
    torch.testing.assert_close(found.bert(IDS)[0], model.bert(IDS)[0], **CLOSE)
    with pytest.raises(CheckpointError, match=r"missing 'bert.pooler.dense.weight'"):
        ours.BertForSequenceClassification.from_pretrained(tmp_path, strict=True)
    body = ours.BertModel(model.config, add_pooling_layer=False)
    assert body.pooler is None and body(IDS).pooler_output is None


def test_a_body_loads_with_or_without_its_pooler(tmp_path: Path) -> None:
    theirs = reference("BertModel")
    theirs.save_pretrained(tmp_path / "with")
    pooler = {"pooler.dense.weight", "pooler.dense.bias"}
    body, info = ours.BertModel.from_pretrained(
        tmp_path / "with", add_pooling_layer=False, output_loading_info=True
    )
    assert info["unexpected_keys"] == pooler and not info["missing_keys"]
    assert body.pooler is None and body(IDS).pooler_output is None
    torch.testing.assert_close(body(IDS)[0], theirs(IDS)[0], **CLOSE)
    body.save_pretrained(tmp_path / "without")
    found, info = ours.BertModel.from_pretrained(tmp_path / "without", output_loading_info=True)
    assert info["missing_keys"] == pooler and not info["unexpected_keys"]
    assert not found.pooler.dense.bias.any() and found.pooler.dense.weight.std() > 0.1
    auto = swathe.AutoModel.from_pretrained(tmp_path / "with", add_pooling_layer=False)
    assert type(auto) is ours.BertModel and auto.pooler is None
    again = transformers.BertModel.from_pretrained(tmp_path / "without", add_pooling_layer=False)
    torch.testing.assert_close(again(IDS)[0], theirs(IDS)[0], **CLOSE)


def test_arguments_of_a_constructor_are_as_strict_as_others(tmp_path: Path) -> None:
    reference("BertModel").save_pretrained(tmp_path)
    refused = ((ours.BertModel, "add_poling_layer", r" \(did you mean 'add_pooling_layer'\?\)"),)
    for head, name, near in (*refused, (ours.BertForTokenClassification, "add_pooling_layer", "")):
        with pytest.raises(TypeError, match=f"has no argument {name!r}{near}; allowed"):
            head.from_pretrained(tmp_path, **{name: False})


def test_missing_parameters_are_initialised_and_their_siblings_kept(tmp_path: Path) -> None:
    theirs = reference("BertForMaskedLM")
    lost = {
        "bert.embeddings.LayerNorm.bias": 0.0,
        "bert.encoder.layer.1.output.LayerNorm.weight": 1.0,
        "cls.predictions.bias": 0.0,
    }
    theirs.config.save_pretrained(tmp_path)
    tied = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
    stored = {k: v for k, v in theirs.state_dict().items() if k not in (*lost, *tied)}
    save_file(stored, tmp_path / "model.safetensors")
    model, info = ours.BertForMaskedLM.from_pretrained(
        tmp_path, strict=False, output_loading_info=True
    )
    # as transformers: of a tie that nothing fills, both ends are missing
    assert info["missing_keys"] == {*lost, "cls.predictions.decoder.bias"}
    for name, value in model.state_dict().items():
        expected = lost.get("cls.predictions.bias" if name == tied[1] else name)
        if expected is not None:
            assert torch.equal(value, torch.full_like(value, expected)), name
        else:
            assert torch.equal(value, theirs.state_dict()[name]), name


def test_ties_follow_a_new_output_layer() -> None:
    _, model = pair("BertForMaskedLM")
    head, words = model.cls.predictions, model.bert.embeddings.word_embeddings
    assert head.decoder.weight is words.weight and head.decoder.bias is head.bias
    new = torch.nn.Linear(32, 99)
    model.set_output_embeddings(new)
    assert model.get_output_embeddings() is new
    assert new.weight is words.weight and new.bias is head.bias
    _, untied = pair("BertForMaskedLM", tie_word_embeddings=False)
    head = untied.cls.predictions
    assert head.decoder.weight is not untied.bert.embeddings.word_embeddings.weight


def test_fresh_weights_are_as_theirs() -> None:
    model = ours.BertForMaskedLM(BertConfig(**{**TINY, "hidden_size": 64}))
    parameters = dict(model.named_parameters())
    for name, value in parameters.items():
        if name.endswith("LayerNorm.weight"):
            assert torch.equal(value, torch.ones_like(value)), name
        elif value.dim() == 1:
            assert torch.equal(value, torch.zeros_like(value)), name
        else:
            assert 0.17 < value.std() < 0.23, name
    assert not parameters["bert.embeddings.word_embeddings.weight"][0].any()


def test_configurations() -> None:
    theirs, mine = transformers.BertConfig(), BertConfig()
    expected = theirs.to_diff_dict()
    found = mine.to_dict()
    assert {k: found[k] for k in expected if k != "transformers_version"} == {
        k: v for k, v in expected.items() if k != "transformers_version"
    }
    refused: list[tuple[dict[str, Any], str]] = [
        ({"position_embedding_type": "relative_key"}, "'relative_key' is not supported; allowed"),
        ({"add_cross_attention": True}, "add_cross_attention=True needs is_decoder=True"),
        ({"hidden_size": 30}, "hidden_size=30 is not a multiple of num_attention_heads=12"),
        ({"hidden_act": "gelu_nwe"}, r"'gelu_nwe' \(did you mean 'gelu_new'\?\)"),
        ({"pad_token_id": 30522}, "outside the vocabulary; allowed: None or 0 to"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps=0.0 is out of range"),
    ]
    for changes, message in refused:
        with pytest.raises(ConfigError, match=message):
            BertConfig(**changes)
    with pytest.raises(ConfigError, match="needs num_labels=2"):
        ours.BertForQuestionAnswering(BertConfig(**TINY, num_labels=3))
    assert "position_embedding_type" not in BertConfig(position_embedding_type="absolute").to_dict()
