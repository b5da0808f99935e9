"""Heads on a decoder (Llama) beside transformers' own: pooling, losses, files, Auto classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import swathe
import swathe.modeling.families.llama.modeling_llama as ours
from swathe.kernels.attention.api import Mask
from swathe.modeling.auto import model_class
from swathe.modeling.errors import ConfigError
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.heads import ForSequenceClassification, last_tokens

TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
HEADS = (
    "LlamaForSequenceClassification",
    "LlamaForTokenClassification",
    "LlamaForQuestionAnswering",
)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
IDS = torch.randint(1, 99, (3, 9), generator=torch.Generator().manual_seed(1))
RIGHT = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 8 + [0]])
PADDED = IDS * RIGHT


def pair(head: str = HEADS[0], attn: str = "eager", **changes: Any) -> tuple[Any, Any]:
    """(transformers' model, ours) with the same random weights in eval mode."""
    torch.manual_seed(0)
    theirs_config = transformers.LlamaConfig(**{**TINY, **changes})
    theirs_config._attn_implementation = "eager"
    theirs = getattr(transformers, head)(theirs_config).eval()
    model = getattr(ours, head)(LlamaConfig(**{**TINY, **changes}, attn_implementation=attn))
    model.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, model.eval()


def labels_for(head: str) -> dict[str, Tensor]:
    if head == "LlamaForSequenceClassification":
        return {"labels": torch.tensor([1, 0, 1])}
    if head == "LlamaForTokenClassification":
        return {"labels": torch.where(RIGHT.bool(), IDS % 2, -100)}
    return {"start_positions": torch.tensor([2, 0, 5]), "end_positions": torch.tensor([4, 50, 5])}


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("head", HEADS)
def test_logits_losses_gradients_and_keys(head: str, attn: str) -> None:
    theirs, model = pair(head, attn)
    assert list(model.state_dict()) == list(theirs.state_dict())
    for module in (theirs, model):
        module.train()
        if hasattr(module, "dropout"):
            assert module.dropout.p == 0.1
            module.dropout.p = 0.0
    inputs = {"attention_mask": RIGHT, **labels_for(head)}
    expected, out = theirs(PADDED, **inputs), model(PADDED, **inputs)
    names = [n for n in expected if n not in ("cache", "past_key_values")]
    assert [n for n in out if n != "past_key_values"] == names
    for name in names:
        torch.testing.assert_close(out[name], expected[name], **CLOSE)
    expected.loss.backward()
    out.loss.backward()
    other = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, other[name].grad, atol=1e-5, rtol=1e-4)
    as_tuple = model(PADDED, **inputs, return_dict=False)
    assert torch.equal(as_tuple[0], model(PADDED, **inputs).loss)


@pytest.mark.parametrize("head", HEADS)
def test_states_and_weights(head: str) -> None:
    theirs, model = pair(head)
    asked = {"output_hidden_states": True, "output_attentions": True}
    expected, out = theirs(IDS, **asked), model(IDS, **asked)
    for name in ("hidden_states", "attentions"):
        for one, other in zip(out[name], expected[name], strict=True):
            torch.testing.assert_close(one, other, **CLOSE)
    assert ("past_key_values" in out) == (head == "LlamaForSequenceClassification")


@pytest.mark.parametrize("changes", [{}, {"num_labels": 1}, {"num_labels": 4}], ids=str)
def test_problem_types_alternate(changes: dict[str, Any]) -> None:
    theirs, model = pair(**changes)
    count = model.config.num_labels
    batches = [torch.tensor([0, 1, 1]), torch.rand(3, count)] if count > 1 else [torch.rand(3)]
    for labels in (*batches, *batches):
        theirs.config.problem_type = None  # which they would keep from the batch before
        expected = theirs(PADDED, attention_mask=RIGHT, labels=labels).loss
        loss = model(PADDED, attention_mask=RIGHT, labels=labels).loss
        torch.testing.assert_close(loss, expected, **CLOSE)
        assert model.config.problem_type is None
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match=r"problem_type='multi_label_classification' .given."):
        model(IDS, labels=torch.zeros(2, 4))


