"""Rotary parameters and frequencies beside transformers' own: values, spellings, files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from support.rope_cases import HEAD, LONGROPE, SETS, SIZES, PartialConfig
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.layers.embedding import RotaryEmbedding


def theirs(parameters: dict[str, Any], **changes: Any) -> Any:
    """transformers' configuration of the same sizes."""
    return transformers.LlamaConfig(
        **{**SIZES, "rope_parameters": copy.deepcopy(parameters), **changes}
    )


def mine(parameters: dict[str, Any], **changes: Any) -> RotaryEmbedding:
    """Our module for such a configuration."""
    return RotaryEmbedding.of(PartialConfig(**{**SIZES, "rope_parameters": parameters, **changes}))


def check_tables(ours: RotaryEmbedding, other: Any, positions: Tensor) -> None:
    """cos and sin equal those of transformers' module, as well as fp32 holds their angles."""
    rotation = ours(positions, torch.float32)
    cos, sin = other(torch.empty(1), positions)
    close = {"rtol": 0, "atol": 1e-6 * max(1, int(positions.max()) / 8)}
    torch.testing.assert_close(rotation.cos, cos, **close)
    torch.testing.assert_close(rotation.sin, sin, **close)


@pytest.mark.parametrize("name", SETS)
def test_frequencies_and_scale(name: str) -> None:
    config = theirs(SETS[name])
    kind = config.rope_parameters["rope_type"]
    module = mine(SETS[name], rope_length="per_forward")
    if kind == "default":
        inv_freq, scale = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config)
    own = module.inv_freq[0] if kind == "longrope" else module.inv_freq
    assert own.dtype == torch.float32
    torch.testing.assert_close(own, inv_freq, atol=0, rtol=1e-6)
    assert module.factor == pytest.approx(scale, rel=1e-12)
    positions = torch.tensor([[0, 1, 5, 15], [2, 3, 9, 12]])
    check_tables(
        mine(SETS[name], rope_length="per_forward"), LlamaRotaryEmbedding(config), positions
    )


@pytest.mark.parametrize("name", [n for n in SETS if not n.startswith("proportional")])
@pytest.mark.parametrize("share", [0.5, 0.3])
def test_frequencies_of_a_part(name: str, share: float) -> None:
    R = int(HEAD * share)
    parameters = {**SETS[name], "partial_rotary_factor": share}
    for key in ("short_factor", "long_factor"):
        if key in parameters:
            parameters[key] = parameters[key][: R // 2]
    config = theirs(parameters)
    module = mine(parameters)
    length = module.length if module.kind.at_length else None
    if parameters["rope_type"] == "default":
        from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

        inv_freq, _ = Phi3RotaryEmbedding.compute_default_rope_parameters(config)
    else:
        inv_freq, _ = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=length)
    torch.testing.assert_close(module.inv_freq, inv_freq, atol=0, rtol=1e-6)
    rotation = module(torch.arange(5)[None], torch.float32)
    assert rotation.cos.shape == rotation.sin.shape == (1, 5, R)


@pytest.mark.parametrize("name", ["longrope", "dynamic", "dynamic, other theta"])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 65, 200, 5000])
def test_a_planned_length(name: str, length: int) -> None:
    inv_freq, _ = ROPE_INIT_FUNCTIONS[SETS[name]["rope_type"]](theirs(SETS[name]), seq_len=length)
    module = mine(SETS[name], rope_length=length)
    torch.testing.assert_close(module.inv_freq, inv_freq, atol=0, rtol=1e-6)
    planned = mine(SETS[name]) if length == SIZES["max_position_embeddings"] else module
    assert torch.equal(planned.inv_freq, module.inv_freq)


