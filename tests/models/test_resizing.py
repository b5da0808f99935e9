"""Resizing tokens and positions beside transformers' own, and what must not go out of step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn

from swathe.modeling.families.bert.configuration_bert import BertConfig
from swathe.modeling.families.bert.modeling_bert import BertForMaskedLM, BertModel
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.families.llama.modeling_llama import LlamaForCausalLM, LlamaModel
from swathe.modeling.model import PreTrainedModel

TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def build(**changes: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})).eval()


def ids(high: int = 99) -> Tensor:
    return torch.randint(1, high, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("new", [128, 50])
def test_old_rows_stay_and_everything_agrees(tied: bool, new: int) -> None:
    model = build(tie_word_embeddings=tied)
    embed = model.get_input_embeddings()
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    logits = model(ids(50)).logits
    assert model.resize_token_embeddings(new) is embed is model.get_input_embeddings()
    kept = min(new, 99)
    for name in (EMBED, HEAD):
        if name in old:
            assert torch.equal(model.get_parameter(name)[:kept], old[name][:kept])
    assert (model.lm_head.weight is embed.weight) == tied
    assert embed.num_embeddings == model.lm_head.out_features == new
    assert model.config.vocab_size == model.model.config.vocab_size == new
    torch.testing.assert_close(model(ids(50)).logits[..., :kept], logits[..., :kept])
    assert model.resize_report.replaced == dict.fromkeys((EMBED, HEAD), ((99, 32), (new, 32)))
    assert str(model.resize_report).startswith(f"resized from 99 to {new}\n{EMBED}: (99, 32)")


def test_new_rows_are_near_the_mean() -> None:
    model = build()
    before = {name: model.get_parameter(name).detach().clone() for name in (EMBED, HEAD)}
    model.resize_token_embeddings(140)
    for name, old in before.items():
        added = model.get_parameter(name)[99:]
        assert (added - old.mean(0)).abs().max() < 1e-3
        assert len(added.unique(dim=0)) == len(added), "drawn, not all the mean itself"


def test_new_rows_are_transformers_own() -> None:
    old = nn.Embedding(99, 16)
    theirs = nn.Embedding(140, 16)
    torch.manual_seed(3)
    transformers.PreTrainedModel._init_added_embeddings_weights_with_mean(
        None,  # type: ignore[arg-type]
        old,
        theirs,
        99,
        41,
    )
    model = build(hidden_size=16, head_dim=4)
    model.set_input_embeddings(old)
    torch.manual_seed(3)
    model.resize_token_embeddings(140)
    assert torch.equal(old.weight[99:], theirs.weight[99:])


def test_fewer_tokens_than_features_give_the_mean() -> None:
    model = build(vocab_size=9)  # their covariance has no inverse
    mean = model.model.embed_tokens.weight.mean(0)
    model.resize_token_embeddings(11)
    assert torch.equal(model.model.embed_tokens.weight[9:], mean.expand(2, -1))


def test_without_mean_resizing_rows_are_as_in_a_new_model() -> None:
    model = build()
    model.model.embed_tokens.weight.data.add_(5.0)
    model.resize_token_embeddings(2000, mean_resizing=False)
    for name in (EMBED, HEAD):
        added = model.get_parameter(name)[99:]
        assert added.std().item() == pytest.approx(0.1, rel=0.05)
        assert added.mean().abs() < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_gradient_and_trainability_stay(dtype: torch.dtype) -> None:
    model = build().to(dtype)
    model.get_parameter(EMBED).requires_grad_(False)
    model.resize_token_embeddings(120)
    assert model.get_parameter(EMBED).dtype == model.get_parameter(HEAD).dtype == dtype
    assert not model.get_parameter(EMBED).requires_grad and model.lm_head.weight.requires_grad
    assert not model.get_parameter(EMBED).isnan().any()


@pytest.mark.parametrize(
    ("given", "rows"),
    [((100, 64), 128), ((None, 8), 104), ((128, 64), 128), ((100, None), 100), ((None, 33), 99)],
)
def test_multiples(given: tuple[Any, Any], rows: int) -> None:
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    model = build()
    assert model.resize_token_embeddings(*given).weight.shape[0] == rows
    assert theirs.resize_token_embeddings(*given).weight.shape[0] == rows
    assert model.config.vocab_size == theirs.config.vocab_size == rows
    assert model.lm_head.weight.shape == theirs.lm_head.weight.shape == (rows, 32)


def test_without_arguments_nothing_happens() -> None:
    model = build()
    assert model.resize_token_embeddings() is model.model.embed_tokens
    assert model.resize_report is None
    model.resize_token_embeddings(99)
    assert str(model.resize_report) == "resized from 99 to 99"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((100, 1.5), "pad_to_multiple_of is 1.5; it must be a whole number"),
        ((100, 0), "pad_to_multiple_of is 0"),
        ((100.0,), "new_num_tokens is 100.0"),
        ((True,), "new_num_tokens is True"),
        ((0,), "new_num_tokens is 0"),
        ((2,), "removes the row of eos_token_id=2; keep at least 3 rows"),
    ],
)
def test_refusals_change_nothing(given: tuple[Any, ...], message: str) -> None:
    model = build()
    with pytest.raises(ValueError, match=re.escape(message)):
        model.resize_token_embeddings(*given)
    assert model.config.vocab_size == 99 == model.lm_head.out_features
    assert model.model.embed_tokens.weight.shape == (99, 32)


def test_special_tokens_hold_their_rows_unless_forced() -> None:
    model = build(eos_token_id=[2, 90], pad_token_id=98)
    with pytest.raises(ValueError, match="pad_token_id=98"):
        model.resize_token_embeddings(95)
    with pytest.raises(ValueError, match="eos_token_id=90"):
        build(eos_token_id=[2, 90]).resize_token_embeddings(90)
    model.resize_token_embeddings(50, force=True)
    assert model.model.embed_tokens.padding_idx is None
    assert model(ids(50)).logits.shape == (2, 7, 50)


def test_a_bias_of_the_head() -> None:
    model = build()
    head = nn.Linear(32, 99, bias=True)
    nn.init.normal_(head.bias, 3.0, 0.5)
    model.set_output_embeddings(head)
    old = head.bias.detach().clone()
    model.resize_token_embeddings(120)
    assert torch.equal(head.bias[:99], old)
    torch.testing.assert_close(head.bias[99:], old.mean().expand(21), atol=1e-5, rtol=0)
    assert model.resize_report.replaced["lm_head.bias"] == ((99,), (120,))


def test_on_meta() -> None:
    with torch.device("meta"):
        model = build()
    model.resize_token_embeddings(130)
    assert model.lm_head.weight.is_meta and model.lm_head.weight.shape == (130, 32)
    assert model.config.vocab_size == 130


def test_an_optimizer_made_before_is_told() -> None:
    """transformers' goes on training a head that the model no longer has."""
    model = build()
    before = list(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    model(ids(), labels=ids()).loss.backward()
    optimizer.step()
    model.resize_token_embeddings(120)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert model.lm_head.weight.grad is None
    model(ids(), labels=ids()).loss.backward()
    with pytest.raises(RuntimeError, match="must match"):
        optimizer.step()


def test_a_resized_model_trains_saves_and_loads(tmp_path: Path) -> None:
    model = build(tie_word_embeddings=True)
    model.resize_token_embeddings(110)
    model(ids(110), labels=ids(110)).loss.backward()
    assert model.model.embed_tokens.weight.grad.shape == (110, 32)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config.vocab_size == 110
    assert torch.equal(again(ids(110)).logits, model(ids(110)).logits)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(ids(110)).logits, again(ids(110)).logits)


