"""The next token from logits (B, V), without reading a value back to the host.

    p      = softmax(logits / temperature), cut to the top_k most likely tokens, then to the fewest
             of those whose probabilities sum to top_p, then to those with p_v >= min_p * max_u p_u
    token  = argmax_v(log p_v + G_v),  G_v = -log(E_v) Gumbel noise, E_v ~ Exponential(1)

Source   Gumbel-max: Maddison et al. 2014, arXiv:1411.0030; top-p: Holtzman et al. 2019,
         arXiv:1904.09751; min-p: Nguyen et al. 2024, arXiv:2407.01082.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

NEVER = float("-inf")


class Sampling(NamedTuple):
    """How to sample; None stands for all tokens."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


def check_options(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    """Raise ValueError for options that leave no distribution to sample from."""
    if not 0 < temperature < float("inf"):
        raise ValueError(
            f"temperature is {temperature}; sampling needs a finite number above 0. "
            "For the most likely token every time, pass do_sample=False"
        )
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise ValueError(f"top_k is {top_k!r}; give a whole number of at least 1, or None for all")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; give a number above 0 and at most 1, or None for all")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p is {min_p}; give a number from 0 to 1, or None for all tokens")


def filtered(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(scores, tokens): fp32 scores (B, C) of the candidates, -inf where cut; their ids (B, C).

    tokens None stands for all tokens in order. Ties at the top_k boundary keep exactly k tokens.
    """
    scores = logits.float()
    if temperature != 1.0:
        scores = scores / temperature
    tokens = None
    nucleus = top_p if top_p is not None and top_p < 1 else None
    if top_k is not None and top_k < scores.shape[-1]:
        scores, tokens = scores.topk(top_k, sorted=True)
    elif nucleus is not None:
        scores, tokens = scores.sort(dim=-1, descending=True)
    if nucleus is not None:
        probability = scores.softmax(-1)
        before = (
            probability.cumsum(-1) - probability
        )  # mass of the likelier tokens; 0 for the first
        scores = scores.masked_fill(before >= nucleus, NEVER)
    if min_p:
        # a ratio of probabilities is a difference of scores: no softmax is needed
        lowest = scores.amax(-1, keepdim=True) + math.log(min_p)
        scores = scores.masked_fill(scores < lowest, NEVER)
    return scores, tokens


def greedy(logits: Tensor) -> Tensor:
    """The most likely token id (B,) for each row of logits (B, V)."""
    return logits.argmax(-1)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token id (B,) for each row of logits (B, V); equal seeds give equal tokens."""
    scores, tokens = filtered(logits, temperature, top_k, top_p, min_p)
    noise = torch.empty_like(scores).exponential_(generator=generator)
    tiny = torch.finfo(torch.float32).tiny  # a zero would turn a cut token's -inf into NaN
    choice = (scores - noise.clamp_min_(tiny).log_()).argmax(-1)
    return choice if tokens is None else tokens.gather(-1, choice[:, None]).squeeze(-1)
