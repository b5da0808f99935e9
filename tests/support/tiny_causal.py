"""Tiny causal language models of transformers in training, a batch, and a step of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

V = 64
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": V,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": V, "n_positions": 64}
OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 3.0},
    "mixtral": {"num_local_experts": 4, "output_router_logits": True},
    "gpt2": GPT2,
    "qwen2": {},
    "phi3": {},
    "nemotron": {},
}


def tiny(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    torch.manual_seed(0)
    fields = {**({} if name == "gpt2" else TINY), **OWN[name], **more}
    config = CONFIG_MAPPING[name](**fields)
    for field in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"):
        if hasattr(config, field):
            setattr(config, field, 0.0)
    config._experts_implementation = "eager"  # runs in fp64, too
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    with torch.no_grad():
        # logits of size one, so that a softcap is felt
        model.get_output_embeddings().weight.mul_(8.0)
    return model


def batch(rows: int = 2, columns: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (rows, columns), generator=generator)
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "labels": labels}


def step(model: Any, **arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output = model(**{**batch(), **arguments})
    output.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), grads


class LoRA(nn.Module):
    """What PEFT puts in the place of a Linear."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer: Any = base
        self.lora_A = nn.Linear(base.in_features, 4, bias=False)
        self.lora_B = nn.Linear(4, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def with_lora(model: Any) -> Any:
    torch.manual_seed(3)
    model.lm_head = LoRA(model.lm_head)
    return model
