"""Rotary parameters that are refused: every wrong value, from Python and from files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.rope_cases import HEAD, LLAMA3, LONGROPE, SETS, SIZES, YARN, PartialConfig
from swathe.modeling import rope
from swathe.modeling.errors import ConfigError
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.layers.embedding import RotaryEmbedding

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"rope_type": "yarnn"}, r"unknown rope_type 'yarnn' \(did you mean 'yarn'\?\); kn"),
    "axial": ({"rope_type": "axial"}, "unknown rope_type 'axial'.*; known: .*'proportional'"),
    "mrope": ({"type": "mrope", "mrope_section": [2, 3, 3]}, "unknown rope_type 'mrope'"),
    "not a name": ({"rope_type": 3}, "unknown rope_type 3"),
    "missing": ({"rope_type": "yarn"}, r"'yarn': missing \['factor', 'original_max_position_e"),
    "None": ({**YARN, "factor": None}, r"'yarn': missing \['factor'\]"),
    "spelling": (
        {**YARN, "beta_fsat": 3},
        r"unknown \['beta_fsat'\] \(did you mean 'beta_fast'\?\)",
    ),
    "elsewhere": ({"rope_type": "linear", "factor": 2.0, "mscale": 1.0}, r"unknown \['mscale'\]"),
    "linear": (
        {"rope_type": "linear", "factor": -3},
        "factor=-3 must be at least 1, a finite numb",
    ),
    "dynamic": ({"rope_type": "dynamic", "factor": 0.9}, "factor=0.9 must be at least 1"),
    "string": ({"rope_type": "linear", "factor": "2"}, "factor='2' must be at least 1"),
    "bool": ({"rope_type": "linear", "factor": True}, "factor=True must be at least 1"),
    "huge": ({"rope_type": "linear", "factor": 10**400}, "factor=1000.* must be at least 1"),
    "theta": ({"rope_type": "default", "rope_theta": math.nan}, "rope_theta=nan must be a finite"),
    "theta 1": ({**YARN, "rope_theta": 1.0}, "rope_theta=1.0 must be above 1"),
    "original": (
        {**YARN, "original_max_position_embeddings": 16.5},
        "=16.5 must be a whole number",
    ),
    "original 0": ({**YARN, "original_max_position_embeddings": 0}, "=0 must be a whole number fr"),
    "betas": ({**YARN, "beta_fast": 1, "beta_slow": 2}, "beta_fast=1 must be at least beta_slow=2"),
    "beta 0": ({**YARN, "beta_slow": 0}, "beta_slow=0 must be a finite number above 0"),
    "mscale": ({**YARN, "mscale": -1}, "mscale=-1 must be a finite number of at least 0"),
    "scale": ({**YARN, "attention_factor": -1.0}, "attention_factor=-1.0 must be a finite number"),
    "truncate": ({**YARN, "truncate": 1}, "truncate=1 must be True or False"),
    "no list": (
        {**LONGROPE, "short_factor": 2.0},
        "short_factor=2.0 must be a list of finite numb",
    ),
    "in the list": (
        {**LONGROPE, "long_factor": [0.0] * 8},
        "long_factor=.* must be a list of finite",
    ),
    "short list": (
        {**LONGROPE, "long_factor": [1.0] * 7},
        "long_factor has 7 numbers; 16 rotated fe",
    ),
    "long of 1": ({**LONGROPE, "original_max_position_embeddings": 1}, "=1 must be at least 2"),
    "llama3": (
        {**LLAMA3, "low_freq_factor": 4.0},
        "low_freq_factor=4.0 and high_freq_factor=4.0 m",
    ),
    "share": (
        {"rope_type": "default", "partial_rotary_factor": 1.5},
        "=1.5 must be a number from 0",
    ),
    "no share": (
        {"rope_type": "default", "partial_rotary_factor": 0.0},
        "=0.0 of head_dim=16 is 0 f",
    ),
    "odd share": (
        {"rope_type": "default", "partial_rotary_factor": 0.7},
        "is 11 features; it must be",
    ),
    "one pair": (
        {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.125},
        "2 rotated features are too few; it needs an even number from 4",
    ),
    "nested": (
        {"full_attention": YARN},
        r"a dict for each of \['full_attention'\]; this model fam",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_refusals(case: str, tmp_path: Path) -> None:
    parameters, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        PartialConfig(**SIZES, rope_parameters=parameters)
    text = json.dumps({**SIZES, "rope_parameters": parameters, "model_type": "partial"})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        PartialConfig.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_refusals_of_what_stands_beside(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "rope_parameters": 3}')
    with pytest.raises(ConfigError, match="rope_parameters=3 is a int; it must be dict"):
        LlamaConfig.from_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"partial_rotary_factor=0.5 is not supported by this mode"
    ):
        LlamaConfig(**SIZES, partial_rotary_factor=0.5)
    with pytest.raises(
        ConfigError, match=r"=16, but the configuration has .*=32 beside it; keep on"
    ):
        LlamaConfig(**SIZES, rope_scaling=YARN, original_max_position_embeddings=32)
    for length in (0, -1, True, "frozen", 1.5):
        with pytest.raises(ConfigError, match="rope_length"):
            LlamaConfig(**SIZES, rope_length=length)
        with pytest.raises(ConfigError, match=rf"length={length!r}; allowed: a number of tokens"):
            RotaryEmbedding(LONGROPE, HEAD, max_position_embeddings=64, length=length)
    for parameters in (LONGROPE, SETS["dynamic"]):
        with pytest.raises(ConfigError, match="depends on a length; give RotaryEmbedding max_pos"):
            RotaryEmbedding(rope.normalised(parameters, {}), HEAD)
    with pytest.raises(
        ConfigError, match="short_factor has 8 numbers; 32 rotated features need 16"
    ):
        RotaryEmbedding(LONGROPE, 32, max_position_embeddings=64)
    with pytest.raises(ConfigError, match=r"has a dict for each of \['full_attention'\]"):
        RotaryEmbedding({"full_attention": YARN}, HEAD)
    config = LlamaConfig(**SIZES)
    config.rope_parameters = {"rope_type": "linear"}
    with pytest.raises(ConfigError, match=r"'linear': missing \['factor'\]"):
        config.save_pretrained(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
KEYS = sorted({*rope.LIMITS, *(k for t in rope.ROPE_TYPES.values() for k in t.required)})
KEYS += ["rope_theta", "attention_factor", "beta_fast", "beta_slow"]
NUMBERS = st.sampled_from([5e-324, 1e-38, 1e-3, 0.5, 1, 1.0000001, 2, 16, 2**30, 1e38, 10**60])


@given(
    st.sampled_from([*SETS.values()]),
    st.dictionaries(st.sampled_from(KEYS), JSON | NUMBERS, max_size=3),
)
def test_whatever_a_file_says_is_served_or_refused(
    parameters: dict[str, Any], changes: dict[str, Any]
) -> None:
    try:
        config = PartialConfig(**{**SIZES, "rope_parameters": {**parameters, **changes}})
        module = RotaryEmbedding.of(config)
    except ConfigError as problem:
        assert "rope" in str(problem)
    else:
        assert module(torch.arange(3)[None], torch.float32).cos.shape[:2] == (1, 3)
