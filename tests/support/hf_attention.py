"""transformers' models, tiny, and how far their attention by swathe is from an fp64 run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

import swathe.hf
from support.families import FAMILIES, TINY, WINDOWED, tokens

assert {"swathe", "triton"} <= set(AttentionInterface().valid_keys()), swathe.hf
# transformers 5.10 has neither places within packed documents nor T5 on its interface
NEWER = hasattr(masking_utils, "remap_positions_for_packed_sequence")
EXACT = "exact"  # attention as the formula has it, in the dtype of its inputs

SMALL: dict[str, Any] = {"vocab_size": 99, "max_position_embeddings": 64}
LAYERS: dict[str, Any] = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "d_model": 64,
    "pad_token_id": 0,
}
# name: (class, what its configuration has)
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (cls, {**TINY, **own}) for name, (cls, own) in FAMILIES.items()},
    "llama4_text": (
        "Llama4ForCausalLM",
        {
            **TINY,
            "head_dim": 16,
            "attention_chunk_size": 4,
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "no_rope_layers": [1, 1, 1, 0],
        },
    ),
    "cohere2": ("Cohere2ForCausalLM", {**TINY, **WINDOWED}),
    "olmo2": ("Olmo2ForCausalLM", TINY),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 99, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4},
    ),
    "opt": (
        "OPTForCausalLM",
        {**SMALL, "hidden_size": 64, "ffn_dim": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "word_embed_proj_dim": 64},
    ),
}  # fmt: skip
ENCODER = {**SMALL, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
           "num_attention_heads": 4}  # fmt: skip
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", ENCODER),
    "roberta": ("RobertaForMaskedLM", ENCODER),
    "modernbert": (
        "ModernBertForMaskedLM",
        {**ENCODER, "num_hidden_layers": 4, "local_attention": 6, "pad_token_id": 0},
    ),
}
CROSSED: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("BartForConditionalGeneration", {**SMALL, **LAYERS}),
    "whisper": (
        "WhisperForConditionalGeneration",
        {
            **LAYERS,
            "vocab_size": 99,
            "num_mel_bins": 8,
            "max_source_positions": 8,
            "max_target_positions": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 4,
         "relative_attention_num_buckets": 8, "decoder_start_token_id": 0},
    ),
}  # fmt: skip
MODELS = {**DECODERS, **ENCODERS, **CROSSED}
NO_DROPOUT = ("dropout", "attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop",
              "hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout",
              "dropout_rate")  # fmt: skip


class Example(NamedTuple):
    """What a model is called with, and which rows of its logits mean something."""

    inputs: dict[str, Tensor]
    real: Tensor


@lru_cache(maxsize=4)
def made(name: str) -> Any:
    """The model on eager attention, in eval mode; all weights, biases and norms are random."""
    torch.manual_seed(0)
    cls, own = MODELS[name]
    config = getattr(transformers, cls).config_class(**own)
    for field in NO_DROPOUT:
        if hasattr(config, field):
            setattr(config, field, 0.0)
    config._attn_implementation = config._experts_implementation = "eager"
    model = getattr(transformers, cls)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.05))
    return model


def padding(side: str, batch: int = 3, length: int = 11) -> Tensor:
    """(batch, length) of 0 and 1."""
    mask = torch.ones(batch, length, dtype=torch.long)
    if side == "left":
        mask[0, :4] = mask[1, :1] = 0
    elif side == "right":
        mask[0, 7:] = mask[2, 10:] = 0
    elif side == "holes":
        mask[1, 3] = mask[1, 6] = 0
    return mask


def example(name: str, side: str = "none") -> Example:
    """Three sequences, of which `side` says where they are padded; "none" gives no mask at all."""
    ids, mask = tokens(3), padding(side)
    given = {} if side == "none" else {"attention_mask": mask}
    if name not in CROSSED:
        return Example({"input_ids": ids, **given}, mask.bool())
    answer = tokens(3, 6, seed=2)
    own = {"input_ids": ids, **given}
    if name == "whisper":
        own = {"input_features": torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(3))}
        if side == "right":  # of what the decoder was given
            own["decoder_attention_mask"] = padding(side)[:, 5:]
            return Example({**own, "decoder_input_ids": answer}, padding(side)[:, 5:].bool())
    return Example({**own, "decoder_input_ids": answer}, torch.ones_like(answer).bool())


def run(model: nn.Module, at: Example) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of the real rows, and the gradient of every parameter of a sum over them."""
    model.zero_grad(set_to_none=True)
    logits = model(**at.inputs).logits[at.real]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7))
    (logits * weights.to(logits.dtype)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), grads


def _exact_mask(**given: Any) -> Tensor | None:
    given |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return masking_utils.sdpa_mask(**given)


def _exact(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    # transformers' own eager attention takes its softmax in fp32, and loses rows that see nothing
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    z = query @ key.transpose(2, 3) * scaling
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z if position_bias is None else z + position_bias
    if attention_mask is not None:
        z = z.masked_fill(~attention_mask, -1e30)
    if s_aux is not None:
        z = torch.cat((z, s_aux[:, None, None].expand(*z.shape[:3], 1)), -1)
    p = torch.softmax(z, -1)[..., : key.shape[2]]
    return (p @ value).transpose(1, 2), p


AttentionInterface.register(EXACT, _exact)
AttentionMaskInterface.register(EXACT, _exact_mask)


@contextmanager
def attention_of(model: Any, name: Any) -> Iterator[Any]:
    """The model with another attention, for a while."""
    model.set_attn_implementation(name)
    try:
        yield model
    finally:
        model.set_attn_implementation("eager")


def wide(at: Example) -> Example:
    """The same with floating-point inputs in fp64."""
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in at.inputs.items()}
    return at._replace(inputs=inputs)


def distance(name: str, at: Example, asked: str = "swathe") -> str | None:
    """Where `asked` is further from an fp64 run than eager attention is; None where nowhere.

    Allowed is twice eager's own error, and eight roundings of fp32 for what eager happens to hit.
    """
    model = made(name)
    with attention_of(copy.deepcopy(model).double(), EXACT) as double:
        exact = run(double, wide(at))
    theirs = run(model, at)
    with attention_of(model, asked):
        found = run(model, at)
    if found[1].keys() != theirs[1].keys():
        return f"{name}: no gradient reaches {theirs[1].keys() - found[1].keys()}"
    triples = [("logits", found[0], theirs[0], exact[0])]
    triples += [(n, found[1][n], theirs[1][n], exact[1][n]) for n in exact[1]]
    scale = max(float(g.norm()) for g in exact[1].values())
    for part, mine, other, true in triples:
        size = float(true.norm()) if part == "logits" else scale
        allowed = 2 * float((other - true).norm()) + 8 * torch.finfo(torch.float32).eps * size
        error = float((mine - true).norm())
        if not error <= allowed:
            return f"{name}: {part} is {error:.2e} off, {allowed:.2e} is allowed"
    return None
