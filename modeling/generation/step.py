"""One step of decoding: from logits to each row's token, and through the model to the next logits.

What changes from step to step is held in buffers on the device, made once and written in place;
what does not is in Policy. A step asks the device nothing and has no shape of its own, so that a
CUDA graph may hold it (graph.py) and the same code runs without one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swathe.modeling.generation.prompt import Prompt
from swathe.modeling.generation.repetition import RepetitionPenalty
from swathe.modeling.generation.sampling import NEVER, Sampling, greedy, sample


@dataclass(frozen=True, slots=True)
class Policy:
    """How tokens are chosen and what ends a row: the constants of a step.

    `sampling` None takes the likeliest token. A row ends with any of `ends`, or where `stops` says
    so for reasons of its caller's, and is filled with `pad`; `early`: not before some first tokens.
    """

    sampling: Sampling | None = None
    penalty: float = 1.0
    ends: tuple[int, ...] = ()
    pad: int | None = None
    stops: bool = False
    early: bool = False

    @property
    def may_end(self) -> bool:
        """Whether a row can end before the last step."""
        return self.stops or bool(self.ends)


class DecodeStep:
    """Buffers for B rows of `room` tokens, and the step that adds a token to each.

    sequences (B, room): the prompt, then a token a step. token (B, 1): the newest. ended (B,).
    lengths (B,): tokens up to and with a row's last. column (1,): where the next token goes.
    `cache` is the one of fixed room that calls of the step write to; `take` needs none.
    """

    def __init__(
        self,
        policy: Policy,
        prompt: Prompt,
        room: int,
        generator: torch.Generator | None,
        cache: Any,
    ) -> None:
        B, device = prompt.ids.shape[0], prompt.ids.device
        self.policy, self.generator, self.cache = policy, generator, cache
        self.sequences = prompt.ids.new_zeros(B, room)
        self.token = prompt.ids.new_zeros(B, 1)
        self.column = prompt.ids.new_zeros(1)
        self.steps_to_go = prompt.ids.new_zeros(1)  # before a row may end
        self.ended = torch.zeros(B, dtype=torch.bool, device=device)
        self.lengths = prompt.ids.new_zeros(B)
        self.eos = torch.tensor(policy.ends, device=device) if policy.ends else None
        self.penalty = None if policy.penalty == 1.0 else RepetitionPenalty(policy.penalty, prompt)

    def start(self, prompt: Prompt, min_new_tokens: int) -> None:
        """Hold `prompt` (B, T) and nothing else; no row ends before `min_new_tokens` tokens."""
        T = prompt.ids.shape[1]
        self.sequences[:, :T] = prompt.ids
        self.column.fill_(T)
        self.lengths.fill_(T)
        self.steps_to_go.fill_(min_new_tokens)
        self.ended.zero_()
        if self.penalty is not None:
            self.penalty.restart(prompt)
        if self.cache is not None:
            self.cache.reset()

    def __call__(self, model: Any) -> None:
        """Read the newest token of every row, and add the next one."""
        assert self.cache is not None
        # positions and what is visible follow from the lengths that the cache has on the device
        self.take(last_logits(model, self.token, self.cache))

    def take(self, logits: Tensor) -> None:
        """Add to each row a token chosen from its logits (B, V), or padding where it has ended."""
        policy = self.policy
        if self.penalty is not None:
            logits = self.penalty(logits)
        if policy.early and self.eos is not None:
            going_on = logits.index_fill(-1, self.eos, NEVER)
            logits = torch.where(self.steps_to_go > 0, going_on, logits)
            self.steps_to_go -= 1
        token = self._chosen(logits)
        if self.penalty is not None:
            self.penalty.add(token)
        if policy.may_end:
            # without a token to pad with there is one row, and its end is the last step
            if policy.pad is not None:
                token = token.masked_fill(self.ended, policy.pad)
            self.lengths += ~self.ended
        if self.eos is not None:
            self.ended |= (token[:, None] == self.eos).any(1)
        self.token.copy_(token[:, None])
        self.sequences.index_copy_(1, self.column, self.token)
        self.column += 1

    def _chosen(self, logits: Tensor) -> Tensor:
        if self.policy.sampling is None:
            return greedy(logits)
        return sample(logits, *self.policy.sampling, generator=self.generator)


def last_logits(
    model: Any,
    ids: Tensor,
    cache: Any,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Logits (B, V) after the last of the tokens `ids` (B, T), which go into the cache."""
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
        logits_to_keep=1,
    )
    logits: Tensor = out.logits[:, -1]
    return logits
