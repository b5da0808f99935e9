"""Every rope type in whole models beside transformers' own, caches, layer types, partial heads."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm_rotary

import swathe.modeling.families.llama.modeling_llama as ours
from support.rope_cases import PartialConfig
from swathe.modeling import rope
from swathe.modeling.cache import DynamicCache, StaticCache
from swathe.modeling.decoder_config import DecoderConfig
from swathe.modeling.errors import ConfigError
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.layers.embedding import RotaryByLayerType, RotaryEmbedding

TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "initializer_range": 0.1,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0],
    "original_max_position_embeddings": 8,
}
TYPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "truncate": False,
        "rope_theta": 100.0,
    },
    "longrope": LONGROPE,
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 2.0},
}
BY_LENGTH = ("dynamic", "longrope")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


class Phi3Config(PartialConfig):
    """With Phi-3's names of types."""

    rope_aliases: ClassVar[Mapping[str, str]] = {**rope.ALIASES, "yarn": "longrope"}


class LayeredConfig(DecoderConfig):
    """Of a family whose layer types turn at different rates, as Gemma 3's do."""

    model_type: ClassVar[str] = "layered"

    @classmethod
    def rope_spelled(cls, parameters: object, legacy: Mapping[str, Any]) -> dict[str, Any]:
        thetas = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
        return rope.normalised_by_layer(parameters, tuple(thetas), thetas)


def model_of(parameters: dict[str, Any], **changes: Any) -> ours.LlamaForCausalLM:
    """A tiny model with random weights, the same for every `changes`."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**TINY, "rope_parameters": parameters, **changes})
    return ours.LlamaForCausalLM(config).eval()


def beside_theirs(parameters: dict[str, Any], **changes: Any) -> tuple[Any, Any]:
    """(transformers' model, ours) with the same weights."""
    model = model_of(parameters, **changes)
    config = transformers.LlamaConfig(**TINY, rope_parameters=copy.deepcopy(parameters))
    config._attn_implementation = "eager"
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(model.state_dict())
    return theirs, model


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(1))


def decoded(model: Any, ids: Tensor, cache: Any, prompt: int = 6) -> Tensor:
    """Logits (B, T, V) from a prompt, then a token at a time."""
    pieces = [model(ids[:, :prompt], past_key_values=cache).logits]
    for t in range(prompt, ids.shape[1]):
        pieces.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
    return torch.cat(pieces, 1)


@pytest.mark.parametrize("kind", TYPES)
@torch.no_grad()
def test_logits_are_theirs_call_after_call(kind: str) -> None:
    theirs, model = beside_theirs(TYPES[kind], rope_length="per_forward")
    # both sides of longrope's switch at 8 and of dynamic's growth at 16, and back again
    for length in (6, 12, 24, 20, 16, 7):
        ids = tokens(length)
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, **CLOSE)


@pytest.mark.parametrize("kind", TYPES)
@torch.no_grad()
def test_the_default_is_theirs_where_they_plan_for_the_same_length(kind: str) -> None:
    theirs, model = beside_theirs(TYPES[kind])
    ids = tokens(TINY["max_position_embeddings"])
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, **CLOSE)
    if kind in BY_LENGTH:
        longer = tokens(24)
        planned = beside_theirs(TYPES[kind], rope_length=24)[1]
        torch.testing.assert_close(planned(longer).logits, theirs(longer).logits, **CLOSE)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", TYPES)
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(kind: str, cache: str) -> None:
    for length in (None, 24) if kind in BY_LENGTH else (None,):
        model, ids = model_of(TYPES[kind], rope_length=length), tokens(24)
        whole = model(ids, use_cache=False).logits
        held = StaticCache(model.config, 24) if cache == "static" else DynamicCache()
        torch.testing.assert_close(decoded(model, ids, held), whole, **CLOSE)


@pytest.mark.parametrize("kind", BY_LENGTH)
@torch.no_grad()
def test_what_the_default_policy_avoids(kind: str) -> None:
    theirs, model = beside_theirs(TYPES[kind], rope_length="per_forward")
    ids = tokens(24)
    whole = model(ids, use_cache=False).logits
    assert (decoded(model, ids, DynamicCache()) - whole).abs().max() > 0.01
    # a short row beside a long one: alone it is another row under "per_forward" only
    far = torch.stack((torch.arange(6), torch.arange(40, 46)))
    for one, same in ((model, False), (model_of(TYPES[kind]), True)):
        alone = one(ids[:1, :6], position_ids=far[:1], use_cache=False).logits
        beside = one(ids[:, :6], position_ids=far, attention_mask=torch.ones(2, 6)).logits[:1]
        assert torch.allclose(alone, beside, **CLOSE) is same
    again = model_of(TYPES[kind], rope_length="per_forward")
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits, **CLOSE)