def test_the_last_real_token_is_pooled() -> None:
    _, model = pair()
    alone = torch.cat(
        [model(row[None, : int(n)]).logits for row, n in zip(IDS, RIGHT.sum(1), strict=True)]
    )
    for mask in (RIGHT, RIGHT.bool(), RIGHT[:, None], RIGHT[:, None, None]):
        found = model(PADDED, attention_mask=mask).logits
        torch.testing.assert_close(found, alone, **CLOSE)
    torch.testing.assert_close(model(PADDED).logits, alone, **CLOSE)
    vectors = model.get_input_embeddings()(PADDED)
    found = model(inputs_embeds=vectors, attention_mask=RIGHT).logits
    torch.testing.assert_close(found, alone, **CLOSE)
    left, positions = RIGHT.flip(1), (RIGHT.flip(1).cumsum(1) - 1).clamp(min=0)
    moved = torch.zeros_like(IDS)
    moved[left.bool()] = IDS[RIGHT.bool()]
    found = model(moved, attention_mask=left, position_ids=positions).logits
    torch.testing.assert_close(found, alone, **CLOSE)


def test_padding_that_is_also_a_token_of_the_text() -> None:
    theirs, model = pair()
    ids = PADDED.clone()
    ids[1, 3] = 0  # the last real token is the padding token: eos, say
    alone = model(ids[1:2, :4], attention_mask=RIGHT[1:2, :4]).logits
    found = model(ids, attention_mask=RIGHT).logits[1:2]
    torch.testing.assert_close(found, alone, **CLOSE)
    as_theirs = model(ids, attention_mask=RIGHT, pooling="hf").logits
    expected = theirs(ids, attention_mask=RIGHT).logits
    torch.testing.assert_close(as_theirs, expected, **CLOSE)
    assert not torch.allclose(as_theirs[1:2], found)


def test_pooling_as_transformers_does() -> None:
    theirs, model = pair()
    vectors = model.get_input_embeddings()(PADDED).detach()
    all_padding = torch.zeros_like(IDS)
    for inputs in (
        {"input_ids": PADDED},
        {"input_ids": all_padding},
        {"inputs_embeds": vectors, "attention_mask": RIGHT},
    ):
        expected = theirs(**inputs).logits
        torch.testing.assert_close(model(**inputs, pooling="hf").logits, expected, **CLOSE)
    theirs, model = pair(pad_token_id=None)
    expected = theirs(IDS[:1]).logits
    for pooling in ("last", "hf"):
        torch.testing.assert_close(model(IDS[:1], pooling=pooling).logits, expected, **CLOSE)
        with pytest.raises(ValueError, match=r"the last token of 3 .*pad_token_id=None"):
            model(IDS, pooling=pooling)
    with pytest.raises(ValueError, match=r"pooling='first'; allowed: \('last', 'hf'\)"):
        model(IDS, pooling="first")


def test_which_token_is_the_last() -> None:
    hidden = torch.empty(3, 4, 2)
    ids = torch.tensor([[5, 6, 0, 0], [5, 0, 6, 0], [0, 0, 0, 0]])
    padding = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    assert last_tokens(hidden, ids, None, 0).tolist() == [1, 2, 0]
    assert last_tokens(hidden, ids, padding, 0).tolist() == [2, 3, 0]
    assert last_tokens(hidden, ids, padding, None).tolist() == [2, 3, 0]
    # the mask of a cache of two tokens, and masks that say nothing of padding
    longer = torch.cat((torch.ones(3, 2), padding), 1)
    assert last_tokens(hidden, None, longer, 0).tolist() == [2, 3, 0]
    for mask in (torch.ones(3, 1, 4, 4).bool(), torch.zeros(3, 1, 1, 4), Mask(causal=True)):
        assert last_tokens(hidden, ids, mask, 0).tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match=r"with inputs_embeds. Pass attention_mask \(B, T\)"):
        last_tokens(hidden, None, None, 0)
    assert last_tokens(hidden[:1], None, None, 0).tolist() == [3]


def test_a_prompt_in_two_pieces() -> None:
    _, model = pair()
    whole = model(IDS, attention_mask=torch.ones_like(IDS)).logits
    cache = model(IDS[:, :5], attention_mask=torch.ones(3, 5)).past_key_values
    rest = model(IDS[:, 5:], attention_mask=torch.ones(3, 9), past_key_values=cache).logits
    torch.testing.assert_close(rest, whole, **CLOSE)


