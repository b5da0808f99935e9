"""Activations by HF's names, as plain functions with HF's roundings."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_TANH = math.sqrt(2.0 / math.pi)


def gelu_erf(x: Tensor) -> Tensor:
    """x * Phi(x) in steps that are each rounded; F.gelu rounds once."""
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation (Hendrycks & Gimpel 2016, arXiv:1606.08415), rounded at each step."""
    return 0.5 * x * (1.0 + torch.tanh(_TANH * (x + 0.044715 * torch.pow(x, 3))))


def gelu_tanh_factored(x: Tensor) -> Tensor:
    """The same with a cheaper polynomial and sqrt(2 / pi) to ten digits."""
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def gelu_sigmoid(x: Tensor) -> Tensor:
    """The sigmoid approximation of the same paper."""
    return x * torch.sigmoid(1.702 * x)


def laplace(x: Tensor) -> Tensor:
    """A squared ReLU with bounded range and slope (MEGA, arXiv:2209.10655)."""
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


ACT2FN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_10": lambda x: F.gelu(x).clamp(-10, 10),
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_tanh_factored,
    "gelu_new": gelu_tanh,
    "gelu_python": gelu_erf,
    "gelu_python_tanh": gelu_tanh,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "laplace": laplace,
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "quick_gelu": gelu_sigmoid,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "swish": F.silu,
    "tanh": torch.tanh,
}
