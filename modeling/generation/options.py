"""What a call of `generate` may ask for; everything else is refused by name."""

from __future__ import annotations

from typing import Any

import torch

from swathe.kernels.core.errors import did_you_mean
from swathe.modeling.generation.sampling import Sampling, check_options

OPTIONS = (
    "input_ids", "attention_mask", "max_new_tokens", "max_length", "min_new_tokens", "do_sample",
    "num_return_sequences", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "eos_token_id", "pad_token_id", "stop_strings", "tokenizer", "streamer", "generator",
    "return_dict", "cache_implementation", "cuda_graph", "weights",
)  # fmt: skip
_CACHES = (None, "dynamic", "static")
_ELSEWHERE = {
    "num_beams": "beam search is transformers' own: use it there",
    "return_dict_in_generate": "the option is return_dict here",
    "inputs": "it is called input_ids",
    "token_type_ids": "decoders do not read it: leave it out",
    "inputs_embeds": "generation starts from input_ids",
}


def new_tokens(
    max_new_tokens: int | None, max_length: int | None, min_new_tokens: int, prompt: int
) -> int:
    """The most new tokens after `prompt` tokens, padding included.

    Raises TypeError where neither limit is given, ValueError for both and for values out of range.
    """
    if max_new_tokens is None and max_length is None:
        raise TypeError("generate needs max_new_tokens, or max_length, which counts the prompt too")
    if max_new_tokens is not None and max_length is not None:
        raise ValueError(
            f"max_new_tokens={max_new_tokens!r} and max_length={max_length!r} are two limits of "
            "one thing; give one of them"
        )
    if max_length is None:
        most, limit = max_new_tokens, f"max_new_tokens={max_new_tokens}"
        if type(most) is not int or most < 1:
            raise ValueError(f"max_new_tokens is {most!r}; give a whole number of at least 1")
    else:
        if type(max_length) is not int or max_length <= prompt:
            raise ValueError(
                f"max_length is {max_length!r}, and counts the prompt, which has {prompt} tokens "
                f"with its padding; give a whole number of at least {prompt + 1}, or max_new_tokens"
            )
        most = max_length - prompt
        limit = f"{most}, which max_length={max_length} leaves after the prompt"
    if type(min_new_tokens) is not int or not 0 <= min_new_tokens <= most:
        raise ValueError(
            f"min_new_tokens is {min_new_tokens!r}; give a whole number from 0 to {limit}"
        )
    return most


def sampling(
    do_sample: bool,
    device: torch.device,
    generator: torch.Generator | None,
    options: Sampling,
) -> Sampling | None:
    """The options of sampling, checked; None for the most likely token every time.

    Raises ValueError for options that are out of range, or would do nothing.
    """
    unset = {**Sampling()._asdict(), "generator": None}
    how: dict[str, Any] = {**options._asdict(), "generator": generator}
    given = [name for name, value in how.items() if value != unset[name]]
    if given and not do_sample:
        raise ValueError(
            f"{', '.join(how)} choose how to sample, but do_sample is False, so "
            f"{' and '.join(given)} would do nothing; pass do_sample=True or leave them out"
        )
    check_options(*options)
    if generator is not None and generator.device.type != device.type:
        raise ValueError(
            f"generator is on {generator.device}, the logits on {device}; use "
            f"torch.Generator({device.type!r})"
        )
    return options if do_sample else None


def continuations(num_return_sequences: int, do_sample: bool) -> int:
    """How many times each row is continued. Raises ValueError for counts that make no sense."""
    if type(num_return_sequences) is not int or num_return_sequences < 1:
        raise ValueError(
            f"num_return_sequences is {num_return_sequences!r}; give a whole number of at least 1"
        )
    if num_return_sequences > 1 and not do_sample:
        raise ValueError(
            f"num_return_sequences={num_return_sequences} would give equal rows, because do_sample "
            "is False; pass do_sample=True or leave it out"
        )
    return num_return_sequences


def check_cache(name: str | None) -> str | None:
    """The name; ValueError for a cache that does not exist."""
    if name not in _CACHES:
        raise ValueError(f"cache_implementation={name!r}; allowed: {_CACHES}")
    return name


def refuse_unknown(given: dict[str, Any]) -> None:
    """Raise TypeError for an option that `generate` does not have, with what to do instead."""
    if not given:
        return
    name = next(iter(given))
    hint = f" ({_ELSEWHERE[name]})" if name in _ELSEWHERE else did_you_mean(name, OPTIONS)
    raise TypeError(
        f"generate has no option {name!r}{hint}; it has {', '.join(OPTIONS)}. For "
        "everything else use transformers' generate"
    )
