"""What the tests of generation share: a model that counts, a tokenizer of bytes, a tiny Llama."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from swathe.modeling.generation.generate import GenerationMixin

V = 50


class Counter(GenerationMixin, nn.Module):
    """A model whose most likely next token is the last one plus one."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(vocab_size=V, **config)
        self.calls: list[dict[str, Any]] = []

    def forward(self, input_ids: Tensor, **options: Any) -> SimpleNamespace:
        self.calls.append({"input_ids": input_ids.clone(), **options})
        following = (input_ids[:, -1:] + 1) % V
        return SimpleNamespace(logits=nn.functional.one_hot(following, V).float())


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


class Bytes:
    """A tokenizer with one token a byte."""

    def decode(self, tokens: list[int], **options: Any) -> str:
        return bytes(tokens).decode(errors="replace")


def tiny_llamas(directory: Path) -> tuple[Any, Any]:
    """(ours, transformers'): one tiny Llama with random weights, saved to `directory`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from swathe.modeling.families.llama.modeling_llama import LlamaForCausalLM as Ours

    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(directory)
    return Ours.from_pretrained(directory), theirs


def both(pair: tuple[Any, Any], prompt: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    ours, theirs = pair
    options = {"max_new_tokens": 24, "attention_mask": torch.ones_like(prompt)} | options
    return ours.generate(prompt, **options), theirs.generate(prompt, do_sample=False, **options)