@pytest.mark.parametrize("length", [None, 4, "per_forward"])
@pytest.mark.parametrize("kind", BY_LENGTH)
@torch.no_grad()
def test_loading_moving_and_copying(kind: str, length: Any, tmp_path: Path) -> None:
    model = model_of(TYPES[kind], rope_length=length)
    model.save_pretrained(tmp_path)
    loaded = ours.LlamaForCausalLM.from_pretrained(tmp_path, rope_length=length)
    assert not any(b.is_meta for b in loaded.buffers())
    ids = tokens(24)
    expected = model(ids).logits
    fresh = model_of(TYPES[kind], rope_length=length)
    there_and_back = fresh.to("meta").to_empty(device="cpu")
    there_and_back.load_state_dict(model.state_dict())
    for other in (
        loaded,
        copy.deepcopy(loaded),
        pickle.loads(pickle.dumps(loaded)),
        there_and_back,
    ):
        assert torch.equal(other(ids).logits, expected)
    made = ours.LlamaForCausalLM.from_config(model.config, dtype="bfloat16")
    kept = made.model.rotary_emb
    exact = model_of(TYPES[kind], rope_length=length).model.rotary_emb
    positions = torch.arange(24)[None]
    for rotary in (kept, kept.half(), kept.bfloat16()):
        assert rotary.inv_freq.dtype == torch.float32
        for mine, other in zip(
            rotary(positions, torch.float32)[:2], exact(positions, torch.float32)[:2], strict=True
        ):
            assert torch.equal(mine, other)
    assert f"'{kind}', length=" in repr(exact)


@pytest.mark.parametrize("length", [None, "per_forward"])
@pytest.mark.parametrize("kind", ["yarn", *BY_LENGTH])
def test_compiles_in_one_graph(kind: str, length: Any) -> None:
    model = model_of(TYPES[kind], rope_length=length, num_hidden_layers=1)
    torch.compiler.reset()
    compiled = torch.compile(model.model, backend="aot_eager", fullgraph=True, dynamic=False)
    for ids in (tokens(24), tokens(6)):
        expected = copy.deepcopy(model.model)(ids, use_cache=False).last_hidden_state
        found = compiled(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(found, expected, **CLOSE)


def phi3(parameters: dict[str, Any]) -> tuple[Any, Any]:
    """transformers' Phi-3 and our layers with its weights; parameters spelled as given to each."""
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        **TINY, original_max_position_embeddings=8, rope_parameters=copy.deepcopy(parameters)
    )
    config._attn_implementation = "eager"
    theirs = transformers.Phi3ForCausalLM(config).eval()
    weights = {}
    for name, w in theirs.state_dict().items():
        if "qkv_proj" in name:
            for part, own in zip("qkv", w.split([64, 32, 32]), strict=True):
                weights[name.replace("qkv", part)] = own
        elif "gate_up_proj" in name:
            for part, own in zip(("gate", "up"), w.chunk(2), strict=True):
                weights[name.replace("gate_up", part)] = own
        else:
            weights[name] = w
    own_config = PartialConfig(
        **TINY,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=parameters,
        original_max_position_embeddings=8,
        rope_length="per_forward",
    )
    model = ours.LlamaForCausalLM(own_config).eval()
    model.load_state_dict(weights)
    return theirs, model


@pytest.mark.parametrize("implementation", ["eager", "triton"])
@pytest.mark.parametrize("kind", ["default", "longrope"])
@torch.no_grad()
def test_part_of_a_head_turns_as_in_phi3(kind: str, implementation: str) -> None:
    parameters = {**TYPES[kind], "partial_rotary_factor": 0.75}
    if kind == "longrope":
        parameters |= {"short_factor": [1.0] * 6, "long_factor": [1.5, 2.0, 2.5, 3.0, 4.0, 8.0]}
    theirs, model = phi3(parameters)
    model.set_kernels(rope=implementation)
    for length in (6, 12):
        ids = tokens(length)
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, **CLOSE)
    assert model.model.rotary_emb(torch.arange(3)[None], torch.float32).cos.shape == (1, 3, 12)


