"""How every class comes to be: on meta, initialised, tied, its inputs and embeddings named."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from support.classes import CLASSES, build, config_of
from support.families import tokens
from swathe.modeling.auto import model_class
from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.errors import UninitializedParameter
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.families.llama.modeling_llama import LlamaForCausalLM, LlamaModel
from swathe.modeling.model import PreTrainedModel

every_class = pytest.mark.parametrize("name", CLASSES)


class MineConfig(LlamaConfig):
    """Named in an annotation below."""

    model_type: ClassVar[str] = "mine"


class Annotated(LlamaModel):
    """Its configuration's class is said by the annotation alone."""

    config: MineConfig


class Quiet(PreTrainedModel):
    """A model whose __init__ does not call post_init, with a rule for its own parameter."""

    config_class: ClassVar[type[PreTrainedConfig]] = LlamaConfig
    embed_path: ClassVar[str] = "embed"

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.scale = nn.Parameter(torch.empty(3))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            nn.init.constant_(self.scale, 5.0)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embed(input_ids) * self.scale.sum()


@every_class
def test_on_meta_then_anywhere(name: str) -> None:
    model_type, head = CLASSES[name]
    cls = model_class(model_type, head)
    with torch.device("meta"):
        model = cls(config_of(model_type)).eval()
        out = model(torch.zeros(2, 5, dtype=torch.long), attention_mask=torch.ones(2, 5))
    assert all(p.is_meta for p in model.parameters()) and out[0].is_meta
    assert (
        cls.from_config(config_of(model_type), device="cpu", dtype="float64").dtype == torch.double
    )
    assert {m.device for m in (build(name), cls.from_config(config_of(model_type)))} == {
        torch.device("cpu")
    }


@every_class
@torch.no_grad()
def test_it_runs_and_says_what_it_is(name: str) -> None:
    model = build(name)
    cls = type(model)
    parameters = list(inspect.signature(cls.forward).parameters)
    assert parameters[1] == cls.main_input_name == "input_ids"
    ids = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}
    first = model(**ids)
    assert torch.equal(model(**ids)[0], first[0])
    as_tuple = model(**ids, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], first[0])
    headed = CLASSES[name][1] != "base"
    assert (model.base_model is not model) == headed
    assert model.get_decoder() is model.base_model
    assert cls.can_generate() == (CLASSES[name][1] == "causal_lm")
    embeddings = model.get_input_embeddings()
    assert embeddings is model.base_model.get_input_embeddings()
    by_vectors = model(
        inputs_embeds=embeddings(ids["input_ids"]), attention_mask=ids["attention_mask"]
    )
    torch.testing.assert_close(by_vectors[0], first[0])


@every_class
def test_embeddings_are_exchanged(name: str) -> None:
    model = build(name)
    embeddings = model.get_input_embeddings()
    fresh = type(embeddings).__new__(type(embeddings))
    fresh.__dict__ = {
        k: v.copy() if isinstance(v, dict) else v for k, v in vars(embeddings).items()
    }
    model.set_input_embeddings(fresh)
    assert model.get_input_embeddings() is fresh
    output = model.get_output_embeddings()
    assert (output is None) == (CLASSES[name][1] not in ("causal_lm", "masked_lm"))
    if output is not None:
        assert (output.weight is fresh.weight) == bool(model.config.tie_word_embeddings)


@pytest.mark.parametrize("tied", [False, True])
@every_class
def test_declared_ties_are_the_shared_parameters(name: str, tied: bool) -> None:
    model = build(name, tie_word_embeddings=tied)
    sharing: dict[int, list[str]] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        sharing.setdefault(id(parameter), []).append(parameter_name)
    groups = {frozenset(names) for names in sharing.values() if len(names) > 1}
    assert groups == {frozenset(pair) for pair in model.tied_parameters().items()}
    assert set(model.tied_parameters()) <= set(model._tied_weights_keys)
    if not model._tied_weights_keys:
        assert not groups


