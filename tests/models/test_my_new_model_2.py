"""MyNewModel2 beside transformers' Gemma: logits, states, gradients, first values, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import swathe
from support.examples import (
    CLOSE,
    IDS,
    PADDED,
    RIGHT,
    TINY,
    assert_same_loss_and_gradients,
    gemma_pair,
)
from swathe.modeling.errors import ConfigError
from swathe.modeling.examples import my_new_model_2
from swathe.modeling.examples.my_new_model_2 import (
    MyNewModel2Config,
    MyNewModel2ForSequenceClassification,
    MyNewModel2Model,
)
from swathe.modeling.layers.norm import RMSNorm

GEMMA: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one kv head": {"num_key_value_heads": 1},
    "biases in attention": {"attention_bias": True},
    "tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "head_dim given": {"head_dim": 16},
    "linear rope": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    },
}


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", GEMMA)
def test_classifier_equals_gemma(variant: str, attn: str) -> None:
    theirs, model = gemma_pair(attn, **GEMMA[variant])
    assert list(model.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(model(PADDED).logits, theirs(PADDED).logits, **CLOSE)
    labels = torch.tensor([1, 0, 2])
    assert_same_loss_and_gradients(
        theirs, model, input_ids=PADDED, attention_mask=RIGHT, labels=labels
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_states_equal_gemma(side: str) -> None:
    theirs, model = gemma_pair()
    mask = RIGHT if side == "right" else RIGHT.flip(1)
    inputs = {"input_ids": IDS * mask, "attention_mask": mask, "output_hidden_states": True}
    expected, out = theirs(**inputs), model(**inputs)
    assert len(out.hidden_states) == len(expected.hidden_states) == 3
    for mine, other in zip(out.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine[mask.bool()], other[mask.bool()], **CLOSE)
    torch.testing.assert_close(out.logits, expected.logits, **CLOSE)


def test_embeddings_are_scaled_in_their_own_dtype() -> None:
    model = MyNewModel2Model(MyNewModel2Config(**{**TINY, "hidden_size": 3072, "head_dim": 4}))
    table = model.bfloat16().get_input_embeddings()
    # the root of 3072 is 55.43, of which bfloat16 has 55.5
    assert torch.equal(table(IDS), table.weight[IDS] * 55.5)


def test_norms_begin_as_the_identity() -> None:
    """The guide fills every norm with 1, which is twice too much for one that adds 1 itself."""
    model = MyNewModel2ForSequenceClassification(MyNewModel2Config(**TINY))
    norms = [m for m in model.modules() if isinstance(m, RMSNorm)]
    assert len(norms) == 5
    x = torch.randn(2, 32)
    for norm in norms:
        assert not norm.weight.any()
        torch.testing.assert_close(norm(x), x / (x * x).mean(-1, keepdim=True).add(1e-6).sqrt())


def test_config_goes_round_and_refuses_biases(tmp_path: Path) -> None:
    config = MyNewModel2Config()
    assert (config.vocab_size, config.hidden_act, config.head_dim) == (32000, "silu", 128)
    config.save_pretrained(tmp_path)
    assert MyNewModel2Config.from_pretrained(tmp_path) == config
    with pytest.raises(ConfigError, match="the MLP of MyNewModel2 has no biases"):
        MyNewModel2Config(mlp_bias=True)


def test_auto_classes_find_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swathe.modeling.auto._registered", {})
    my_new_model_2.register()
    theirs, model = gemma_pair()
    model.save_pretrained(tmp_path)
    again = swathe.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again) is MyNewModel2ForSequenceClassification
    torch.testing.assert_close(again(PADDED).logits, theirs(PADDED).logits, **CLOSE)
    assert type(swathe.AutoModel.from_pretrained(tmp_path)) is MyNewModel2Model
    with pytest.raises(ConfigError, match="has no class for 'causal_lm'"):
        swathe.AutoModelForCausalLM.from_pretrained(tmp_path)
