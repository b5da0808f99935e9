"""Every field of every family to transformers' AutoConfig and back; what is refused, and why."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from support.classes import CLASSES, MODEL_TYPES, build, config_of, tiny
from swathe.modeling.auto import AutoConfig, AutoModelForCausalLM, model_class
from swathe.modeling.errors import ConfigError
from swathe.modeling.families.bert.configuration_bert import BertConfig
from swathe.modeling.families.llama.configuration_llama import LlamaConfig

every_family = pytest.mark.parametrize("family", MODEL_TYPES)
VALUES: dict[str, Any] = {
    "hidden_act": "relu",
    "hidden_activation": "relu",
    "problem_type": "regression",
    "dtype": "bfloat16",
    "architectures": ["X"],
    "id2label": {0: "x", 1: "y", 2: "z"},
    "eos_token_id": [1, 2],
    "layer_types": None,  # tied to the number of layers and to the window, see test_families
    "label2id": {"x": 0, "y": 1},
    "rope_parameters": None,  # tests/models/test_rope.py
    "pad_token_id": 3,
    "head_dim": 8,
    "use_bidirectional_attention": True,
    "attn_logit_softcapping": 20.0,
    "final_logit_softcapping": 20.0,
    "classifier_dropout": 0.5,
}
# fields that ask for what is not there; everything else must come through
REFUSED = {
    "pretraining_tp": "the only value allowed is 1",
    "chunk_size_feed_forward": "the only value allowed is 0",
    "use_bidirectional_attention": "is not supported by this causal family",
    "add_cross_attention": "needs is_decoder=True",
    "attn_logit_softcapping": "the only value allowed is None",
}
SERVED = {
    "gemma2": {"attn_logit_softcapping"},
    "bert": {"chunk_size_feed_forward"},
}


def theirs_of(family: str) -> Any:
    return type(transformers.AutoConfig.for_model(family))


def another(name: str, value: Any) -> Any:
    """A value that differs from the tiny configuration's and is valid; None to leave it."""
    if name in VALUES:
        return VALUES[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value * 2 or 3
    if isinstance(value, float):
        return value / 2 or 0.25
    return 1 if value is None else None


def read_by_transformers(directory: Path) -> dict[str, Any]:
    found = transformers.AutoConfig.from_pretrained(directory).to_dict()
    found.pop("_name_or_path", None)
    return found


@every_family
def test_every_field_goes_both_ways(family: str, tmp_path: Path) -> None:
    theirs_class, base = theirs_of(family), tiny(family)
    fields = set(theirs_class(**copy.deepcopy(base)).to_dict()) - {"transformers_version"}
    tried = set()
    for name in sorted(n for n in fields if not n.startswith("_") and n != "model_type"):
        value = another(name, getattr(theirs_class(**copy.deepcopy(base)), name))
        if value is None:
            continue
        try:
            config = theirs_class(**copy.deepcopy({**base, name: value}))
            config.save_pretrained(tmp_path / name / "theirs")
        except ValueError:  # their own rules, such as output_attentions with sdpa
            continue
        if name in REFUSED and name not in SERVED.get(family, ()):
            with pytest.raises(ConfigError, match=REFUSED[name]):
                AutoConfig.from_pretrained(tmp_path / name / "theirs")
            continue
        own = AutoConfig.from_pretrained(tmp_path / name / "theirs")
        own.save_pretrained(tmp_path / name / "ours")
        expected = read_by_transformers(tmp_path / name / "theirs")
        found = read_by_transformers(tmp_path / name / "ours")
        # what an older transformers does not know comes through besides
        assert {k: found.get(k, "absent") for k in expected} == expected, name
        assert AutoConfig.from_pretrained(tmp_path / name / "ours") == own, name
        assert all(key.startswith("_") for key in own.extra), name
        rest = {k: v for k, v in base.items() if k != own.attribute_map.get(name)}
        given = type(own)(**copy.deepcopy({**rest, name: value}))
        mine, other = given.to_dict(), config.to_dict()
        shared = (mine.keys() & other.keys()) - {"transformers_version"}
        assert {k: mine[k] for k in shared} == {k: other[k] for k in shared}, name
        tried.add(name)
    assert {"vocab_size", "id2label", "dtype", "eos_token_id", "num_attention_heads"} <= tried
    assert len(tried) >= 15


@every_family
def test_a_dict_gives_the_configuration_again(family: str) -> None:
    for changes in ({}, {"num_labels": 3}, {"id2label": {0: "no", 1: "yes"}}, {"dtype": "float16"}):
        config = config_of(family, **changes)
        for again in (
            type(config).from_dict(config.to_dict()),
            type(config).from_dict(json.loads(config.to_json_string())),
            type(config).from_dict(json.loads(config.to_json_string(use_diff=False))),
            config.replace(),
        ):
            assert again == config and again.id2label == config.id2label
            assert again.label2id == config.label2id
        switched = config.replace(attn_implementation="eager", kernels="eager")
        assert switched == config
        assert not [k for k in switched.to_dict() if "implementation" in k or k == "kernels"]
    assert config.get_text_config() is config
    assert config.keys_to_ignore_at_inference == ([] if family == "bert" else ["past_key_values"])


@pytest.mark.parametrize("name", CLASSES)
def test_architectures_choose_the_class_again(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == [name]
    model_type, head = CLASSES[name]
    assert model_class(model_type, head, config.architectures).__name__ == name


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_both_names_of_the_experts(family: str) -> None:
    config = config_of(family)
    assert config.num_local_experts is config.num_experts
    config.num_experts = 6
    assert config.num_local_experts == 6
    assert config_of(family, num_experts=5, num_local_experts=5).num_local_experts == 5
    with pytest.raises(ConfigError, match="another name of the same field; give one of them only"):
        config_of(family, num_experts=5, num_local_experts=6)


def test_label_names_are_theirs() -> None:
    assert LlamaConfig(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    named = LlamaConfig(id2label={"0": "no", "1": "yes"})
    assert named.id2label == {0: "no", 1: "yes"} and named.label2id == {"no": 0, "yes": 1}
    named.id2label = {0: "a", 1: "b", 2: "c"}
    assert named.num_labels == 3 and named.label2id == {"a": 0, "b": 1, "c": 2}
    named.label2id = {"A": 0}
    assert named.label2id == {"A": 0}


def test_counted_and_named_labels_that_disagree(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match="num_labels=5, but id2label names 2; give one of them"):
        LlamaConfig(num_labels=5, id2label={0: "no", 1: "yes"})
    assert LlamaConfig(num_labels=2, id2label={0: "no", 1: "yes"}).label2id == {"no": 0, "yes": 1}
    stored = {"model_type": "llama", "num_labels": 3, "id2label": {"0": "no", "1": "yes"}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with caplog.at_level(logging.WARNING):
        assert LlamaConfig.from_pretrained(tmp_path).num_labels == 3
    assert "num_labels=3 of a file wins over its id2label" in caplog.text
    assert transformers.AutoConfig.from_pretrained(tmp_path).num_labels == 3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dtype", "bfloat17", r"LlamaConfig.dtype='bfloat17' \(did you mean 'bfloat16'\?\); allow"),
        ("dtype", torch.int8, r"LlamaConfig.dtype=torch.int8; allowed: .*load as floating point"),
        ("id2label", {"a": "b"}, "id2label has the key 'a'; keys must be whole numbers from 0"),
        ("id2label", {-1: "b"}, "id2label has the key -1"),
        ("id2label", {True: "b"}, "id2label has the key True"),
        ("id2label", {0: 1}, "id2label={0: 1} is a dict; it must be dict"),
        ("label2id", "x", "label2id='x' is a str; it must be dict"),
        ("extra", {"vocab_size": 7}, r"extra has \['vocab_size'\], which are fields"),
    ],
)
def test_refused_when_made_and_when_set(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LlamaConfig(**{name: value})
    if name != "extra":  # a dict can be changed in place, so it is looked at when it is stored
        config = LlamaConfig()
        with pytest.raises(ConfigError, match=message):
            setattr(config, name, value)
        assert config == LlamaConfig()


def test_a_file_may_have_keys_that_say_how_a_model_runs(tmp_path: Path) -> None:
    odd = {"rope_length": 7, "extra": {"a": 1}, "kernels": "x", "attn_implementation": "x"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **odd}))
    config = LlamaConfig.from_pretrained(tmp_path)
    assert config.rope_length is None and config.kernels is None
    assert config.extra == {"rope_length": 7, "extra": {"a": 1}}
    assert config.replace(vocab_size=9).to_dict()["rope_length"] == 7


def test_dtypes_of_configurations_and_models(tmp_path: Path) -> None:
    for name in ("float16", "torch.float16", torch.float16):
        config = config_of("llama", torch_dtype=name)
        assert config.dtype is torch.float16 is config.torch_dtype
    causal = model_class("llama", "causal_lm")
    assert causal(config).dtype == torch.float32
    assert causal.from_config(config).dtype == AutoModelForCausalLM.from_config(config).dtype
    assert causal.from_config(config).dtype == torch.float16
    causal(config).save_pretrained(tmp_path)
    assert causal.from_pretrained(tmp_path).dtype == torch.float32
    assert causal.from_pretrained(tmp_path, config=config).dtype == torch.float16


def test_chunks_belong_to_bert() -> None:
    assert BertConfig(chunk_size_feed_forward=3).chunk_size_feed_forward == 3
    with pytest.raises(ConfigError, match="chunk_size_feed_forward=3: the MLPs of decoders"):
        LlamaConfig(chunk_size_feed_forward=3)
