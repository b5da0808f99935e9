"""A model as an object: how it is initialised, tied, copied, threaded, and what it refuses."""

from __future__ import annotations

import copy
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import swathe.modeling.families.llama.modeling_llama as llama
from swathe.kernels.core.errors import BackendUnavailable, UnsupportedFeature
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.policy import backends_of

TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 74,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def build(**changes: Any) -> Any:
    return llama.LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})).eval()


def tokens(batch: int = 2, length: int = 11) -> Tensor:
    return torch.randint(1, 99, (batch, length), generator=torch.Generator().manual_seed(1))


def test_captured_states_are_part_of_the_graph() -> None:
    model = build()
    out = model(tokens(), output_hidden_states=True)
    for state in out.hidden_states:
        state.retain_grad()
    out.logits.sum().backward()
    assert all(s.grad is not None and bool(s.grad.any()) for s in out.hidden_states)


def test_two_threads_do_not_mix() -> None:
    model = build()
    ids = [tokens(1, 7), tokens(3, 9)]
    expected = [model(i, output_hidden_states=True).hidden_states for i in ids]
    failures: list[int] = []

    def work(which: int) -> None:
        for _ in range(10):
            out = model(ids[which], output_hidden_states=True).hidden_states
            if not all(torch.equal(a, b) for a, b in zip(out, expected[which], strict=True)):
                failures.append(which)

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_rows_do_not_depend_on_their_neighbours() -> None:
    model = build()
    ids = tokens(4)
    mask = torch.ones_like(ids)
    mask[1:, :3] = 0
    together = model(ids, attention_mask=mask).logits
    for row in range(1, 4):
        alone = model(ids[row : row + 1, 3:], position_ids=torch.arange(3, 11)[None]).logits
        torch.testing.assert_close(together[row, 3:], alone[0], **CLOSE)


def test_use_cache_defaults() -> None:
    model = build()
    ids = tokens()
    assert model(ids).past_key_values is not None
    assert model(ids, use_cache=False).past_key_values is None
    assert model.train()(ids).past_key_values is None


def test_a_text_longer_than_the_positions_is_told_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build(max_position_embeddings=16)
    exact = build(max_position_embeddings=64)
    exact.load_state_dict(model.state_dict())
    caplog.set_level(logging.WARNING)
    model(tokens(2, 16))
    packed = torch.arange(10).repeat(2)[None]
    model(tokens(1, 20), position_ids=packed)  # two documents, neither of them long
    assert not caplog.records
    for _ in range(2):
        assert torch.equal(model(tokens(2, 17)).logits, exact(tokens(2, 17)).logits)
    (record,) = caplog.records
    assert "17 tokens are more than max_position_embeddings=16" in record.getMessage()
    caplog.clear()
    decoding = build(max_position_embeddings=16)
    cache = decoding(tokens(2, 16)).past_key_values
    decoding(tokens(2, 1), past_key_values=cache)
    assert "17 tokens are more than" in caplog.text


@pytest.mark.parametrize("backend", ["auto", "eager", "cpp", "triton"])
def test_odd_widths_run_on_every_backend(backend: str) -> None:
    """As with the widths of transformers' own tests, of which none is a multiple of 16."""
    sizes = {"hidden_size": 36, "intermediate_size": 37, "head_dim": 10, "vocab_size": 101}
    torch.manual_seed(0)
    model = build(**sizes)
    other = build(**sizes)
    other.load_state_dict(model.state_dict())
    for op in ("norm", "rope", "mlp"):
        if backend in backends_of(op):
            try:
                other.set_kernels(**{op: backend})
            except BackendUnavailable as absent:
                pytest.skip(str(absent))
    expected, out = model(tokens(), labels=tokens()), other(tokens(), labels=tokens())
    torch.testing.assert_close(out.logits, expected.logits, **CLOSE)
    expected.loss.backward()
    out.loss.backward()
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attn", ["eager", "sdpa", "triton"])
def test_attention_drops_in_training_or_says_that_it_cannot(attn: str) -> None:
    try:
        model = build(attention_dropout=0.4, attn_implementation=attn)
    except UnsupportedFeature as refused:
        assert attn == "triton" and "dropout" in str(refused)
        return
    whole = model(tokens()).logits
    assert torch.equal(model(tokens()).logits, whole)
    model.train()
    first, second = model(tokens()).logits, model(tokens()).logits
    assert not torch.equal(first, second) and not torch.allclose(first, whole, atol=1e-3)


def test_attention_drops_what_theirs_drops() -> None:
    changes = {**TINY, "attention_dropout": 0.4}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**changes)).train()
    theirs.set_attn_implementation("eager")
    model = build(attention_dropout=0.4, attn_implementation="eager").train()
    model.load_state_dict(theirs.state_dict())
    logits = []
    for each in (theirs, model):
        torch.manual_seed(3)
        logits.append(each(tokens()).logits)
    torch.testing.assert_close(*logits, **CLOSE)


def test_attention_weights_by_configuration_follow_the_same_rule() -> None:
    asked = build(output_attentions=True, attn_implementation="eager")
    assert len(asked(tokens()).attentions) == 3
    asked.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedFeature, match=r'only "eager" does'):
        asked(tokens())
    assert asked(tokens(), output_attentions=False).attentions is None


