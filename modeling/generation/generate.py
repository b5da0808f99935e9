"""Generation: a prefill forward, then one forward a token, greedy or sampled.

The model is called as `model(input_ids, attention_mask, position_ids, past_key_values, use_cache,
logits_to_keep=1)` with keywords and returns `.logits` (B, 1, V); it fills the cache in place. With
a StaticCache, which has both, mask and positions are None after the prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from swathe.modeling.cache import DynamicCache, StaticCache
from swathe.modeling.generation.graph import captures, decoding, forget_graphs
from swathe.modeling.generation.int8 import forget_int8, with_weights
from swathe.modeling.generation.options import (
    check_cache,
    continuations,
    new_tokens,
    refuse_unknown,
    sampling,
)
from swathe.modeling.generation.prompt import Prompt, SpecialTokens, read_prompt
from swathe.modeling.generation.repetition import check_penalty
from swathe.modeling.generation.sampling import Sampling
from swathe.modeling.generation.step import DecodeStep, Policy, last_logits
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
        cuda_graph: bool | Literal["auto"] = "auto",
        weights: Literal["int8"] | None = None,
        **unknown: Any,
    ) -> Tensor | GenerateOutput:
        """Continue prompts (B, T): token ids (B, T + n), n <= max_new_tokens or max_length - T.

        `attention_mask` (B, T) is 0 on padding, on any side of a row. The result holds the prompt
        as it was given; every row's new tokens start in column T. A row ends with any of
        `eos_token_id` (an empty list: never) and is filled with `pad_token_id`; both default to the
        model's generation_config, then config, padding finally to the first EOS. It ends, too, with
        the token that completes one of `stop_strings` in the text of its new tokens, which
        `tokenizer` decodes; min_new_tokens only keeps EOS away. No other option is from a file.
        `repetition_penalty` counts the prompt, not its padding. With do_sample=True apply
        `temperature`, then `top_k`, `top_p` and `min_p`, `generator` (on the logits' device), and
        `num_return_sequences` = N: row i is continued in rows i N to i N + N - 1 of the result.
        `streamer` gets the prompt, then each step's tokens. `cache_implementation` "static" has its
        room at once, and steps that `cuda_graph` captures (graph.py). `weights` "int8" rounds
        projections to a byte a number, on a CPU (int8.py). Raises TypeError for unknown options and
        wrong types, ValueError for values out of range.
        """
        refuse_unknown(unknown)
        cache = check_cache(cache_implementation)
        special = SpecialTokens.of(self, eos_token_id, pad_token_id)
        prompt = read_prompt(self, input_ids, attention_mask, special)
        prompt = prompt.repeated(continuations(num_return_sequences, do_sample))
        T, device = prompt.ids.shape[1], prompt.ids.device
        new = new_tokens(max_new_tokens, max_length, min_new_tokens, T)
        drawn = sampling(do_sample, device, generator, Sampling(temperature, top_k, top_p, min_p))
        stop = StopStrings.of(stop_strings, tokenizer, len(prompt.ids), special.pad)
        graph = captures(cuda_graph, self, cache_implementation) and new > 1
        penalty, early = check_penalty(repetition_penalty), min_new_tokens > 0
        model = with_weights(self, weights)
        policy = Policy(drawn, penalty, special.ends, special.pad, stop is not None, early)
        with decoding(model, policy, prompt, T + new, generator, cache, graph) as (step, go):
            step.start(prompt, min_new_tokens)
            sequences = _Run(model, prompt, new, step, go, stop, streamer).all_tokens()
        return GenerateOutput(sequences=sequences) if return_dict else sequences

    def new_cache(self, prompt: Prompt, room: int | None) -> Any:
        """What the forwards of a call fill: of fixed room for so many tokens, growing for None."""
        config: Any = self.config  # type: ignore[attr-defined]
        return DynamicCache(config=config) if room is None else StaticCache(config, room)

    def why_uncaptured(self) -> str | None:
        """What is in the way of a graph beside what is known of every model; None for nothing."""
        return None

    def step_settings(self) -> tuple[Any, ...]:
        """What a step takes from the model beside its tensors and modules, to be compared."""
        return ()

    def forget_graphs(self) -> None:
        """Free the graphs that `generate` keeps for later calls, and their caches."""
        forget_graphs(self)

    def forget_int8(self: Any) -> None:
        """Free the int8 weights that `generate` keeps for later calls."""
        forget_int8(self)


class _Run:
    """One call: a prefill, then steps until every row has ended or there is no more room."""

    def __init__(
        self,
        model: Any,
        prompt: Prompt,
        max_new_tokens: int,
        step: DecodeStep,
        go: Callable[[], None],
        stop: StopStrings | None,
        streamer: Streamer | None,
    ):
        B, T = prompt.ids.shape
        self.model, self.prompt, self.step, self.go = model, prompt, step, go
        self.stop, self.streamer = stop, streamer
        self.cache = model.new_cache(prompt, None) if step.cache is None else step.cache
        self.start = self.length = T
        self.end = T + max_new_tokens
        self.mask: Tensor | None = None
        self.positions = torch.arange(self.end, device=prompt.ids.device)[None]
        if prompt.mask is not None:
            self.mask = prompt.mask.new_ones(B, self.end)
            self.mask[:, :T] = prompt.mask
            self.positions = (self.mask.cumsum(1) - 1).clamp_min_(0)

    def all_tokens(self) -> Tensor:
        """Prompt and tokens (B, T + n)."""
        if self.streamer is not None:
            self.streamer.put(self.prompt.given.cpu())
        self.step.take(self._prefill())
        while self._goes_on():
            if self.step.cache is not None:
                self.go()
            else:
                self.step.take(self._forward(self.cache, self.length - 1))
        return self._finish()

    def _prefill(self) -> Tensor:
        """Logits (B, V) after the prompt; equal rows are read once."""
        times, cache = self.prompt.times, self.cache
        if times == 1:
            return self._forward(cache, 0)
        if self.step.cache is not None and cache.batch_size is not None:
            # its buffers are a graph's, for all rows
            few = self.model.new_cache(self.prompt.distinct(), self.start)
            logits = self._forward(few, 0, times)
            few.batch_repeat_interleave(times)
            cache.take_over(few)
        else:
            logits = self._forward(cache, 0, times)
            cache.batch_repeat_interleave(times)
        return logits.repeat_interleave(times, 0)

    def _forward(self, cache: Any, begin: int, every: int = 1) -> Tensor:
        """Logits (B / every, V) after the newest token; the cache holds those before `begin`."""
        return last_logits(
            self.model,
            self.step.sequences[::every, begin : self.length],
            cache,
            None if self.mask is None else self.mask[::every, : self.length],
            self.positions[::every, begin : self.length],
        )

    def _goes_on(self) -> bool:
        """Look at what the last step added: whether another one is to follow."""
        self.length += 1
        step = self.step
        if self.stop is not None:
            step.ended |= self.stop.met(step.token[:, 0], step.ended)
        if self.streamer is not None:
            self.streamer.put(step.token[:, 0].cpu())
        return self.length < self.end and not self._all_ended()

    def _poll(self) -> int:
        """Steps between two looks at the ends of rows."""
        waits_anyway = self.streamer is not None or self.stop is not None
        return 1 if waits_anyway else POLL.get(self.prompt.ids.device.type, POLL_OTHERWISE)

    def _all_ended(self) -> bool:
        """Whether every row has ended; on a GPU it is looked at only now and then."""
        if not self.step.policy.may_end or (self.length - self.start) % self._poll():
            return False
        return bool(self.step.ended.all())

    def _finish(self) -> Tensor:
        """Prompt and tokens, without the steps after the last row ended."""
        if self.streamer is not None:
            self.streamer.end()
        if self.step.policy.may_end and self._poll() > 1:
            self.length = int(self.step.lengths.max())
        self.step.sequences[:, : self.start] = self.prompt.given
        # not a view: a graph's next call writes to the buffer
        return self.step.sequences[:, : self.length].clone()
