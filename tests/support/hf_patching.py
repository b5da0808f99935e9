"""Tiny models of transformers for tests of single finders, and what must stay as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swathe.kernels.core.cpp import why_unavailable
from swathe.modeling.hf.patching.options import Options
from swathe.modeling.hf.patching.report import Candidate, Proof
from swathe.modeling.hf.patching.swaps import Undo

BACKEND = "eager" if why_unavailable() else "cpp"

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 8,  # the part that is turned
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 4,  # all of them: no choice that a rounding could turn
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
}
_YARN = {"rope_type": "default", "rope_theta": 1e4}
CHANGES: dict[str, dict[str, Any]] = {
    "gptj": {"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8, "n_positions": 64},
    "phi3": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_pct": 0.5, "use_parallel_residual": False},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 2, "rope_parameters": _YARN},
    # heads of 512 features with a softmax of unscaled scores would magnify every rounding
    "gemma4_text": {
        "global_head_dim": 16,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
    },
    "laguna": {
        "num_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "llama4_text": {"num_local_experts": 1, "intermediate_size_mlp": 48},
}


def tiny(model_type: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A causal language model of two layers with random parameters, norms' included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {**_COMMON, **CHANGES.get(model_type, {}), **changes}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **given)
    # the others have no fp64
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():
            # ones and zeros would hide a weight that is left out
            p.add_(torch.randn_like(p) * 0.1)
    return model.to(dtype).eval()


def token_ids(tokens: int = 12) -> Tensor:
    return torch.randint(3, 64, (2, tokens), generator=torch.Generator().manual_seed(1))


def apply(
    model: nn.Module, *finders: ModuleType, backend: str = BACKEND
) -> tuple[Undo, list[Candidate], list[Proof]]:
    """Patch with these finders alone: the ledger, every candidate, and the proofs of those used."""
    undo, found, proofs = Undo(), [], []
    for finder in finders:
        for candidate in finder.find(model, Options(backend=backend)):
            found.append(candidate)
            if candidate.reason is None:
                assert candidate.prove is not None and candidate.apply is not None
                proof = candidate.prove()
                assert proof.failure is None, (candidate.path, proof)
                proofs.append(proof)
                candidate.apply(undo)
    return undo, found, proofs


def counted(monkeypatch: pytest.MonkeyPatch, *places: tuple[ModuleType, str]) -> list[str]:
    """A list that grows by the name of the function with each call of one of these."""
    calls: list[str] = []

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watch(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        return watch

    for module, name in places:
        monkeypatch.setattr(module, name, watched(name, getattr(module, name)))
    return calls


def outcome(model: nn.Module, ids: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """The logits and the gradient of every parameter, for a loss that sees all logits."""
    model.zero_grad()
    given: Any = model(ids, use_cache=False, **kwargs)
    logits = given.logits
    weights = torch.linspace(-1, 1, logits.numel()).to(logits).view_as(logits)
    (logits * weights).sum().backward()
    # a compiled model names its parameters by the module inside it
    gradients = {
        n.removeprefix("_orig_mod."): p.grad.clone()
        for n, p in model.named_parameters()
        if p.grad is not None
    }
    return {"logits": logits.detach(), **gradients}


def assert_as_good(
    ours: dict[str, Tensor], own: dict[str, Tensor], gold: dict[str, Tensor]
) -> None:
    """Our error is at most 1.25 times the model's own, in rms over each tensor and a little slack.

    Tensors pass through many roundings that are not ours, so that both errors are draws.
    """
    assert ours.keys() == own.keys() == gold.keys()
    for name in own:
        scale = gold[name].double().square().mean().sqrt().item() + 1e-30
        errors = [
            (found[name].double() - gold[name].double()).square().mean().sqrt().item() / scale
            for found in (ours, own)
        ]
        floor = 4 * torch.finfo(own[name].dtype).eps / own[name].numel() ** 0.5
        slack = 1.25 * (1 + 6 / own[name].numel() ** 0.5)
        assert errors[0] <= slack * errors[1] + floor, (name, *errors)


def assert_equal(ours: dict[str, Tensor], own: dict[str, Tensor], rtol: float = 1e-5) -> None:
    """The same up to roundings of fp32 that differ, relative to each tensor's largest entry."""
    assert ours.keys() == own.keys()
    for name, wanted in own.items():
        atol = rtol * wanted.abs().max().item() + 1e-30
        torch.testing.assert_close(ours[name], wanted, rtol=rtol, atol=atol, msg=f"{name} differs")


def gold(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """`outcome` of a copy in fp64: what the model would compute without its own rounding."""
    return outcome(copy.deepcopy(model).double(), ids)


def state(model: nn.Module) -> dict[str, tuple[type, tuple[tuple[str, int], ...]]]:
    """Class and instance attributes of every module, by identity."""
    return {
        name: (type(module), tuple((key, id(value)) for key, value in vars(module).items()))
        for name, module in model.named_modules()
    }


def leftovers(found: Sequence[Candidate]) -> list[tuple[str, str | None]]:
    return [(c.path, c.reason) for c in found if c.reason is not None]


def checkpoint(model: Any, reentrant: bool) -> None:
    """Checkpoint the model's layers, by the name that the method has in this transformers."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    enable = newer or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
