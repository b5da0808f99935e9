"""The whole models that are measured: true shapes, random weights; what they take and compute.

Numbers are those of the published config.json files; a test holds every shape to the published
number of parameters.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

Facts = dict[str, Any]
MODELS: dict[str, Facts] = {
    "smollm2_135m": {
        "model_type": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama_1b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
    },
    "llama_8b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": False,
    },
    "qwen3_0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": True,
    },
    "qwen3_1.7b": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": True,
    },
    "qwen3_8b": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": False,
    },
    "gemma_2b": {
        "model_type": "gemma",
        "vocab_size": 256_000,
        "hidden_size": 2048,
        "intermediate_size": 16_384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "gemma3_1b": {
        "model_type": "gemma3_text",
        "vocab_size": 262_144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
    },
}
# a dry run's model keeps its family and little else
TINY: Facts = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}


def shape_of(model: str, *, tiny: bool = False) -> Facts:
    """A model's configuration by name; `tiny`: the family's, of a size for a dry run."""
    window = {"sliding_window": 8} if tiny and "sliding_window" in MODELS[model] else {}
    return {**MODELS[model], **(TINY if tiny else {}), **window}


def transformers_config(shape: Facts) -> Any:
    """transformers' configuration of a shape."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**shape)


@dataclass(frozen=True)
class Counts:
    """Numbers of a shape that its bytes and flops follow from.

    multiplied   weights that every token is multiplied by: all of the linear layers, the head too
    read         weights that decoding a token reads: those and the norms
    windows      of each layer's attention; None sees every token
    """

    parameters: int
    multiplied: int
    read: int
    windows: tuple[int | None, ...]
    heads: int
    key_heads: int
    head_dim: int


def counts(shape: Facts) -> Counts:
    """Counts of transformers' model of this shape, built on the meta device."""
    return _counts(tuple(sorted(shape.items())))


@lru_cache
def _counts(items: tuple[tuple[str, Any], ...]) -> Counts:
    from transformers import AutoModelForCausalLM

    config = transformers_config(dict(items))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    parameters = list(model.parameters())
    layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    return Counts(
        parameters=sum(p.numel() for p in parameters),
        multiplied=sum(p.numel() for p in linear),
        read=sum(p.numel() for p in parameters if p not in tables or p in linear),
        windows=tuple(
            config.sliding_window if kind == "sliding_attention" else None for kind in kinds
        ),
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
    )


def training_flops(shape: Facts, batch: int, length: int) -> int:
    """Of the matrix products of one step: forward, and twice that backward; nothing recomputed."""
    of = counts(shape)
    pairs = sum(_seen(length, window) for window in of.windows) * of.heads * batch
    return 3 * (2 * of.multiplied * batch * length + 4 * pairs * of.head_dim)


def _seen(length: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees, causal."""
    inside = length if window is None else min(window, length)
    return inside * (inside + 1) // 2 + (length - inside) * inside


def cache_bytes(shape: Facts, batch: int, length: int, size: int) -> int:
    """Keys and values that decoding one token reads behind `length` others, `size` bytes each."""
    of = counts(shape)
    kept = sum(length if window is None else min(window, length) for window in of.windows)
    return 2 * kept * of.key_heads * of.head_dim * size * batch


def bytes_needed(
    shape: Facts,
    batch: int,
    length: int,
    dtype: str,
    *,
    training: bool,
    scores: bool = False,
    logits: bool = True,
) -> int:
    """What a contender takes at least, estimated as swathe.memory_estimate does.

    `scores`: eager attention, which forms them: in training it keeps each layer's, in fp32 for the
    softmax and in the dtype for the product; else one layer's stand at a time. `logits`: a loss
    that forms all of them.
    """
    import swathe

    loss = {} if logits else {"loss_implementation": "auto"}
    config = swathe.AutoConfig.for_model(**shape, **loss)
    keep = 0 if training else 1
    needed = swathe.memory_estimate(
        config, batch, length, dtype, training=training, logits_to_keep=keep
    ).total
    if scores:
        of, size = counts(shape), getattr(torch, dtype).itemsize
        layers = len(of.windows) if training else 1
        needed += batch * of.heads * length * length * (4 + size) * layers
    return needed


def bytes_free(device: str) -> int:
    """Memory that is free: the GPU's, or what the system can give without swapping."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc").is_dir() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
