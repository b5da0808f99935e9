"""Configurations: strict from Python, HF's JSON in and out, hostile files, rope spellings."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers

from swathe.modeling import rope
from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.config_fields import Range
from swathe.modeling.errors import ConfigError
from swathe.modeling.families.llama.configuration_llama import LlamaConfig

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class Example(PreTrainedConfig):
    """A configuration of a model that is not a decoder."""

    model_type: ClassVar[str] = "example"
    attribute_map: ClassVar[dict[str, str]] = {"num_local_experts": "num_experts"}
    ranges: ClassVar[dict[str, Range]] = {"num_experts": (1, 64)}

    num_experts: int = 8
    limit: float = math.inf
    names: list[str] | None = None


def written(directory: Path, **values: Any) -> Path:
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **values}))
    return directory


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"num_layer": 4}, r"no field 'num_layer' \(did you mean 'num_hidden_layers'\?\)"),
    "type": ({"hidden_size": "4096"}, r"LlamaConfig.hidden_size='4096' is a str; it must be int"),
    "bool for int": ({"hidden_size": True}, "hidden_size=True is a bool; it must be int"),
    "float for int": ({"vocab_size": 3e4}, "vocab_size=30000.0 is a float; it must be int"),
    "list": ({"eos_token_id": ["2"]}, "eos_token_id=.* is a list"),
    "groups": (
        {"num_attention_heads": 32, "num_key_value_heads": 5},
        r"num_attention_heads=32 is not a multiple of num_key_value_heads=5; allowed .*\[1, 2, 4",
    ),
    "heads": ({"hidden_size": 100, "num_attention_heads": 3}, "or give head_dim"),
    "odd head": ({"head_dim": 33}, "head_dim=33 must be even"),
    "activation": ({"hidden_act": "siluu"}, r"hidden_act='siluu' \(did you mean 'silu'\?\)"),
    "dunder": ({"hidden_act": "__class__"}, "hidden_act='__class__'"),
    "eps": ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0 is out of range"),
    "nan": ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan is out of range"),
    "infinite": ({"rms_norm_eps": math.inf}, "rms_norm_eps=inf is out of range"),
    "std": ({"initializer_range": 2.0}, "allowed: 0 to 1"),
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is out of range"),
    "no layers": ({"num_hidden_layers": -2}, "allowed: 1 to 4096"),
    "vocabulary": ({"vocab_size": 10**15}, "vocab_size=1000000000000000 is out of range"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads=0 is out of range"),
    "negative": ({"hidden_size": -64}, "hidden_size=-64 is out of range"),
    "pad": ({"pad_token_id": 99999}, "pad_token_id=99999 is outside the vocabulary"),
    "dtype": ({"dtype": "bfloat17"}, r"dtype='bfloat17' \(did you mean 'bfloat16'\?\)"),
    "module": ({"dtype": "os"}, "dtype='os'; allowed"),
    "slices": ({"pretraining_tp": 2}, "pretraining_tp=2 is not supported"),
    "problem": ({"problem_type": "guess"}, "problem_type='guess'"),
    "one label": (
        {"problem_type": "single_label_classification", "num_labels": 1},
        "needs num_labels of at least 2",
    ),
    "labels": ({"num_labels": 0}, "num_labels=0 must be a whole number"),
    "label ids": ({"id2label": {"a": "b"}}, "id2label has the key 'a'"),
    "label dict": ({"id2label": ["a"]}, "id2label=.*expected a dict"),
    "rope": (
        {"rope_scaling": {"rope_type": "llama33", "factor": 2.0}},
        r"unknown rope_type 'llama33' \(did you mean 'llama3'\?\); known: \['default', 'dynamic', ",
    ),
    "rope dict": ({"rope_parameters": [1]}, r"rope_parameters=\[1\] is a list; it must be dict"),
    "rope keys": ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "missing .*low_freq_factor"),
    "rope extra": ({"rope_scaling": {"type": "default", "fctor": 2.0}}, r"unknown \['fctor'\]"),
    "factor": ({"rope_parameters": {**LLAMA3, "factor": 0.5}}, "factor=0.5 must be at least 1"),
    "negative factor": ({"rope_parameters": {**LLAMA3, "factor": -2.0}}, "factor=-2.0 must be"),
    "low above high": ({"rope_parameters": {**LLAMA3, "low_freq_factor": 8.0}}, "0 < low < high"),
    "theta": ({"rope_theta": 0.0}, "rope_theta=0.0 must be a finite number above 0"),
    "partial": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5 is not supported",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_from_python_and_from_a_file(case: str, tmp_path: Path) -> None:
    values, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        LlamaConfig(**values)
    if case != "unknown":
        with pytest.raises(ConfigError, match=message) as caught:
            LlamaConfig.from_pretrained(written(tmp_path, **values))
        assert str(tmp_path / "config.json") in str(caught.value)


def test_positional_arguments_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"LlamaConfig takes keyword arguments only; got \(32000,\)"
    ):
        LlamaConfig(32000)  # type: ignore[misc]


@pytest.mark.parametrize(
    "changes", [{}, {"rope_scaling": LLAMA3, "rope_theta": 5e5}, {"num_labels": 3}]
)
def test_json_is_hugging_faces(changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = transformers.LlamaConfig(
        **copy.deepcopy(changes), dtype="bfloat16", architectures=["X"]
    )
    theirs.save_pretrained(tmp_path / "theirs")
    config = LlamaConfig.from_pretrained(tmp_path / "theirs")
    config.save_pretrained(tmp_path / "ours")
    ours, original = ((tmp_path / who / "config.json").read_text() for who in ("ours", "theirs"))
    assert json.loads(ours) == json.loads(original)
    assert ours.rstrip() == original.rstrip()
    again = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert again.to_dict() == theirs.to_dict() | {"_name_or_path": again._name_or_path}
    assert LlamaConfig.from_dict(config.to_dict()) == config
    shared = set(config.to_dict()) & set(theirs.to_dict())
    assert {k: config.to_dict()[k] for k in shared} == {k: theirs.to_dict()[k] for k in shared}


def test_old_and_new_spellings_are_one_configuration(tmp_path: Path) -> None:
    new = LlamaConfig(rope_parameters={**LLAMA3, "rope_theta": 5e5}, dtype="bfloat16")
    legacy = {k: v for k, v in LLAMA3.items() if k != "rope_type"} | {"type": "llama3"}
    directory = written(tmp_path, rope_scaling=legacy, rope_theta=5e5, torch_dtype="bfloat16")
    old = LlamaConfig.from_pretrained(directory)
    assert old == new and old.rope_theta == 5e5 and old.rope_scaling == old.rope_parameters
    assert old.torch_dtype is torch.bfloat16
    assert "type" not in old.rope_parameters and "torch_dtype" not in old.to_dict()
    plain = LlamaConfig.from_pretrained(written(tmp_path, rope_scaling=None, rope_theta=7.0))
    assert plain.rope_parameters == {"rope_type": "default", "rope_theta": 7.0}
    del legacy["original_max_position_embeddings"]
    outside = {"rope_scaling": legacy, "original_max_position_embeddings": 8192, "rope_theta": 5e5}
    assert LlamaConfig(**outside, dtype="bfloat16") == new


def test_the_callers_dict_is_neither_changed_nor_shared() -> None:
    given = dict(LLAMA3)
    first = LlamaConfig(rope_scaling=given)
    second = LlamaConfig(rope_scaling=given, rope_theta=5e5)
    assert given == LLAMA3
    assert (first.rope_theta, second.rope_theta) == (1e4, 5e5)


@pytest.mark.parametrize(
    "parameters", [None, LLAMA3, {**LLAMA3, "rope_theta": 5e5, "factor": 32.0}]
)
def test_frequencies_are_bitwise_hugging_faces(parameters: dict[str, Any] | None) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from swathe.modeling.layers.embedding import RotaryEmbedding

    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "num_attention_heads": 2,
        "rope_parameters": parameters,
    }
    config = LlamaConfig(**sizes)
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**copy.deepcopy(sizes)))
    mine = RotaryEmbedding(config.rope_parameters, config.head_dim)
    assert torch.equal(mine.inv_freq, theirs.inv_freq)
    positions = torch.arange(5000, 5100)[None]
    for dtype in (torch.float32, torch.bfloat16):
        expected = theirs(torch.empty(1, dtype=dtype), positions)
        for ours, other in zip(mine.to(dtype)(positions, dtype)[:2], expected, strict=True):
            assert ours.dtype == dtype and torch.equal(ours, other)


def test_a_rope_type_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope, "ROPE_TYPES", dict(rope.ROPE_TYPES))
    half = rope.RopeType(
        lambda p, head_dim, device: (torch.full((head_dim // 2,), p["rate"], device=device), 1.0),
        required=("rate",),
    )
    rope.register_rope("constant", half)
    config = LlamaConfig(rope_parameters={"rope_type": "constant", "rate": 0.5})
    assert config.rope_parameters["rate"] == 0.5
    with pytest.raises(ConfigError, match=r"'constant': missing \['rate'\]"):
        LlamaConfig(rope_parameters={"rope_type": "constant"})
    with pytest.raises(ValueError, match="rope_type 'constant' exists already"):
        rope.register_rope("constant", half)


def test_derived_fields_follow() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4)
    assert (config.head_dim, config.num_key_value_heads) == (16, 4)
    config.hidden_size = 128
    assert config.head_dim == 32
    config.head_dim = 8
    config.hidden_size = 256
    assert config.head_dim == 8
    config.head_dim = None
    assert config.head_dim == 64
    assert LlamaConfig(hidden_size=576, num_attention_heads=9, head_dim=64).head_dim == 64


def test_assignment_is_checked_too() -> None:
    config = LlamaConfig()
    with pytest.raises(ConfigError, match="hidden_size='x' is a str"):
        config.hidden_size = "x"  # type: ignore[assignment]
    with pytest.raises(AttributeError, match=r"no field 'hiden_size' \(did you mean 'hidden_size'"):
        config.hiden_size = 1  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="model_type and other class constants cannot be set"):
        config.model_type = "mistral"  # type: ignore[misc]
    with pytest.raises(AttributeError, match="LlamaConfig has no attribute 'hiden_size'"):
        _ = config.hiden_size  # type: ignore[attr-defined]
    config.dtype = "float16"  # type: ignore[assignment]
    assert config.to_dict()["dtype"] == "float16" and config.get_text_config() is config


def test_labels_aliases_and_infinity(tmp_path: Path) -> None:
    config = Example(num_local_experts=4, num_labels=3, names=["a"])
    assert config.num_experts == config.num_local_experts == 4
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    config.num_local_experts = 5  # type: ignore[attr-defined]
    config.num_labels = 4
    assert config.num_experts == 5 and config.label2id["LABEL_3"] == 3  # type: ignore[index]
    config.save_pretrained(tmp_path)
    assert '"__float__": "Infinity"' in (tmp_path / "config.json").read_text()
    again = Example.from_pretrained(tmp_path)
    assert again == config and again.limit == math.inf and again.num_labels == 4
    assert again.replace(num_labels=2).label2id == {"LABEL_0": 0, "LABEL_1": 1}


def test_unknown_keys_of_a_file_are_kept(tmp_path: Path) -> None:
    extra = {"to_dict": 1, "is_llama_config": True, "auto_map": {"AutoModel": "evil.Evil"}}
    config = LlamaConfig.from_pretrained(written(tmp_path, **extra))
    assert config.extra == extra and callable(config.to_dict)
    assert config.to_dict()["is_llama_config"] is True
    assert LlamaConfig(extra={"foo": 1}).to_dict()["foo"] == 1
    assert config.replace(vocab_size=7).extra == extra


def test_padding_ids_below_zero_in_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert LlamaConfig.from_pretrained(written(tmp_path, pad_token_id=-1)).pad_token_id is None
    assert "pad_token_id=-1 in a file is read as None" in caplog.text
    with pytest.raises(ConfigError, match="pad_token_id=-1 is outside the vocabulary"):
        LlamaConfig(pad_token_id=-1)


def test_how_a_model_runs_is_neither_read_nor_written(tmp_path: Path) -> None:
    keys = {
        "attn_implementation": "evil/repo",
        "_attn_implementation": "evil/repo",
        "norm_implementation": "evil/repo",
        "kernels": "evil/repo",
    }
    config = LlamaConfig.from_pretrained(written(tmp_path, **keys))
    assert config.attn_implementation is None and not config.extra
    switched = config.replace(attn_implementation="eager", kernels={"norm": "eager"})
    assert switched == config and switched.attn_implementation == "eager"
    switched.save_pretrained(tmp_path)
    assert "implementation" not in (tmp_path / "config.json").read_text()
    assert "kernels" not in (tmp_path / "config.json").read_text()


def test_overrides(tmp_path: Path) -> None:
    written(tmp_path, vocab_size=100)
    assert LlamaConfig.from_pretrained(tmp_path, hidden_act="gelu").hidden_act == "gelu"
    assert LlamaConfig.from_pretrained(tmp_path / "config.json").vocab_size == 100
    config, unused = LlamaConfig.from_pretrained(
        tmp_path, return_unused_kwargs=True, vocab_size=50, foo=1
    )
    assert config.vocab_size == 50 and unused == {"foo": 1}
    llama3 = LlamaConfig.from_pretrained(written(tmp_path, rope_scaling=LLAMA3), rope_theta=7.0)
    assert llama3.rope_parameters == {**LLAMA3, "rope_theta": 7.0}
    assert llama3.replace(rope_theta=8.0).rope_parameters == {**LLAMA3, "rope_theta": 8.0}
    assert llama3.rope_theta == 7.0
    with pytest.raises(ConfigError, match=r"no field 'vocabsize' \(did you mean 'vocab_size'\?\)"):
        LlamaConfig.from_pretrained(tmp_path, vocabsize=7)


def test_copies_and_pickles() -> None:
    config = LlamaConfig(num_key_value_heads=4, num_labels=3, attn_implementation="eager")
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), config.replace()):
        assert other == config and other is not config
        assert other.head_dim == 128 and other.attn_implementation == "eager"
    assert "LlamaConfig {" in repr(config)
