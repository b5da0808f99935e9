"""Generation: a prefill forward, then one forward a token, greedy or sampled.

The model is called as `model(input_ids, attention_mask, position_ids, past_key_values, use_cache,
logits_to_keep=1)` with keywords and returns `.logits` (B, 1, V); it fills the cache in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swathe.modeling.cache import DynamicCache, StaticCache
from swathe.modeling.generation.options import (
    check_cache,
    chooser,
    continuations,
    new_tokens,
    refuse_unknown,
)
from swathe.modeling.generation.prompt import Prompt, SpecialTokens, read_prompt
from swathe.modeling.generation.repetition import RepetitionPenalty
from swathe.modeling.generation.sampling import NEVER
from swathe.modeling.generation.stopping import Decoder, StopStrings
from swathe.modeling.generation.streamer import Streamer
from swathe.modeling.outputs import ModelOutput

# steps between two looks at whether every row has ended; a look waits for the device
POLL, POLL_OTHERWISE = {"cpu": 1}, 8


@dataclass
class GenerateOutput(ModelOutput):
    """`sequences` (B, T + new tokens): prompt, then tokens, then padding after a row's end."""

    sequences: Tensor | None = None


class GenerationMixin:
    """Gives `generate` to a model with a language-model head."""

    generation_config: Any = None

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        attention_mask: Tensor | None = None,
        min_new_tokens: int = 0,
        do_sample: bool = False,
        num_return_sequences: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: Decoder | None = None,
        streamer: Streamer | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = False,
        cache_implementation: str | None = None,
        **unknown: Any,
    ) -> Tensor | GenerateOutput:
        """Continue prompts (B, T): token ids (B, T + n), n <= max_new_tokens or max_length - T.

        `attention_mask` (B, T) is 0 on padding, on any side of a row. The result holds the prompt
        as it was given; every row's new tokens start in column T. A row ends with any of
        `eos_token_id` (an empty list: never) and is filled with `pad_token_id`; both default to the
        model's generation_config, then config, padding finally to the first EOS. Nothing else is
        taken from a file. It ends, too, with the token that completes one of `stop_strings` in the
        text of its new tokens, which `tokenizer` decodes; min_new_tokens only keeps EOS away.
        `repetition_penalty` counts the prompt, not its padding. With do_sample=True apply
        `temperature`, then `top_k`, `top_p` and `min_p`, `generator` (on the logits' device), and
        `num_return_sequences` = N: row i is continued in rows i N to i N + N - 1 of the result.
        `streamer` gets the prompt, then each step's tokens. `cache_implementation` is "dynamic",
        which grows, or "static", which has its room at once.

        Raises TypeError for unknown options and wrong types, ValueError for values out of range.
        """
        if unknown:
            refuse_unknown(next(iter(unknown)))
        check_cache(cache_implementation)
        special = SpecialTokens.of(self, eos_token_id, pad_token_id)
        prompt = read_prompt(self, input_ids, attention_mask, special)
        prompt = prompt.repeated(continuations(num_return_sequences, do_sample))
        (B, T), device = prompt.ids.shape, prompt.ids.device
        new = new_tokens(max_new_tokens, max_length, min_new_tokens, T)
        choose = chooser(do_sample, device, temperature, top_k, top_p, min_p, generator)
        run = _Run(self, prompt, special, new, streamer, cache_implementation == "static")
        run.stop = StopStrings.of(stop_strings, tokenizer, B, special.pad)
        run.penalty = RepetitionPenalty.of(repetition_penalty, prompt)
        sequences = run.all_tokens(choose, min_new_tokens)
        return GenerateOutput(sequences=sequences) if return_dict else sequences