@given(
    lengths=st.lists(st.integers(1, 200) | st.sampled_from([16, 17, 63, 64, 65]), max_size=8),
    name=st.sampled_from(["longrope", "dynamic", "dynamic, other theta"]),
)
def test_per_forward_is_theirs_whatever_came_before(lengths: list[int], name: str) -> None:
    other = LlamaRotaryEmbedding(theirs(SETS[name]))
    module = mine(SETS[name], rope_length="per_forward")
    for length in lengths:
        check_tables(module, other, torch.tensor([[0, length // 2], [length - 1, 0]]))


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_a_plan_holds_for_every_batch(name: str) -> None:
    for length in (None, 16, 500):
        module = mine(SETS[name], rope_length=length)
        short, long = torch.arange(8), torch.arange(300, 308)
        alone = module(short[None], torch.float32)
        beside = module(torch.stack((short, long)), torch.float32)
        assert torch.equal(alone.cos[0], beside.cos[0]) and torch.equal(alone.sin[0], beside.sin[0])


@given(
    theta=st.floats(1.5, 1e8),
    factor=st.floats(1, 64),
    original=st.integers(2, 2**17),
    betas=st.tuples(st.floats(0.5, 4), st.floats(4, 64)),
    truncate=st.booleans(),
    low=st.floats(0.1, 4),
    more=st.floats(0.1, 8),
)
def test_yarn_and_llama3_anywhere(
    theta: float,
    factor: float,
    original: int,
    betas: tuple[float, float],
    truncate: bool,
    low: float,
    more: float,
) -> None:
    shared = {"factor": factor, "rope_theta": theta, "original_max_position_embeddings": original}
    yarn = {"beta_slow": betas[0], "beta_fast": betas[1], "truncate": truncate, **shared}
    llama3 = {"low_freq_factor": low, "high_freq_factor": low + more, **shared}
    for kind, parameters in (("yarn", yarn), ("llama3", llama3)):
        config = theirs({"rope_type": kind, **parameters}, max_position_embeddings=2**18)
        inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config)
        module = mine(config.rope_parameters, max_position_embeddings=2**18)
        torch.testing.assert_close(module.inv_freq, inv_freq, atol=1e-12, rtol=1e-5)
        assert module.factor == pytest.approx(scale)


@pytest.mark.parametrize("name", SETS)
def test_files_go_both_ways(name: str, tmp_path: Path) -> None:
    config = theirs(SETS[name])
    config.save_pretrained(tmp_path / "theirs")
    own = LlamaConfig.from_pretrained(tmp_path / "theirs")
    assert own.rope_parameters == config.rope_parameters
    own.replace(rope_length=32).save_pretrained(tmp_path / "ours")
    stored = [(tmp_path / who / "config.json").read_text().rstrip() for who in ("theirs", "ours")]
    assert stored[0] == stored[1]
    assert LlamaConfig.from_pretrained(tmp_path / "ours") == own
    again = transformers.LlamaConfig.from_pretrained(tmp_path / "ours")
    assert again.rope_parameters == config.rope_parameters


@pytest.mark.parametrize("name", SETS)
def test_old_spellings_are_the_same_configuration(name: str, tmp_path: Path) -> None:
    new = LlamaConfig(**SIZES, rope_parameters={"rope_theta": 2e4, **SETS[name]})
    old = dict(SETS[name])
    old["type"] = {"longrope": "su"}.get(old.pop("rope_type"), SETS[name]["rope_type"])
    beside = {k: old.pop(k) for k in ("partial_rotary_factor",) if k in old}
    if "original_max_position_embeddings" in old:
        beside["original_max_position_embeddings"] = old.pop("original_max_position_embeddings")
    values = {**SIZES, "rope_scaling": old, "rope_theta": old.pop("rope_theta", 2e4), **beside}
    given = copy.deepcopy(values)
    assert LlamaConfig(**values) == new and values == given
    (tmp_path / "config.json").write_text(json.dumps({**values, "model_type": "llama"}))
    read = LlamaConfig.from_pretrained(tmp_path)
    assert read == new and "type" not in read.rope_parameters and "rope_scaling" not in read.extra


def test_new_parameters_keep_what_the_weights_were_trained_with(tmp_path: Path) -> None:
    trained = {"rope_theta": 3e5, "partial_rotary_factor": 0.5}
    config = PartialConfig(**SIZES, **trained)
    config.save_pretrained(tmp_path)
    linear = {"rope_type": "linear", "factor": 2.0}
    expected = {**linear, **trained}
    for name in ("rope_scaling", "rope_parameters"):
        changed = {name: dict(linear)}
        assert config.replace(**changed).rope_parameters == expected
        assert PartialConfig.from_pretrained(tmp_path, **changed).rope_parameters == expected
        assert changed == {name: linear}
    assert config.replace(rope_scaling=None) == config
    both = config.replace(rope_scaling=linear, rope_theta=7.0, partial_rotary_factor=1.0)
    assert both.rope_parameters == {**linear, "rope_theta": 7.0, "partial_rotary_factor": 1.0}


def test_nothing_is_shared_with_the_caller() -> None:
    parameters = copy.deepcopy(LONGROPE)
    config = LlamaConfig(**SIZES, rope_parameters=parameters)
    parameters["short_factor"].append(3.0)
    parameters["rope_theta"] = 7.0
    assert config.rope_parameters == {**LONGROPE, "rope_theta": 1e4}
    module = RotaryEmbedding.of(config)
    assert config.rope_parameters == {**LONGROPE, "rope_theta": 1e4}
    assert module.rope["max_position_embeddings"] == 64
