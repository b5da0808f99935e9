"""The example models: the guide's recipes as they work here; MyNewModel beside Llama."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import swathe
from support.examples import (
    CLOSE,
    IDS,
    PADDED,
    RIGHT,
    TINY,
    assert_same_loss_and_gradients,
    llama_pair,
)
from swathe.modeling import examples
from swathe.modeling.auto import model_types
from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.errors import ConfigError
from swathe.modeling.examples import my_new_model
from swathe.modeling.examples.my_new_model import (
    MyNewModelConfig,
    MyNewModelForCausalLM,
    MyNewModelForSequenceClassification,
    MyNewModelModel,
)
from swathe.modeling.examples.my_new_model_2 import MyNewModel2Config, MyNewModel2Model
from swathe.modeling.layers.norm import RMSNorm

ROOT = Path(__file__).parents[2]


@pytest.fixture
def empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swathe.modeling.auto._registered", {})


def test_importing_registers_nothing() -> None:
    code = (
        "import sys, swathe\n"
        "from swathe.modeling.auto import model_types\n"
        "assert not any(m.startswith('swathe.modeling.examples') for m in sys.modules)\n"
        "from swathe.modeling.examples import dummy_bert, my_new_model, my_new_model_2\n"
        "print([t for t in model_types() if t.startswith(('my_new', 'dummy'))])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


@pytest.mark.usefixtures("empty_registry")
def test_the_snippet_of_the_docstring_runs() -> None:
    assert examples.__doc__ is not None
    lines = examples.__doc__.splitlines()
    first = lines.index("    import swathe")
    last = next(i for i, line in enumerate(lines) if line.startswith("    model = "))
    names: dict[str, Any] = {}
    code = compile("\n".join(s[4:] for s in lines[first : last + 1]), "docstring", "exec")
    exec(code, names)
    assert type(names["model"]) is MyNewModelForCausalLM


# the configuration


def test_config_of_the_guide_goes_round(tmp_path: Path) -> None:
    config = MyNewModelConfig()
    assert (config.mlp_bias, config.new_param, config.num_key_value_heads) == (True, 0, 32)
    changed = MyNewModelConfig(**TINY, new_param=7, rope_scaling={"type": "linear", "factor": 2.0})
    # the guide's own constructor lost the caller's rope_scaling
    assert changed.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    for each in (config, changed):
        each.save_pretrained(tmp_path)
        assert MyNewModelConfig.from_pretrained(tmp_path) == each
        assert MyNewModelConfig.from_dict(each.to_dict()) == each
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["model_type"], stored["new_param"]) == ("my_new_model", 7)
    assert MyNewModelConfig.from_pretrained(tmp_path, new_param=8).new_param == 8


@pytest.mark.parametrize("config", [MyNewModelConfig, MyNewModel2Config])
def test_plans_are_those_of_transformers(config: Any) -> None:
    assert config.base_model_tp_plan == transformers.LlamaConfig.base_model_tp_plan
    assert config.base_model_pp_plan == transformers.LlamaConfig.base_model_pp_plan
    assert config.keys_to_ignore_at_inference == ["past_key_values"]


@pytest.mark.parametrize("model_class", [MyNewModelModel, MyNewModel2Model])
def test_plans_name_modules_that_exist(model_class: Any) -> None:
    model = model_class(model_class.config_class(**TINY))
    tp, pp = model.config.base_model_tp_plan, model.config.base_model_pp_plan
    linear = {n.replace(".1.", ".*.") for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {n for n in linear if "*" in n} == set(tp)
    assert set(pp) <= {n for n, _ in model.named_children()}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"new_parm": 1}, "did you mean 'new_param'"),
        ({"new_param": "many"}, "new_param"),
        ({"classifier_dropout": 1.5}, "classifier_dropout"),
        ({"hidden_size": 33}, "hidden_size=33 is not a multiple of num_attention_heads=4"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple"),
    ],
)
def test_config_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MyNewModelConfig(**{**TINY, **values})


# MyNewModel computes what Llama does


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_language_model_equals_llama(attn: str) -> None:
    theirs, model = llama_pair("ForCausalLM", attn)
    assert list(model.state_dict()) == list(theirs.state_dict())
    labels = torch.where(RIGHT.bool(), IDS, -100)
    assert_same_loss_and_gradients(
        theirs, model, input_ids=PADDED, attention_mask=RIGHT, labels=labels
    )
    prompt = IDS[:1]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    expected = theirs.eval().generate(prompt, eos_token_id=None, **options)
    assert torch.equal(model.eval().generate(prompt, eos_token_id=None, **options), expected)


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
def test_classifier_equals_llama(problem: str) -> None:
    labels = torch.tensor([1, 0, 2])
    count = 3
    if problem == "multi_label":
        labels = nn.functional.one_hot(labels, 3).float()
    elif problem == "regression":
        labels, count = torch.tensor([0.5, -1.0, 2.0]), 1
    theirs, model = llama_pair("ForSequenceClassification", num_labels=count)
    assert list(model.state_dict()) == list(theirs.state_dict())
    inputs = {"input_ids": PADDED, "attention_mask": RIGHT, "labels": labels}
    assert_same_loss_and_gradients(theirs, model, **inputs)
    out = model(**inputs)
    as_tuple = model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[1], out.logits)


def test_dropout_before_the_classifier() -> None:
    config = MyNewModelConfig(**TINY, classifier_dropout=0.5)
    model = MyNewModelForSequenceClassification(config).train()
    seen: list[torch.Tensor] = []
    model.score.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.manual_seed(1)
    logits = model(PADDED, attention_mask=RIGHT).logits
    torch.manual_seed(1)
    dropped = nn.functional.dropout(seen[0], 0.5)
    assert (dropped == 0).any()
    assert torch.equal(logits, dropped @ model.score.weight.T)
    logits = model.eval()(PADDED, attention_mask=RIGHT).logits
    torch.testing.assert_close(logits, seen[1] @ model.score.weight.T)


def test_backends_switch_and_states_are_recomputed() -> None:
    _, model = llama_pair("ForCausalLM")
    expected = model(IDS).logits
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(IDS).logits, expected, **CLOSE)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(IDS, labels=IDS).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert model.is_gradient_checkpointing
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_forward_names_an_argument_that_it_does_not_take() -> None:
    _, model = llama_pair("ForSequenceClassification")
    with pytest.raises(TypeError, match="forward has no argument 'token_type_ids'"):
        model(PADDED, token_type_ids=torch.zeros_like(PADDED))


# initialisation and loading


def test_initial_values() -> None:
    model = MyNewModelForCausalLM(MyNewModelConfig(**{**TINY, "initializer_range": 0.05}))
    for module in model.modules():
        if isinstance(module, RMSNorm):
            assert torch.equal(module.weight, torch.ones(32))
        elif isinstance(module, nn.Linear):
            assert 0.04 < module.weight.std() < 0.06
            assert module.bias is None or not module.bias.any()
    embeddings = model.get_input_embeddings().weight
    assert not embeddings[0].any() and 0.045 < embeddings[1:].std() < 0.055


def test_loaded_weights_survive_initialisation_of_a_missing_bias(tmp_path: Path) -> None:
    """Llama's files have no biases in the MLP: the guide's rules run on modules half loaded."""
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    llama.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"llama"', '"my_new_model"'))
    model, info = MyNewModelForCausalLM.from_pretrained(
        tmp_path, mlp_bias=True, strict=False, output_loading_info=True
    )
    missing = {n for n, _ in model.named_parameters() if ".mlp." in n and n.endswith("bias")}
    assert len(missing) == 6 and info["missing_keys"] == missing
    state = model.state_dict()
    assert not any(state[name].any() for name in missing)
    for name, value in llama.state_dict().items():
        assert torch.equal(state[name], value), name
    torch.testing.assert_close(model(IDS).logits, llama.eval()(IDS).logits, **CLOSE)


def saved(directory: Path) -> Any:
    """A language model whose files lack the last norm and have a tensor too many."""
    model = MyNewModelForCausalLM(MyNewModelConfig(**TINY))
    tensors = model.state_dict()
    del tensors["model.norm.weight"]
    model.save_pretrained(directory, state_dict={**tensors, "model.extra.weight": torch.ones(2)})
    return model


@pytest.mark.parametrize("where", ["argument", "class", "config"])
def test_ignore_lists(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path)
    options: dict[str, Any] = {}
    lists = {"missing": [r"model\.norm\.weight"], "unexpected": [r"model\.extra\."]}
    if where == "argument":
        options = {f"ignore_{kind}": patterns for kind, patterns in lists.items()}
    elif where == "config":
        options = {"config": MyNewModelConfig.from_pretrained(tmp_path)}
    holder = MyNewModelForCausalLM if where == "class" else options.get("config")
    for kind, patterns in lists.items():
        if holder is not None:
            monkeypatch.setattr(
                holder, f"_keys_to_ignore_on_load_{kind}", patterns, raising=where == "class"
            )
    loaded, info = MyNewModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, **options
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, **CLOSE)


def test_without_ignore_lists_a_body_with_a_hole_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(swathe.CheckpointError, match=r"model\.norm\.weight"):
        MyNewModelForCausalLM.from_pretrained(tmp_path)


RECIPES: dict[str, dict[str, Any]] = {
    "half precision on whatever device there is": {
        "torch_dtype": torch.float16,
        "device_map": "auto",
    },
    "modules by name": {"device_map": {"": "cpu"}, "dtype": "bfloat16"},
    "attention backend": {"attn_implementation": "sdpa", "device_map": "cpu"},
    "memory": {"offload_state_dict": True},
}


@pytest.mark.usefixtures("empty_registry")
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_of_loading(recipe: str, tmp_path: Path) -> None:
    my_new_model.register()
    model = MyNewModelForCausalLM(MyNewModelConfig(**TINY, attn_implementation="eager")).eval()
    model.save_pretrained(tmp_path)
    options = RECIPES[recipe]
    loaded = swathe.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert type(loaded) is MyNewModelForCausalLM and not loaded.training
    half = {"torch_dtype": torch.float16, "dtype": torch.bfloat16}
    asked = next((dtype for name, dtype in half.items() if name in options), torch.float32)
    assert loaded.dtype == asked
    for name, value in loaded.state_dict().items():
        assert torch.equal(value.cpu(), model.state_dict()[name].to(asked)), name
    if "attn_implementation" in options:
        assert {r.backend for r in loaded.kernel_report().rows if r.op == "attention"} == {"sdpa"}
    logits = loaded(IDS.to(loaded.device)).logits.float().cpu()
    error = (logits - model(IDS).logits).norm() / model(IDS).logits.norm()
    assert error < (1e-5 if asked == torch.float32 else 0.05)


def test_the_guides_attention_backend_is_refused_with_what_there_is(tmp_path: Path) -> None:
    MyNewModelForCausalLM(MyNewModelConfig(**TINY)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'"flash_attention_2" is not supported; allowed.*triton'):
        MyNewModelForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


def test_body_and_heads_read_each_others_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    body = MyNewModelModel(MyNewModelConfig(**TINY))
    body.save_pretrained(tmp_path / "body")
    model, info = MyNewModelForSequenceClassification.from_pretrained(
        tmp_path / "body", output_loading_info=True, num_labels=3
    )
    assert info["missing_keys"] == {"score.weight"} and model.score.weight.shape == (3, 32)
    model.save_pretrained(tmp_path / "head")
    again, info = MyNewModelModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert info["unexpected_keys"] == {"score.weight"}
    for name, value in body.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], value), name
        assert torch.equal(again.state_dict()[name], value), name


# Auto classes


@pytest.mark.usefixtures("empty_registry")
def test_auto_classes_find_it_once_it_is_registered(tmp_path: Path) -> None:
    MyNewModelForSequenceClassification(MyNewModelConfig(**TINY)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="'my_new_model' is not known"):
        swathe.AutoConfig.from_pretrained(tmp_path)
    my_new_model.register()
    assert "my_new_model" in model_types()
    assert type(swathe.AutoConfig.from_pretrained(tmp_path)) is MyNewModelConfig
    chosen = swathe.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(chosen) is MyNewModelForSequenceClassification
    config: PreTrainedConfig = MyNewModelConfig(**TINY)
    assert type(swathe.AutoModel.from_config(config)) is MyNewModelModel
    assert type(swathe.AutoModelForCausalLM.from_config(config)) is MyNewModelForCausalLM
    with pytest.raises(ValueError, match="'my_new_model' exists"):
        my_new_model.register()