@pytest.mark.parametrize("head", HEADS)
def test_losses_compile_in_one_graph(head: str) -> None:
    _, model = pair(head, num_hidden_layers=1)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    inputs = {"attention_mask": RIGHT, **labels_for(head)}
    if head == "LlamaForSequenceClassification":
        inputs["use_cache"] = False
    expected, out = model(PADDED, **inputs), compiled(PADDED, **inputs)
    assert list(out) == list(expected)
    for name in out:
        torch.testing.assert_close(out[name], expected[name], **CLOSE)


@pytest.mark.parametrize("head", HEADS)
def test_gradient_checkpointing(head: str) -> None:
    _, model = pair(head)
    inputs, grads = {"attention_mask": RIGHT, **labels_for(head)}, []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        loss = model.train()(PADDED, **inputs).loss
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("head", HEADS)
def test_files_go_both_ways(head: str, tmp_path: Path) -> None:
    theirs, _ = pair(head, num_labels=2)
    theirs.save_pretrained(tmp_path / "theirs")
    model = getattr(ours, head).from_pretrained(tmp_path / "theirs", strict=True)
    torch.testing.assert_close(model(PADDED)[0], theirs(PADDED)[0], **CLOSE)
    model.save_pretrained(tmp_path / "ours")
    again = getattr(transformers, head).from_pretrained(tmp_path / "ours")
    for name, value in again.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


@pytest.mark.parametrize("head", HEADS)
def test_a_new_head_on_a_language_model(head: str, tmp_path: Path) -> None:
    language = ours.LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    language.save_pretrained(tmp_path / "lm")
    language.model.save_pretrained(tmp_path / "body")
    for directory in ("lm", "body"):
        model, info = getattr(ours, head).from_pretrained(
            tmp_path / directory, num_labels=2, output_loading_info=True
        )
        assert all(name.split(".")[0] in ("score", "qa_outputs") for name in info["missing_keys"])
        assert info["missing_keys"]
        for name, value in model.base_model.named_parameters():
            assert torch.equal(value, language.model.get_parameter(name)), name
        assert all(p.isfinite().all() for p in model.parameters())


AUTO = {
    "SequenceClassification": "seq_cls",
    "TokenClassification": "token_cls",
    "QuestionAnswering": "question_answering",
    "MaskedLM": "masked_lm",
}


@pytest.mark.parametrize("model_type", ["llama", "bert"])
@pytest.mark.parametrize("kind", AUTO)
def test_auto_classes(kind: str, model_type: str, tmp_path: Path) -> None:
    auto = getattr(swathe, f"AutoModelFor{kind}")
    sizes = {k: v for k, v in TINY.items() if model_type == "llama" or k != "num_key_value_heads"}
    config = swathe.AutoConfig.for_model(model_type, **sizes)
    name = f"{model_type.capitalize()}For{kind}"
    if (model_type, kind) == ("llama", "MaskedLM"):
        with pytest.raises(ConfigError, match=r"no class for 'masked_lm'; it has \['base', 'caus"):
            auto.from_config(config)
        return
    model = auto.from_config(config)
    assert type(model).__name__ == name and type(model) is getattr(swathe, name)
    model.eval().save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert type(again) is type(model) and again.config.architectures == [name]
    assert torch.equal(again(IDS[:1])[0], model(IDS[:1])[0])


def test_architectures_choose_among_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swathe.modeling.auto._registered", {})

    class MineConfig(LlamaConfig):
        model_type = "mine"

    class Plain(ours.LlamaForSequenceClassification):
        config_class = MineConfig

    class Other(ours.LlamaForSequenceClassification):
        config_class = MineConfig

    swathe.register_model("mine", MineConfig, {"seq_cls": (Plain, Other), "masked_lm": []})
    auto = swathe.AutoModelForSequenceClassification
    for architectures, expected in (
        (None, Plain),
        (["Other"], Other),
        (["Plain"], Plain),
        (["LlamaForCausalLM"], Plain),
    ):
        assert type(auto.from_config(MineConfig(**TINY, architectures=architectures))) is expected
    with pytest.raises(ConfigError, match=r"has \['seq_cls'\], and config.json asks for \['Oth"):
        swathe.AutoModelForTokenClassification.from_config(
            MineConfig(**TINY, architectures=["Other"])
        )
    assert model_class("mine", "config") is MineConfig


def test_a_head_without_a_body() -> None:
    with pytest.raises(TypeError, match="has no body; subclass it together with"):
        ForSequenceClassification(LlamaConfig(**TINY))