class Placed(nn.Module):
    """A table of positions with the buffers that stand beside one in BERT."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)
        self.register_buffer("position_ids", torch.arange(rows)[None], persistent=False)
        self.register_buffer(
            "token_type_ids", torch.zeros(1, rows, dtype=torch.long), persistent=False
        )


class PlacedModel(PreTrainedModel):
    config_class = LlamaConfig
    position_embed_path: ClassVar[str] = "embeddings.table"

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.embeddings = Placed(config.max_position_embeddings, config.hidden_size)


@pytest.mark.parametrize("new", [24, 10])
def test_positions(new: int) -> None:
    model = PlacedModel(LlamaConfig(**TINY, max_position_embeddings=16))
    table = model.get_position_embeddings()
    old = table.weight.detach().clone()
    assert model.resize_position_embeddings(new) is None
    kept = min(new, 16)
    assert model.get_position_embeddings() is table and table.num_embeddings == new
    assert torch.equal(table.weight[:kept], old[:kept])
    if new > 16:
        assert table.weight[16:].std().item() == pytest.approx(0.1, rel=0.3)
    assert torch.equal(model.embeddings.position_ids, torch.arange(new)[None])
    assert torch.equal(model.embeddings.token_type_ids, torch.zeros(1, new, dtype=torch.long))
    assert model.config.max_position_embeddings == new
    report = model.resize_report
    assert report is not None
    assert report.replaced == {"embeddings.table.weight": ((16, 32), (new, 32))}
    with pytest.raises(ValueError, match="new_num_position_embeddings is 0"):
        model.resize_position_embeddings(0)


def test_rotary_models_have_no_table() -> None:
    body = LlamaModel(LlamaConfig(**TINY))
    for call in (body.get_position_embeddings, lambda: body.resize_position_embeddings(9)):
        with pytest.raises(NotImplementedError, match=r"set config\.max_position"):
            call()


BERT = {**TINY, "max_position_embeddings": 5}
del BERT["num_key_value_heads"]


@pytest.mark.parametrize("cls", [BertModel, BertForMaskedLM])
def test_bert_reads_longer_texts_afterwards(cls: Any) -> None:
    model = cls(BertConfig(**BERT)).eval()
    with pytest.raises(ValueError, match="max_position_embeddings=5"):
        model(ids())
    short = model(ids()[:, :5])[0]
    model.resize_position_embeddings(7)
    assert model(ids())[0].shape[:2] == (2, 7)
    assert torch.equal(model(ids()[:, :5])[0], short)


def test_a_tied_bias_of_bert_stays_tied() -> None:
    model: Any = BertForMaskedLM(BertConfig(**BERT)).eval()
    model.resize_token_embeddings(120)
    head = model.cls.predictions
    assert head.decoder.bias is head.bias and head.bias.shape == (120,)
    assert head.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model(ids(120)[:, :5]).logits.shape == (2, 5, 120)
