"""The repetition penalty: tokens that a row already holds become less likely.

    logit_v = logit_v / penalty   where logit_v >= 0
              logit_v * penalty   where logit_v < 0,  for every token v of the prompt or generated

Padding of the prompt counts for nothing: the padding token is penalised only where it was text.

Source   Keskar et al. 2019, arXiv:1909.05858.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swathe.modeling.generation.prompt import Prompt


def check_penalty(penalty: float) -> float:
    """A penalty that can be applied. Raises ValueError unless it is finite and above 0."""
    if not 0 < penalty < float("inf"):
        raise ValueError(
            f"repetition_penalty is {penalty}; give a finite number above 0: 1.0 changes "
            "nothing, more makes repetition less likely"
        )
    return penalty


class RepetitionPenalty:
    """Remembers which tokens each row holds, in one buffer; nothing is read back to the host."""

    def __init__(self, penalty: float, prompt: Prompt):
        self.penalty, self.prompt = penalty, prompt
        self.seen: Tensor | None = None

    def restart(self, prompt: Prompt) -> None:
        """Forget the tokens of all rows, which now hold those of `prompt` (B, T)."""
        self.prompt = prompt
        if self.seen is not None:
            self.seen.copy_(self._seen_in_prompt(self.seen.shape[1] - 1))

    def __call__(self, logits: Tensor) -> Tensor:
        """Penalised fp32 logits (B, V)."""
        logits = logits.float()
        if self.seen is None:
            self.seen = self._seen_in_prompt(logits.shape[-1])
        penalised = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return torch.where(self.seen[:, :-1], penalised, logits)

    def add(self, token: Tensor) -> None:
        """Remember each row's new token (B,)."""
        assert self.seen is not None
        self.seen.scatter_(1, token[:, None], True)

    def _seen_in_prompt(self, vocab: int) -> Tensor:
        ids, mask = self.prompt.ids, self.prompt.mask
        if mask is not None:
            ids = ids.masked_fill(mask == 0, vocab)
        # the last column takes padding, and ids that an embedding has but the head has not
        seen = ids.new_zeros(ids.shape[0], vocab + 1, dtype=torch.bool)
        return seen.scatter_(1, ids.clamp(max=vocab), True)