@every_class
def test_every_tensor_is_a_parameter_or_a_buffer(name: str) -> None:
    for path, module in build(name).named_modules():
        loose = [k for k, v in vars(module).items() if isinstance(v, Tensor)]
        assert not loose, f"{path}: {loose}"


def seed_every_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor is drawn from the same seed, so that the order of drawing does not matter."""
    for method in ("normal_", "uniform_"):
        draw = getattr(Tensor, method)

        def seeded(self: Tensor, *args: Any, draw: Any = draw, **kwargs: Any) -> Tensor:
            torch.manual_seed(0)
            return draw(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, method, seeded)


@every_class
@pytest.mark.filterwarnings("ignore")
def test_a_model_of_nothing_loaded_is_a_new_model(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed_every_draw(monkeypatch)
    new = build(name)
    loaded = type(new).from_pretrained(None, config=new.config, state_dict={}, strict=False)
    for (key, value), other in zip(
        new.state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), key
    for (key, value), other in zip(
        new.named_buffers(), dict(loaded.named_buffers()).values(), strict=True
    ):
        assert not other.is_meta and torch.equal(value, other), key


@every_class
def test_loaded_parameters_are_contiguous_and_nothing_is_left_on_meta(
    name: str, tmp_path: Path
) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for key, tensor in (*again.named_parameters(), *again.named_buffers()):
        assert tensor.is_contiguous() and not tensor.is_meta, key


def test_the_annotation_names_the_configuration() -> None:
    assert Annotated.config_class is MineConfig
    assert LlamaModel.config_class is LlamaConfig and LlamaForCausalLM.config_class is LlamaConfig
    with pytest.raises(TypeError, match="config is a LlamaConfig; it must be a MineConfig"):
        Annotated(config_of("llama"))

    class Explicit(LlamaModel):
        config: MineConfig
        config_class = LlamaConfig

    assert Explicit.config_class is LlamaConfig


def test_a_model_without_post_init_loads_and_saves(tmp_path: Path) -> None:
    model = Quiet(config_of("llama"))
    assert torch.equal(model.scale, torch.full((3,), 5.0))
    model.save_pretrained(tmp_path)
    again = Quiet.from_pretrained(tmp_path)
    assert torch.equal(again(tokens()), model(tokens()))
    state = {"embed.weight": model.embed.weight}
    filled = Quiet.from_pretrained(None, config=model.config, state_dict=state, strict=False)
    assert torch.equal(filled.scale, model.scale)

    class Forgetful(Quiet):
        def _init_weights(self, module: nn.Module) -> None:
            PreTrainedModel._init_weights(self, module)

    with pytest.raises(UninitializedParameter, match=r"no 'scale' of a Forgetful .* add a rule"):
        Forgetful.from_pretrained(None, config=model.config, state_dict=state, strict=False)


@pytest.mark.parametrize("bias", [False, True])
def test_weights_are_drawn_as_configured(bias: bool) -> None:
    torch.manual_seed(0)
    changes = {"hidden_size": 320, "head_dim": 64, "initializer_range": 0.05}
    model = build("LlamaForCausalLM", mlp_bias=bias, attention_bias=bias, **changes)
    for name, parameter in model.named_parameters():
        if parameter.numel() >= 10**5:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.001, name
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    assert bool(biases) == bias and not any(b.any() for b in biases)


def test_a_new_device_context_is_where_a_model_is_made(tmp_path: Path) -> None:
    build("LlamaForCausalLM").save_pretrained(tmp_path)
    with torch.device("cpu"):
        assert LlamaForCausalLM.from_pretrained(tmp_path).device.type == "cpu"
    with (
        torch.device("meta"),
        pytest.raises(RuntimeError, match=re.escape("You are using `from_pr")),
    ):
        LlamaForCausalLM.from_pretrained(tmp_path)