class _Run:
    """The state of one call: every buffer is made once, at its final size."""

    stop: StopStrings | None = None
    penalty: RepetitionPenalty | None = None

    def __init__(
        self,
        model: Any,
        prompt: Prompt,
        special: SpecialTokens,
        max_new_tokens: int,
        streamer: Streamer | None,
        static: bool,
    ):
        B, T = prompt.ids.shape
        device = prompt.ids.device
        self.model, self.prompt, self.special, self.streamer = model, prompt, special, streamer
        room = T + max_new_tokens
        self.cache = StaticCache(model.config, room) if static else DynamicCache()
        self.start = self.length = T
        self.sequences = prompt.ids.new_empty(B, room)
        self.sequences[:, :T] = prompt.ids
        self.mask: Tensor | None = None
        self.positions = torch.arange(room, device=device)[None]
        if prompt.mask is not None:
            self.mask = prompt.mask.new_ones(B, room)
            self.mask[:, :T] = prompt.mask
            self.positions = (self.mask.cumsum(1) - 1).clamp_min_(0)
        self.ended = torch.zeros(B, dtype=torch.bool, device=device)
        self.lengths = torch.full((B,), T, device=device)  # tokens up to and with a row's last

    def all_tokens(self, choose: Callable[[Tensor], Tensor], min_new_tokens: int) -> Tensor:
        """Run the model until every row has ended or the buffer is full."""
        if self.streamer is not None:
            self.streamer.put(self.prompt.given.cpu())
        logits = self._prefill()
        while True:
            if self.penalty is not None:
                logits = self.penalty(logits)
            if self.length - self.start < min_new_tokens and self.special.eos is not None:
                logits = logits.index_fill(-1, self.special.eos, NEVER)
            token = choose(logits)
            if self.penalty is not None:
                self.penalty.add(token)
            self._append(token)
            if self.length == self.sequences.shape[1] or self._all_ended():
                return self._finish()
            logits = self._forward(self.length - 1)

    def _prefill(self) -> Tensor:
        """Logits (B, V) after the prompt; equal rows are read once if the cache can repeat them."""
        times = self.prompt.times
        if times == 1 or not isinstance(self.cache, DynamicCache):
            return self._forward(0)
        logits = self._forward(0, times)
        self.cache.batch_repeat_interleave(times)
        return logits.repeat_interleave(times, 0)

    def _forward(self, begin: int, every: int = 1) -> Tensor:
        """Logits (B / every, V) after the newest token; the cache holds those before `begin`."""
        out = self.model(
            input_ids=self.sequences[::every, begin : self.length],
            attention_mask=None if self.mask is None else self.mask[::every, : self.length],
            position_ids=self.positions[::every, begin : self.length],
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _append(self, token: Tensor) -> None:
        """Add each row's token (B,), or padding where the row has ended."""
        special = self.special
        if self._may_end():
            # without a token to pad with there is one row, and its end is the last step
            if special.pad is not None:
                token = token.masked_fill(self.ended, special.pad)
            self.lengths += ~self.ended
        if special.eos is not None:
            self.ended |= (token[:, None] == special.eos).any(1)
        if self.stop is not None:
            self.ended |= self.stop.met(token, self.ended)
        self.sequences[:, self.length] = token
        self.length += 1
        if self.streamer is not None:
            self.streamer.put(token.cpu())

    def _may_end(self) -> bool:
        return self.special.eos is not None or self.stop is not None

    def _poll(self) -> int:
        """Steps between two looks at the ends of rows."""
        waits_anyway = self.streamer is not None or self.stop is not None
        return 1 if waits_anyway else POLL.get(self.sequences.device.type, POLL_OTHERWISE)

    def _all_ended(self) -> bool:
        """Whether every row has ended; on a GPU it is looked at only now and then."""
        if not self._may_end() or (self.length - self.start) % self._poll():
            return False
        return bool(self.ended.all())

    def _finish(self) -> Tensor:
        """Prompt and tokens, without the steps after the last row ended."""
        if self.streamer is not None:
            self.streamer.end()
        if self._may_end() and self._poll() > 1:
            self.length = int(self.lengths.max())
        self.sequences[:, : self.start] = self.prompt.given
        return self.sequences[:, : self.length].contiguous()
