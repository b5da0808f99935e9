"""Every kind of error says what was given, what is allowed and how to fix it, in one message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import swathe
from support.classes import build, config_of
from support.families import tokens
from swathe.modeling.auto import AutoModelForCausalLM, model_class, register_model
from swathe.modeling.checkpoint.errors import CheckpointNotFound
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.families.llama.modeling_llama import LlamaForCausalLM


class Uncovered(LlamaForCausalLM):
    """A parameter that no rule of initialisation covers."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.gain = torch.nn.Parameter(torch.ones(3))


def saved(directory: Path, drop: str = "") -> Path:
    build("LlamaForCausalLM").save_pretrained(directory)
    if drop:
        state = load_file(directory / "model.safetensors")
        del state[drop]
        save_file(state, directory / "model.safetensors", {"format": "pt"})
    return directory


Case = tuple[Callable[[Path], Any], type[Exception], str, str, str]
# what is called, what it raises; then the parts: what was given, what is allowed, how to fix it
CASES: dict[str, Case] = {
    "field": (
        lambda d: LlamaConfig(num_layer=4),
        swathe.ConfigError,
        "LlamaConfig has no field 'num_layer'",
        "fields: ['architectures', ",
        "did you mean 'num_hidden_layers'",
    ),
    "type": (
        lambda d: LlamaConfig(hidden_size="4096"),
        swathe.ConfigError,
        "LlamaConfig.hidden_size='4096' is a str",
        "it must be int",
        "must be int",
    ),
    "heads": (
        lambda d: LlamaConfig(num_attention_heads=32, num_key_value_heads=5),
        swathe.ConfigError,
        "num_attention_heads=32",
        "allowed with 32 heads: [1, 2, 4",
        "num_key_value_heads=5",
    ),
    "odd head": (
        lambda d: LlamaConfig(head_dim=33),
        swathe.ConfigError,
        "head_dim=33",
        "must be even",
        "give an even one, or leave it out",
    ),
    "model type": (
        lambda d: model_class("mistral", "causal_lm").from_pretrained(saved(d)),
        swathe.ConfigError,
        "the configuration says model_type='llama'",
        "MistralConfig reads 'mistral'",
        "use AutoConfig, AutoModel or AutoModelForCausalLM",
    ),
    "unknown model type": (
        lambda d: model_class("lama", "base"),
        swathe.ConfigError,
        "model_type 'lama' is not known",
        "known: ['bert', ",
        "did you mean 'llama'",
    ),
    "missing weights": (
        lambda d: LlamaForCausalLM.from_pretrained(saved(d, "model.norm.weight")),
        swathe.CheckpointError,
        "missing 'model.norm.weight'",
        "the weights do not fit the model",
        "ignore_missing=[...]",
    ),
    "shape": (
        lambda d: LlamaForCausalLM.from_pretrained(saved(d), vocab_size=50),
        swathe.CheckpointError,
        "has shape (99, 64)",
        "the model needs (50, 64)",
        "make config.json agree with the weights",
    ),
    "no weights": (
        lambda d: LlamaForCausalLM.from_pretrained(d, config=config_of("llama")),
        CheckpointNotFound,
        "has neither model.safetensors nor model.safetensors.index.json",
        "it holds",
        "Give the directory that has them, or save a model here",
    ),
    "no config": (
        lambda d: LlamaForCausalLM.from_pretrained(d),
        FileNotFoundError,
        "no config.json at",
        "Needed: a local directory with config.json",
        "download a model from the hub first",
    ),
    "uncovered": (
        lambda d: Uncovered.from_pretrained(saved(d)),
        swathe.UninitializedParameter,
        "the checkpoint has no 'gain'",
        "Uncovered._init_weights does not fill it",
        "add a rule there, or add the tensor to the checkpoint",
    ),
    "feature": (
        lambda d: build("LlamaForCausalLM", attn_implementation="sdpa")(
            tokens(), output_attentions=True
        ),
        swathe.UnsupportedFeature,
        "output_attentions=True: attention backend 'sdpa'",
        'only "eager" does',
        'Call model.set_attn_implementation("eager")',
    ),
    "backend": (
        lambda d: build("LlamaForCausalLM").set_attn_implementation("foo"),
        ValueError,
        'Specified attn_implementation="foo" is not supported',
        "allowed: ['auto', 'eager', 'sdpa', 'triton'",
        "'triton'",
    ),
    "argument": (
        lambda d: build("LlamaForCausalLM")(tokens(), attn_mask=tokens()),
        TypeError,
        "no argument 'attn_mask'",
        "allowed: ['attention_mask', ",
        "did you mean 'attention_mask'",
    ),
    "loading argument": (
        lambda d: AutoModelForCausalLM.from_pretrained(saved(d), atn_implementation="eager"),
        TypeError,
        "no argument 'atn_implementation'",
        "allowed: ['attn_implementation', ",
        "did you mean 'attn_implementation'",
    ),
    "both inputs": (
        lambda d: build("LlamaForCausalLM")(tokens(), inputs_embeds=torch.ones(2, 11, 64)),
        ValueError,
        "got both",
        "exactly one of input_ids or inputs_embeds",
        "pass one and leave the other out",
    ),
    "ids": (
        lambda d: build("LlamaForCausalLM")(tokens() + 90),
        ValueError,
        "input_ids holds ids from",
        "vocab_size=99",
        "ids must be 0 to 98",
    ),
    "registered": (
        lambda d: register_model("llama", LlamaConfig, {"causal": LlamaForCausalLM}),
        ValueError,
        "unknown head 'causal'",
        "allowed: ('base', 'causal_lm', ",
        "did you mean 'causal_lm'",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_three_parts(case: str, tmp_path: Path) -> None:
    call, error, given, allowed, fix = CASES[case]
    with pytest.raises(error) as caught:
        call(tmp_path)
    text = str(caught.value)
    for part in (given, allowed, fix):
        assert part in text, text
    if isinstance(caught.value, swathe.CheckpointError):
        assert str(tmp_path) in text and caught.value.code in text


def test_every_public_error_is_among_them() -> None:
    public = {
        value
        for name in swathe.__all__
        if isinstance(value := getattr(swathe, name), type) and issubclass(value, Exception)
    }
    # a backend that is not installed is in tests/ops, beside the installations that lack one
    assert public - {error for _, error, *_ in CASES.values()} == {swathe.BackendUnavailable}
