"""An out-of-memory error in a forward: it stays what it was, and says where the memory goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from support import tiny_bert
from support.families import pair, tokens
from swathe.modeling.cache import DynamicCache
from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.figures import bytes_in_words
from swathe.modeling.footprint import footprint
from swathe.modeling.model import PreTrainedModel

FOUND = "CUDA out of memory. Tried to allocate 2.00 GiB."


class OwnConfig(PreTrainedConfig):
    """Without any of the sizes that the estimate reads."""

    model_type = "own"


class Own(PreTrainedModel):
    """A model that finds no memory."""

    config_class = OwnConfig

    def forward(self, input_ids: Tensor) -> Tensor:
        """Raises."""
        return full(input_ids)


def full(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError(FOUND)


def breaking(family: str = "llama", kernels: Any = "eager", **changes: Any) -> Any:
    """A model whose last layer finds no memory."""
    model = pair(family, kernels, num_hidden_layers=2, **changes)[1]
    model.model.layers[1].mlp.register_forward_pre_hook(full)
    return model


def note(call: Callable[[], object]) -> list[str]:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        call()
    assert str(caught.value) == FOUND and caught.traceback[-1].name == "full"
    (text,) = caught.value.__notes__
    return text.split("\n")


def test_training() -> None:
    model = breaking().train()
    ids = tokens(3, 7)
    lines = note(lambda: model(ids, labels=ids))
    table = str(footprint(model, 3, 7, training=True)).split("\n")
    assert lines[: len(table)] == [f"Out of memory in {table[0]}", *table[1:]]
    assert table[0].startswith("LlamaForCausalLM") and table[0].endswith("3 x 7 tokens, training")
    ways = [line.split(":")[0].strip() for line in lines[len(table) :]]
    assert ways == [
        "What takes less",
        "model.gradient_checkpointing_enable()",
        'model.set_attn_implementation("auto")',
        'model.config.loss_implementation = "auto" in training',
        "model.to(torch.bfloat16)",
        "fewer than 3 sequences at a time",
        'from_pretrained(..., device_map="auto")',
    ]


def test_only_what_there_is_to_gain() -> None:
    model = breaking(kernels="triton").train().bfloat16()
    model.gradient_checkpointing_enable()
    model.config.loss_implementation = "triton"
    lines = note(lambda: model(tokens(1, 7), labels=tokens(1, 7)))
    assert lines[-2:] == [
        "What takes less:",
        '  from_pretrained(..., device_map="auto"): layers that do not fit go elsewhere',
    ]


def test_what_is_told_works() -> None:
    """Each line of code that the note gives is one that a model takes."""
    model = pair("llama", "eager", num_hidden_layers=2)[1].train()
    before = footprint(model, 3, 7, training=True)
    model.gradient_checkpointing_enable()
    model.set_attn_implementation("auto")
    model.config.loss_implementation = "auto"
    model.to(torch.bfloat16)
    assert footprint(model, 3, 7, training=True).total < before.total
    out = model(tokens(3, 7), labels=tokens(3, 7))
    assert out.logits is None and bool(out.loss.isfinite())


def test_inference() -> None:
    model = breaking(kernels={"attn": "sdpa"})
    lines = note(lambda: model(tokens(2, 7)))
    assert "call it under torch.no_grad(), unless you want gradients: nothing is kept" in lines[-4]
    with torch.no_grad():
        lines = note(lambda: model(input_ids=tokens(2, 7)))
        assert lines[0].endswith("2 x 7 tokens, inference")
        logits = 2 * 7 * 99 * 4
        ways = "logits_to_keep=1, where only the next token is wanted: logits"
        assert f"  {ways} {logits / 1000:.2f} kB -> {logits // 7} B" in lines
        again = note(lambda: model(tokens(2, 7), logits_to_keep=1))
        assert not any("logits_to_keep" in line for line in again)
        vectors = torch.zeros(2, 7, 64)
        assert note(lambda: model(inputs_embeds=vectors))[0] == lines[0]


@torch.no_grad()
def test_a_cache_counts_with_what_it_holds() -> None:
    model, cache = breaking(), DynamicCache()
    for layer in range(2):
        cache.update(torch.zeros(2, 2, 100, 16), torch.zeros(2, 2, 100, 16), layer)
    lines = note(lambda: model(tokens(2, 1), past_key_values=cache))
    (line,) = (line for line in lines if "kv_cache" in line)
    assert line.split()[1:3] == bytes_in_words(2 * 2 * 2 * 2 * 101 * 16 * 4).split()


def test_an_encoder_and_a_model_of_ones_own() -> None:
    bert = tiny_bert.pair("BertForMaskedLM")[1]
    bert.bert.encoder.layer[0].register_forward_pre_hook(full)
    assert note(lambda: bert(tiny_bert.IDS))[0].startswith("Out of memory in BertForMaskedLM, ")
    own = Own(OwnConfig())
    assert note(lambda: own(tokens())) == ["Out of memory in Own.forward"]
