"""Gated activation in plain PyTorch: the meaning of the op.

    y = act(gate) * up                      silu, gelu_tanh, gelu, relu and relu2 = relu squared
    g = min(gate, limit)
    u = max(-limit, min(up, limit))
    y = (u + 1) * g * sigmoid(alpha * g)    gpt_oss

Shapes   gate, up, y: (..., N) with any strides; or one packed tensor (..., 2N) without up:
         "halves" holds gate in [0, N) and up in [N, 2N), "interleaved" gate at even features.
Dtypes   gate and up share one; computed in fp32, in fp64 for fp64 input.
Rounding casting "fp32": once, to the inputs' dtype. "llama": every operation in the inputs' dtype,
         bit for bit as transformers' LlamaMLP, Phi3MLP and GptOssExperts: two roundings, five for
         gpt_oss. gpt_oss clamps in the inputs' dtype either way, so `limit` is rounded to it.
Source   Shazeer 2020, arXiv:2002.05202; gpt_oss and the roundings are transformers' own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_mlp_act(
    gate: Tensor,
    up: Tensor | None,
    act: str,
    limit: float,
    alpha: float,
    casting: str,
    packed: str,
) -> Tensor:
    """y; differentiable by autograd, fp64-capable, traceable."""
    if up is None:
        gate, up = unpack(gate, packed)
    dtype = gate.dtype
    if act == "gpt_oss":
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    if casting == "fp32":
        wide = torch.promote_types(dtype, torch.float32)
        gate, up = gate.to(wide), up.to(wide)
    if act == "gpt_oss":
        y = (up + 1) * (gate * torch.sigmoid(gate * alpha))
    else:
        y = activation(gate, act) * up
    return y.to(dtype)


def unpack(x: Tensor, packed: str) -> tuple[Tensor, Tensor]:
    """gate and up as views of the packed tensor."""
    if packed == "interleaved":
        return x[..., ::2], x[..., 1::2]
    gate, up = x.chunk(2, dim=-1)
    return gate, up


def activation(x: Tensor, act: str) -> Tensor:
    """act(x) in the dtype of x, by torch's own functions, as HF's ACT2FN calls them."""
    if act == "silu":
        return F.silu(x)
    if act == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if act == "gelu":
        return F.gelu(x)
    return F.relu(x) if act == "relu" else F.relu(x).square()