def test_ids_outside_the_vocabulary_are_named() -> None:
    model = build()
    for bad, found in ((99, "from 1 to 99"), (-1, "from -1 to")):
        ids = torch.tensor([[1, 5, bad]])
        with pytest.raises(ValueError, match=rf"{found}.*vocab_size=99, so ids must be 0 to 98"):
            model(ids)


def test_body_and_head_load_from_each_other(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path / "full")
    body = llama.LlamaModel.from_pretrained(tmp_path / "full")
    ids = tokens()
    assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)
    body.save_pretrained(tmp_path / "body")
    headed, info = llama.LlamaForCausalLM.from_pretrained(
        tmp_path / "body", output_loading_info=True
    )
    assert info["missing_keys"] == {"lm_head.weight"}
    assert torch.equal(headed.model(ids).last_hidden_state, body(ids).last_hidden_state)
    spread = headed.lm_head.weight.std().item()
    assert spread == pytest.approx(TINY["initializer_range"], rel=0.1)


def test_initialisation() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**{**TINY, "hidden_size": 256, "pad_token_id": 3, "mlp_bias": True})
    model = llama.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert bool((parameter == 1).all()), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        elif "embed" not in name:
            assert parameter.std().item() == pytest.approx(0.1, rel=0.05), name
    assert not model.model.embed_tokens.weight[3].any()
    model.post_init()
    assert model.model.embed_tokens.weight[4].any()


def test_dtypes_of_a_new_model() -> None:
    config = LlamaConfig(**TINY, dtype="bfloat16")
    assert llama.LlamaModel(config).dtype == torch.float32
    assert llama.LlamaModel.from_config(config).dtype == torch.bfloat16
    assert llama.LlamaModel.from_config(config, dtype="float16").dtype == torch.float16
    assert llama.LlamaModel.from_config(LlamaConfig(**TINY)).dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_shapes_are_inferred_on_meta() -> None:
    with torch.device("meta"):
        model = build()
        out = model(torch.zeros(2, 5, dtype=torch.long), attention_mask=torch.ones(2, 5))
    assert out.logits.is_meta and out.logits.shape == (2, 5, 99)


def test_embeddings_and_ties() -> None:
    model = build(tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    fresh = torch.nn.Embedding(99, 64)
    model.set_input_embeddings(fresh)
    assert model.model.get_input_embeddings() is fresh and model.lm_head.weight is fresh.weight
    assert model.num_parameters() - model.num_parameters(exclude_embeddings=True) == 99 * 64
    assert model.model.get_output_embeddings() is None and model.base_model is model.model
    with pytest.raises(AttributeError, match="LlamaModel has no head_path"):
        model.model.set_output_embeddings(torch.nn.Linear(64, 99))


def test_copies_and_pickles_run(tmp_path: Path) -> None:
    model = build()
    ids = tokens()
    expected = model(ids).logits
    assert torch.equal(copy.deepcopy(model)(ids).logits, expected)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(again(ids).logits, expected)


def test_wrong_inputs() -> None:
    model = build()
    ids = tokens()
    for call, error, message in (
        (lambda: model(), ValueError, "exactly one of input_ids or inputs_embeds"),
        (lambda: model(ids, inputs_embeds=torch.ones(2, 11, 64)), ValueError, "exactly one of"),
        (lambda: model(ids[0]), ValueError, r"Use input_ids\[None\] for one sequence"),
        (lambda: model(ids.float()), ValueError, "must hold whole numbers"),
        (lambda: model(ids + 90), ValueError, "vocab_size=99, so ids must be 0 to 98"),
        (lambda: model(inputs_embeds=torch.ones(2, 3, 63)), ValueError, "hidden_size=64"),
        (lambda: model(ids, position_ids=ids[:, :3]), ValueError, r"need \(2, 11\) or \(1, 11\)"),
        (
            lambda: model(ids, past_key_values=((),)),
            TypeError,
            "must be a DynamicCache, a StaticCache or None",
        ),
        (lambda: model(ids, logits_to_keep=-1), ValueError, "logits_to_keep=-1"),
        (
            lambda: model(ids, attn_mask=ids),
            TypeError,
            r"no argument 'attn_mask' \(did you mean 'attention_mask'\?\)",
        ),
        (
            lambda: model(ids, output_attentions=True),
            UnsupportedFeature,
            r'only "eager" does. Call model.set_attn_implementation\("eager"\)',
        ),
        (
            lambda: llama.LlamaForCausalLM("dir"),
            TypeError,
            r"use LlamaForCausalLM.from_pretrained\(directory\)",
        ),
        (
            lambda: model.gradient_checkpointing_enable({"use_rentrant": False}),
            ValueError,
            r"unknown 'use_rentrant' \(did you mean 'use_reentrant'\?\)",
        ),
        (
            lambda: model.gradient_checkpointing_enable({"use_reentrant": True}),
            ValueError,
            "leave it out or pass False",
        ),
        (lambda: model.gradient_checkpointing_enable(every_n_layers=0), ValueError, "at least 1"),
    ):
        with pytest.raises(error, match=message):
            call()
