"""Tiny models of every type of transformers that a configuration of a few lines can build.

`build(entry)` gives the same weights on every call, and none of them is neutral: norm weights are
not one and biases not zero, so that a weight, an offset or a mask that is dropped shows in the
logits. The entries stand in support/hf_zoo_types.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

import torch
import transformers
from torch import nn

VOCAB, WINDOW = 160, 5
# What every configuration gets of these, under whichever of its names for them.
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "embedding_size": 64,
    "num_hidden_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "sliding_window": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_size": 16,
    "patch_size": 8,
    "depth": 2,
    "out_hidden_size": 64,
    "text_hidden_size": 64,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 6,
}
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
NOISE = ("drop", "jitter")


@dataclass(frozen=True)
class Entry:
    """A model type and what its tiny configuration has besides TINY; None leaves a field alone.

    `head` is the class to build and `config` the type of its configuration where that is another;
    `lacks` maps what the type cannot do ("padding", "decode", "fp64", ...) to the reason.
    """

    model_type: str
    head: str
    config: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    lacks: Mapping[str, str] = field(default_factory=dict)
    kind: str = "causal"


def tiny(cls: type[Any], changes: Mapping[str, Any]) -> Any:
    """A small configuration of the class: TINY wherever it has the field, then `changes`.

    A change whose name is a sub-configuration is a mapping of changes of that one; it may choose
    the sub-configuration's type with `model_type`.
    """
    default = cls()
    names = {f.name for f in fields(cls)}
    alias = dict(cls.attribute_map)
    own = names | set(alias)
    wanted = {**TINY, **EXPERTS, **LINEAR, **(LATENT if "kv_lora_rank" in own else {})}
    given: dict[str, Any] = {}
    for name, value in wanted.items():
        target = name if name in names else alias.get(name, name)
        if target in names and target not in given:
            given[target] = value
    given |= {f.name: 0.0 for f in fields(cls) if _is_noise(f.name, f.default)}
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if len(kinds) > 1 and alias.get("layer_types", "layer_types") in names:
        given[alias.get("layer_types", "layer_types")] = kinds
        given[alias.get("num_hidden_layers", "num_hidden_layers")] = len(kinds)
    for name in getattr(cls, "sub_configs", {}):
        part = dict(changes.get(name, {}))
        theirs = vars(default).get(name)
        if "model_type" in part:
            given[name] = tiny(transformers.CONFIG_MAPPING[part.pop("model_type")], part)
        elif theirs is not None and not isinstance(theirs, dict):
            given[name] = tiny(type(theirs), part)
    for name, value in changes.items():
        if name not in getattr(cls, "sub_configs", {}):
            given[name if name in names else alias.get(name, name)] = value
    return cls(**{name: value for name, value in given.items() if value is not None})


def _is_noise(name: str, value: Any) -> bool:
    return isinstance(value, float) and value > 0 and any(part in name for part in NOISE)


def configuration(entry: Entry) -> Any:
    """The entry's tiny configuration."""
    cls = transformers.CONFIG_MAPPING[entry.config or entry.model_type]
    decoder = {"is_decoder": True} if entry.kind == "causal" and "is_decoder" in vars(cls) else {}
    return tiny(cls, {**decoder, **entry.changes})


def build(entry: Entry, attn: str = "eager") -> Any:
    """The entry's model in eval mode, fp32, with the same weights on every call."""
    head: Any = attrgetter(entry.head)(transformers)
    make = head.from_config if entry.head.startswith("Auto") else head._from_config
    config = configuration(entry)
    config._experts_implementation = "eager"  # the grouped one has no fp64
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(entry.model_type.encode()))
        model = make(config, attn_implementation=attn).eval()
        roughen(model)
    return model


@torch.no_grad()
def roughen(model: nn.Module) -> None:
    """Matrices to unit gain, a fifth of noise on every vector: nothing left at 0 or 1."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("correction_bias") or (tensor.dim() < 2 and tensor.requires_grad):
            tensor.add_(torch.randn_like(tensor) * 0.2)
        elif tensor.requires_grad:
            spread = float(tensor.std())
            if spread < 0.5:
                tensor.copy_(torch.randn_like(tensor) * tensor.shape[-1] ** -0.5)
            else:
                tensor.add_(torch.randn_like(tensor) * spread * 0.1)
