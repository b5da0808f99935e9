"""Every decoder family with a tiny configuration: a new family joins with one line here."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from swathe.modeling.auto import model_class

TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 74,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
WINDOWED = {"sliding_window": 5}
# model_type: (transformers' language model, what its tiny configuration has besides TINY)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", WINDOWED),
    "qwen2": (
        "Qwen2ForCausalLM",
        {**WINDOWED, "use_sliding_window": True, "max_window_layers": 2},
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        {**WINDOWED, "use_sliding_window": True, "max_window_layers": 2, "head_dim": 32},
    ),
    "gemma": ("GemmaForCausalLM", {"head_dim": 32}),
    "gemma2": ("Gemma2ForCausalLM", {**WINDOWED, "head_dim": 32, "query_pre_attn_scalar": 24}),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {**WINDOWED, "head_dim": 32, "query_pre_attn_scalar": 24, "num_hidden_layers": 7},
    ),
    "phi3": (
        "Phi3ForCausalLM",
        {
            **WINDOWED,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.75},
        },
    ),
    "mixtral": (
        "MixtralForCausalLM",
        {"num_local_experts": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [1],
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        {**WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    ),
}

# backends of attention that serve a family: torch's own has neither softcap nor sinks
ATTENTION = {name: ["eager", "sdpa", "triton"] for name in FAMILIES}
ATTENTION |= {name: ["eager", "triton"] for name in ("gemma2", "gpt_oss")}


def pair(family: str, kernels: Any = None, **changes: Any) -> tuple[Any, Any]:
    """(transformers' model on eager, ours) with the same random weights, in eval mode."""
    torch.manual_seed(0)
    name, own = FAMILIES[family]
    given = {**TINY, **own, **changes}
    theirs_class = getattr(transformers, name)
    theirs_config = theirs_class.config_class(**given)
    theirs_config._attn_implementation = theirs_config._experts_implementation = "eager"
    theirs = theirs_class(theirs_config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    config = model_class(family, "config")(**given, kernels=kernels)
    ours = model_class(family, "causal_lm")(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def tokens(batch: int = 2, length: int = 11, seed: int = 1) -> Tensor:
    """Ids (batch, length) without the ones that mark padding and ends."""
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(seed))