@pytest.mark.parametrize("old", ["su", "yarn"])
def test_phi3s_first_names(old: str) -> None:
    spelled = {k: v for k, v in LONGROPE.items() if k != "rope_type"} | {"type": old}
    config = Phi3Config(**TINY, rope_scaling=spelled, partial_rotary_factor=1.0)
    theirs = transformers.Phi3Config(
        **TINY, original_max_position_embeddings=8, rope_scaling=copy.deepcopy(spelled)
    )
    del theirs.rope_parameters["type"]
    assert config.rope_parameters == theirs.rope_parameters
    if old == "yarn":
        with pytest.raises(ConfigError, match=r"missing \['factor'\] and unknown \['short_factor'"):
            LlamaConfig(**TINY, rope_scaling=spelled)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_turn_as_in_glm(dtype: torch.dtype, share: float) -> None:
    parameters = {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": share}
    halves, pairs = (RotaryEmbedding(parameters, 16, interleaved=i) for i in (False, True))
    q, k = torch.randn(2, 4, 7, 16, dtype=dtype), torch.randn(2, 2, 7, 16, dtype=dtype)
    positions = torch.arange(7).expand(2, 7)
    expected = glm_rotary(q, k, *halves(positions, dtype)[:2])
    for mine, other in zip(pairs(positions, dtype)(q, k), expected, strict=True):
        assert torch.equal(mine, other)


BY_LAYER: dict[str, dict[str, Any] | None] = {
    "nothing": None,
    "one": {"full_attention": {"rope_type": "linear", "factor": 8.0}},
    "both": {
        "full_attention": {**LONGROPE, "rope_theta": 2e4},
        "sliding_attention": {"rope_type": "dynamic", "factor": 2.0},
    },
    "yarn": {
        "full_attention": {**TYPES["yarn"], "rope_theta": 1e6},
        "sliding_attention": None,
    },
}


@pytest.mark.parametrize("name", BY_LAYER)
def test_layer_types_have_their_own(name: str) -> None:
    given = copy.deepcopy(BY_LAYER[name])
    config = LayeredConfig(**TINY, rope_parameters=given, rope_length="per_forward")
    assert given == BY_LAYER[name]
    theirs = transformers.Gemma3TextConfig(
        **TINY,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=copy.deepcopy(given),
    )
    assert config.rope_parameters == theirs.rope_parameters
    assert LayeredConfig.from_dict(config.to_dict()) == config.replace() == config
    module, other = RotaryByLayerType.of(config), Gemma3RotaryEmbedding(theirs)
    # transformers looks for "truncate" beside the layer types, and its longrope fails when called
    # for long positions again
    if name == "yarn":
        theirs.rope_parameters["truncate"] = False
        other = Gemma3RotaryEmbedding(theirs)
    for positions in (torch.arange(7)[None], torch.arange(24)[None]):
        found = module(positions, torch.float32)
        assert list(found) == ["full_attention", "sliding_attention"]
        for layer_type, rotation in found.items():
            cos, sin = other(torch.empty(1), positions, layer_type)
            torch.testing.assert_close(rotation.cos, cos, **CLOSE)
            torch.testing.assert_close(rotation.sin, sin, **CLOSE)
    again = module(positions, torch.float32)
    assert all(torch.equal(again[t].cos, found[t].cos) for t in found)


LAYERS_WRONG: dict[str, tuple[object, str]] = {
    "flat": (LONGROPE, r"has \['rope_type', .*takes one dict of parameters for each of \['full"),
    "name": ({"full_atention": {}}, r"\(did you mean 'full_attention'\?\)"),
    "inside": (
        {"sliding_attention": {"rope_type": "linear", "factor": 0.5}},
        r"rope_parameters\['sliding_attention'\]: rope_type 'linear': factor=0.5 must be at least",
    ),
    "sizes": (
        {"full_attention": {**LONGROPE, "long_factor": [1.0]}},
        r"rope_parameters\['full_attention'\]: rope_type 'longrope': long_factor has 1 numbers",
    ),
    "share": (
        {"full_attention": {"partial_rotary_factor": 0.5}},
        r"rope_parameters\['full_attention'\]: .*partial_rotary_factor=0.5 is not supported",
    ),
    "no dict": ({"full_attention": 3}, r"rope_parameters\['full_attention'\]: rope_parameters=3"),
}


@pytest.mark.parametrize("case", LAYERS_WRONG)
def test_refusals_by_layer_type(case: str) -> None:
    parameters, message = LAYERS_WRONG[case]
    with pytest.raises(ConfigError, match=message):
        LayeredConfig(**TINY, rope_parameters=parameters)
    with pytest.raises(ConfigError, match=r"rope_parameters=\[\]: expected a dict by layer type"):
        rope.normalised_by_layer([], ("full_attention",), {})


@torch.no_grad()
def test_a_type_of_ones_own_that_depends_on_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    own = rope.RopeType(
        rope.default_frequencies,
        required=("pace",),
        at_length=lambda inv_freq, p, length: inv_freq / (1 + p["pace"] * length),
    )
    monkeypatch.setitem(rope.ROPE_TYPES, "slower", own)
    model = model_of({"rope_type": "slower", "pace": 0.1})
    plain = RotaryEmbedding(rope.normalised(None, {}), 16).inv_freq
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, plain / 2.6)
    follows = RotaryEmbedding.of(model.config.replace(rope_length="per_forward"))
    cos = follows(torch.tensor([[3]]), torch.float32).cos[0, 0, :8]
    torch.testing.assert_close(cos, (3 * plain / 1.4).cos())
