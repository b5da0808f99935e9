"""What a call of `generate` may ask for; everything else is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.core.errors import did_you_mean
from swathe.modeling.generation.sampling import check_options, greedy, sample

OPTIONS = (
    "input_ids", "attention_mask", "max_new_tokens", "min_new_tokens", "do_sample", "temperature",
    "top_k", "top_p", "min_p", "repetition_penalty", "eos_token_id", "pad_token_id", "streamer",
    "generator", "return_dict", "cache_implementation",
)  # fmt: skip
_CACHES = (None, "dynamic", "static")
_UNSET = {"temperature": 1.0}
_ELSEWHERE = {
    "max_length": "give max_new_tokens, which does not count the prompt",
    "num_beams": "beam search is transformers' own: use it there",
    "return_dict_in_generate": "the option is return_dict here",
    "inputs": "it is called input_ids",
    "token_type_ids": "decoders do not read it: leave it out",
    "inputs_embeds": "generation starts from input_ids",
}


def check_counts(max_new_tokens: Any, min_new_tokens: Any) -> None:
    """Raise ValueError for counts that are not whole numbers in their range."""
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}; give a whole number of at least 1")
    if type(min_new_tokens) is not int or not 0 <= min_new_tokens <= max_new_tokens:
        raise ValueError(
            f"min_new_tokens is {min_new_tokens!r}; give a whole number from 0 to "
            f"max_new_tokens={max_new_tokens}"
        )


def chooser(do_sample: bool, device: torch.device, **how: Any) -> Callable[[Tensor], Tensor]:
    """What takes logits (B, V) to tokens (B,): `greedy`, or `sample` with the options `how`.

    Raises ValueError for options of sampling that are out of range, or would do nothing.
    """
    given = [name for name, value in how.items() if value != _UNSET.get(name)]
    if given and not do_sample:
        raise ValueError(
            f"{', '.join(how)} choose how to sample, but do_sample is False, so "
            f"{' and '.join(given)} would do nothing; pass do_sample=True or leave them out"
        )
    generator = how["generator"]
    check_options(how["temperature"], how["top_k"], how["top_p"], how["min_p"])
    if generator is not None and generator.device.type != device.type:
        raise ValueError(
            f"generator is on {generator.device}, the logits on {device}; use "
            f"torch.Generator({device.type!r})"
        )
    return partial(sample, **how) if do_sample else greedy


def check_cache(name: str | None) -> None:
    """Raise ValueError for a cache that does not exist."""
    if name not in _CACHES:
        raise ValueError(f"cache_implementation={name!r}; allowed: {_CACHES}")


def refuse_unknown(name: str) -> None:
    """Raise TypeError for an option that `generate` does not have, with what to do instead."""
    hint = f" ({_ELSEWHERE[name]})" if name in _ELSEWHERE else did_you_mean(name, OPTIONS)
    raise TypeError(
        f"generate has no option {name!r}{hint}; it has {', '.join(OPTIONS)}. For "
        "everything else use transformers' generate"
    )
